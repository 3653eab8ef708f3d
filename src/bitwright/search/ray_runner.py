"""Jobs on a Ray cluster: the same queue as `Processes`, for those who outgrow one machine.

Every machine of the cluster must have this package, and a user's own functions, where the driver has them. This is the only
file that knows Ray.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bitwright.errors import JobError, MissingExtra
from bitwright.search.jobs import Failure, Results, Task, Worker, lost_worker, pack, unpack

#: An address that has not answered after this long does not answer.
ANSWER_WITHIN_S = 10.0
#: What an HTTP/2 client says first (RFC 9113 §3.4): the preface and an empty SETTINGS frame. Ray's ports speak gRPC.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS_FRAME = 4


class RayRunner:
    """Jobs on the Ray cluster at *address*: `host:port`, `ray://host:port`, `auto` (the one this machine belongs to), or
    `local` (an instance of its own, for as long as the jobs run).

    A process that is connected to a cluster already stays with that one. One worker for each CPU.
    *raises* (from `run`) `MissingExtra` without Ray; `JobError` for an address that does not answer.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def run(self, task: Task, jobs: Mapping[str, Any]) -> Results:
        """See `Runner`."""
        if not jobs:
            return
        ray = _import_ray()
        file = io.BytesIO()
        pack(task, file)
        with _connected(ray, self.address):
            count = min(len(jobs), max(1, int(ray.cluster_resources().get("CPU", 1))))
            packed = ray.put(file.getvalue())
            remote = ray.remote(num_cpus=1)(_RayWorker)
            crew = [remote.remote(packed, list(sys.path)) for _ in range(count)]
            try:
                yield from _hand_out(ray, crew, jobs)
            finally:
                for worker in crew:
                    ray.kill(worker)


class _RayWorker:
    """A worker as Ray's actor. *packed*: the task; *search_path*: where the driver finds modules."""

    def __init__(self, packed: bytes, search_path: list[str]) -> None:
        torch.set_num_threads(1)  # it has one CPU
        sys.path += [p for p in search_path if p not in sys.path]
        self._worker = Worker(lambda: unpack(io.BytesIO(packed)))

    def do(self, name: str, job: Any) -> Any:
        """The job's result or `Failure`."""
        return self._worker.do(name, job)


def _hand_out(ray: Any, crew: list[Any], jobs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give every worker of *crew* a new job as soon as it is free."""
    waiting = iter(jobs.items())
    busy = {w.do.remote(name, job): (w, name) for w, (name, job) in zip(crew, waiting, strict=False)}
    while busy:
        (ready,), _ = ray.wait(list(busy), num_returns=1)
        worker, finished = busy.pop(ready)
        try:
            result = ray.get(ready)
        except ray.exceptions.RayError as e:
            raise lost_worker(
                finished, _first_line(e), "Look for its end in Ray's logs; memory may have run out."
            ) from e
        if isinstance(result, Failure):
            raise result.error()
        following = next(waiting, None)
        if following is not None:
            busy[worker.do.remote(*following)] = (worker, following[0])
        yield finished, result


# --- the connection ------------------------------------------------------------------------------------------------


def _import_ray() -> Any:
    """The package. *raises* `MissingExtra`."""
    try:
        import ray  # optional dependency
    except ImportError as error:
        raise MissingExtra("--ray", package="ray", extra="ray") from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Connected to the cluster at *address*, silently, and no longer than it takes. *raises* `JobError`."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody was asked
        options["include_dashboard"] = False
    else:
        _check_answer(address)
    try:
        ray.init(**options)
    except (OSError, RuntimeError, ValueError) as e:
        if "AuthToken" in f"{e} {e.__cause__}":  # what `ray start` asks for unless told otherwise
            raise _refused(address) from e
        raise _no_answer(address, _first_line(e)) from e
    try:
        yield
    finally:
        ray.shutdown()


def _check_answer(address: str) -> None:
    """*raises* `JobError` unless something answers at `host:port` as Ray would: Ray itself waits for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or os.environ.get("RAY_USE_TLS", "0") != "0":
        return  # a word like `auto`, or an encrypted port, which does not answer to this greeting
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_WITHIN_S) as caller:
            caller.settimeout(ANSWER_WITHIN_S)
            caller.sendall(_GREETING)
            answer = caller.recv(4)
    except (OSError, OverflowError) as e:
        silent = isinstance(e, TimeoutError)
        why = getattr(e, "strerror", None) or _first_line(e)
        raise _no_answer(address, f"no answer within {ANSWER_WITHIN_S:g} s" if silent else why) from e
    if len(answer) < 4 or answer[3] != _SETTINGS_FRAME:
        raise _no_answer(address, "something else listens there")


def _no_answer(address: str, found: str) -> JobError:
    return JobError(
        f"--ray {address}",
        expected="the address of a Ray cluster that answers",
        found=found,
        remedy="Check it with `ray status`, start one with `ray start --head`, or give --workers instead.",
    )


def _refused(address: str) -> JobError:
    return JobError(
        f"--ray {address}",
        expected="a Ray cluster that lets this process in",
        found="it asks for another authentication token",
        remedy="Set RAY_AUTH_MODE=token here and on every machine of the cluster, with the same token; see Ray's manual.",
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""Jobs on a real Ray instance of this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.tasks import Misbehaves, Powers

from bitwright.errors import BitwrightError, DataError, MissingExtra
from bitwright.search.jobs import run_jobs
from bitwright.search.ray_runner import RayRunner
from bitwright.search.state import SearchState

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")


@pytest.fixture(scope="module")
def runner() -> Iterator[RayRunner]:
    """Connected once: the runner stays with the instance that the process is connected to."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield RayRunner("local")
    ray.shutdown()


def new_state(path: Path | None = None) -> SearchState:
    return SearchState(path, "key")


def test_every_job_is_done_once_and_the_task_is_opened_once_by_each_worker(
    runner: RayRunner, tmp_path: Path
) -> None:
    base = torch.tensor([1.0, 2.0, 3.0])

    found = run_jobs(
        Powers(base, str(tmp_path)), {f"to the {i}": i for i in range(12)}, runner, state=new_state()
    )

    assert [r[0] for r in found.values()] == [float((base**i).sum()) for i in range(12)]
    assert {int(p.name) for p in tmp_path.iterdir()} == {r[1] for r in found.values()}
    assert {r[2] for r in found.values()} == {1}


def test_errors_of_jobs_come_back_and_what_was_done_is_kept(runner: RayRunner, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with pytest.raises(DataError, match=r"x.npy: expected numbers; found text\. Look at it\."):
        run_jobs(Misbehaves(), {"a": "data"}, runner, state=new_state())
    with pytest.raises(BitwrightError, match=r"job 'conv1'.*KeyError"):
        run_jobs(Misbehaves(), {"conv1": "bug"}, runner, state=new_state())

    state = new_state(path)
    state.put("done", 1)
    with pytest.raises(BitwrightError, match="job 'the deadly one': expected a worker that lives"):
        run_jobs(Misbehaves(), {"done": "die", "the deadly one": "die"}, runner, state=state)

    assert new_state(path).measured == {"done": 1}


def test_an_instance_of_our_own_ends_with_the_jobs_and_says_nothing() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.tasks import Misbehaves\n"
        "from bitwright.search.jobs import run_jobs\n"
        "from bitwright.search.ray_runner import RayRunner\n"
        "from bitwright.search.state import SearchState\n"
        "print(run_jobs(Misbehaves(), {'a': 5}, RayRunner('local'), state=SearchState(None, '')))\n"
        "import ray; print(ray.is_initialized())\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)

    assert done.stdout.splitlines() == ["{'a': 5}", "False"]
    assert done.stderr == ""


@contextmanager
def listening(answer: bytes | None) -> Iterator[int]:
    """A port at which something else than Ray listens; it says *answer*, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            caller, _ = server.accept()
            with caller:
                if answer is not None:
                    caller.recv(64)
                    caller.sendall(answer)
                else:
                    caller.recv(64)
                    over.wait()

        over = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        over.set()
        thread.join()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def refused(address: str, monkeypatch: pytest.MonkeyPatch) -> BitwrightError:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # as in a process of its own
    began = time.monotonic()
    with pytest.raises(BitwrightError) as caught:
        run_jobs(Misbehaves(), {"a": 1}, RayRunner(address), state=new_state())
    assert time.monotonic() - began < 10
    assert caught.value.where == f"--ray {address}"
    assert caught.value.expected == "the address of a Ray cluster that answers"
    assert "ray start --head" in caught.value.remedy
    return caught.value


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_a_clear_error(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refused(f"{scheme}127.0.0.1:{closed_port()}", monkeypatch)

    assert "refused" in error.found


def test_an_address_where_something_else_listens_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        error = refused(f"127.0.0.1:{port}", monkeypatch)

    assert error.found == "something else listens there"


def test_an_address_that_keeps_silent_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.search.ray_runner.ANSWER_WITHIN_S", 0.5)
    with listening(None) as port:
        error = refused(f"127.0.0.1:{port}", monkeypatch)

    assert error.found == "no answer within 0.5 s"


def test_an_address_that_is_none_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nonsense" in refused("nonsense", monkeypatch).found


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(MissingExtra, match=r"pip install 'bitwright\[ray\]'"):
        run_jobs(Misbehaves(), {"a": 1}, RayRunner("local"), state=new_state())

"""Running the many measurements of a search: one after the other, or on several processes, with what is done kept.

A *task* is what all measurements share (graph, samples, a user's function); a *job* says which measurement. A worker opens
the task once and then takes one job after the other, whenever it is free. `search/ray_runner.py` does the same on a cluster.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from bitwright.errors import BitwrightError, DataError, JobError
from bitwright.search.state import SearchState

#: Called after each measurement with how many are done, how many there are, and the name of the last one.
Progress = Callable[[int, int, str], None]
#: (name of the job, its result) as they finish, in any order. Closing it ends the work.
Results = Generator[tuple[str, Any], None, None]

#: How often workers are looked after that say nothing.
_LOOK_EVERY_S = 1.0
_END_WITHIN_S = 5.0


class Task(Protocol):
    """What every job of a search needs; it can be pickled."""

    def open(self) -> Callable[[Any], Any]:
        """Called once in each worker: the function that does a job. It takes a job, which can be pickled, and returns
        something that JSON can hold.
        """
        ...


class Runner(Protocol):
    """Where jobs run."""

    def run(self, task: Task, jobs: Mapping[str, Any]) -> Results:
        """Do all *jobs* (name -> what the task's function takes). *raises* the first job's error."""
        ...


def run_jobs(
    task: Task,
    jobs: Mapping[str, Any],
    runner: Runner,
    *,
    state: SearchState,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The results of all *jobs* by name; those that *state* holds are not run again.

    However this ends (an error, Ctrl-C), what was finished is in *state*, and in its file.
    """
    missing = {name: job for name, job in jobs.items() if name not in state}
    done = len(jobs) - len(missing)
    try:
        with contextlib.closing(runner.run(task, missing)) as results:
            for name, result in results:
                state.put(name, result)
                done += 1
                if progress:
                    progress(done, len(jobs), name)
    finally:
        state.save()
    return {name: state.get(name) for name in jobs}


class Serial:
    """One job after the other, in this process; errors arise where they arise."""

    def run(self, task: Task, jobs: Mapping[str, Any]) -> Results:
        """See `Runner`."""
        if jobs:
            work = task.open()
            for name, job in jobs.items():
                yield name, work(job)


class Processes:
    """Jobs on *workers* local processes. *raises* `DataError` for fewer than one."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise DataError(
                "--workers", expected="at least 1", found=str(workers), remedy="Give a number of processes."
            )
        self.workers = workers

    def run(self, task: Task, jobs: Mapping[str, Any]) -> Results:
        """See `Runner`. The threads of this process are shared out among the workers."""
        if not jobs:
            return
        count = min(self.workers, len(jobs))
        threads = max(1, torch.get_num_threads() // self.workers)
        with tempfile.TemporaryDirectory(prefix="bitwright-") as folder, contextlib.ExitStack() as started:
            path = Path(folder, "task.pt")
            pack(task, path)
            crew = [_LocalWorker(path, threads) for _ in range(count)]
            for worker in crew:
                started.callback(worker.end)
                worker.begin()
            yield from _hand_out({w.pipe: w for w in crew}, jobs)


# --- the parent's side ---------------------------------------------------------------------------------------------


class _LocalWorker:
    """A process that takes jobs through a pipe. *job*: the name of the one it is doing."""

    def __init__(self, path: Path, threads: int) -> None:
        self.job: str | None = None
        # Spawned, not forked: a forked child of a process in which OpenMP has run waits for threads that are not there.
        context = multiprocessing.get_context("spawn")
        self.pipe, self._theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(path, self._theirs, threads))

    def begin(self) -> None:
        """Start the process."""
        with _deaf_to_interrupts():
            self.process.start()
        self._theirs.close()

    def give(self, name: str, job: Any) -> None:
        """Hand over a job."""
        self.job = name
        try:
            self.pipe.send((name, job))
        except (BrokenPipeError, ConnectionResetError):
            raise self.lost() from None

    def receive(self) -> Any:
        """The result of the job. *raises* the job's error, or what `lost` says."""
        try:
            result = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self.lost() from None
        if isinstance(result, Failure):
            raise result.error()
        return result

    def lost(self) -> BitwrightError:
        """The error of a worker that died over its job."""
        self.process.join(_END_WITHIN_S)
        code = self.process.exitcode
        found = f"it ended with exit status {code}"
        if code is not None and code < 0:
            found = f"it was ended by {signal.Signals(-code).name}"
        return lost_worker(
            str(self.job),
            found,
            "If memory ran out, use fewer --workers; a script that starts workers must do so under "
            "`if __name__ == '__main__':`.",
        )

    def end(self) -> None:
        """Stop the process at once and wait until it is gone."""
        if self.process.pid is not None:
            self.process.terminate()
            self.process.join(_END_WITHIN_S)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
            self.process.close()
        self.pipe.close()


def _hand_out(crew: Mapping[Any, _LocalWorker], jobs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give every worker of *crew* (by its pipe) a new job as soon as it is free."""
    waiting = iter(jobs.items())
    for worker, (name, job) in zip(crew.values(), waiting, strict=False):
        worker.give(name, job)
    while busy := {pipe: w for pipe, w in crew.items() if w.job is not None}:
        ready = connection.wait(list(busy), timeout=_LOOK_EVERY_S)
        # A pipe may be held open by a child of a worker that is dead itself.
        for worker in [busy[r] for r in ready] or [w for w in busy.values() if not w.process.is_alive()]:
            if not worker.pipe.poll():
                raise worker.lost()
            finished, result = str(worker.job), worker.receive()
            worker.job = None
            following = next(waiting, None)
            if following is not None:
                worker.give(*following)
            yield finished, result


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C: it is their parent that ends them, without a word of theirs."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows has no masks
        yield
        return
    resource_tracker.ensure_running()  # starting it would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- the worker's side ---------------------------------------------------------------------------------------------


def _serve(path: Path, pipe: connection.Connection, threads: int) -> None:
    """Do jobs until the other end of *pipe* is closed."""
    torch.set_num_threads(threads)
    worker = Worker(lambda: unpack(path))
    while True:
        try:
            name, job = pipe.recv()
            pipe.send(worker.do(name, job))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


class Worker:
    """Does jobs of the task that *load* gives; it is loaded and opened at the first one."""

    def __init__(self, load: Callable[[], Task]) -> None:
        self._load = load
        self._work: Callable[[Any], Any] | None = None

    def do(self, name: str, job: Any) -> Any:
        """The result of *job*, or the `Failure` that it ended with."""
        try:
            if self._work is None:
                self._work = self._load().open()
            return self._work(job)
        except BitwrightError as e:
            return Failure(type(e), e.where, e.expected, e.found, e.remedy)
        except Exception as e:
            return Failure(
                JobError,
                f"job {name!r}",
                "a job that ends without an error",
                f"{type(e).__name__}: {e}",
                "Run it with --workers 1 to see where it comes from.",
                traceback.format_exc(),
            )


@dataclass(frozen=True)
class Failure:
    """An error on its way to another process. *trace*: where it arose, if it was not foreseen."""

    kind: type[BitwrightError]
    where: str
    expected: str
    found: str
    remedy: str
    trace: str = ""

    def error(self) -> BitwrightError:
        """The error as it was raised."""
        made = self.kind.__new__(self.kind)  # some kinds compose their parts from other arguments
        BitwrightError.__init__(
            made, self.where, expected=self.expected, found=self.found, remedy=self.remedy
        )
        if self.trace:
            made.add_note(self.trace)
        return made


def lost_worker(job: str, found: str, remedy: str) -> JobError:
    """The error of a worker that died over a job."""
    return JobError(
        f"job {job!r}", expected="a worker that lives until its job is done", found=found, remedy=remedy
    )


# --- tasks on their way --------------------------------------------------------------------------------------------


def pack(task: Task, file: Path | io.BytesIO) -> None:
    """Write *task* to *file*; storage that tensors share is in it once.

    *raises* `DataError` if a function in it cannot be imported by other processes.
    """
    try:
        torch.save(task, file)
    except (pickle.PicklingError, AttributeError, TypeError) as e:
        raise _not_importable(e) from e


def unpack(file: Path | io.BytesIO) -> Task:
    """Inverse of `pack`. Tensors in a path are mapped into memory, which all workers of a machine then share.

    *raises* `DataError`.
    """
    try:
        task: Task = torch.load(file, mmap=isinstance(file, Path), weights_only=False)
    except (pickle.UnpicklingError, AttributeError, ImportError) as e:
        raise _not_importable(e) from e
    return task


def _not_importable(error: Exception) -> DataError:
    return DataError(
        "--workers, --ray",
        expected="functions that other processes can import",
        found=f"{type(error).__name__}: {error}",
        remedy="Put the function into a module or file of its own, or search in one process.",
    )

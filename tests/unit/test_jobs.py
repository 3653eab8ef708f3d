"""Jobs: all of them done, once, wherever they run; and what happens when one fails, dies or is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tests.tasks import CannotOpen, Holds, Misbehaves, Powers, Sleeps

from bitwright.errors import BitwrightError, DataError, UnknownName
from bitwright.search.jobs import Processes, Runner, Serial, run_jobs
from bitwright.search.state import SearchState

ROOT = Path(__file__).parents[2]


def new_state(path: Path | None = None) -> SearchState:
    return SearchState(path, "key")


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Its worker processes, also those that are dead and were not waited for."""
    return [
        p
        for p in process.children(recursive=True)
        if p.status() == psutil.STATUS_ZOMBIE or "spawn_main" in " ".join(p.cmdline())
    ]


def own_workers() -> list[psutil.Process]:
    return workers_of(psutil.Process())


@pytest.mark.parametrize("runner", [Serial(), Processes(2)], ids=["serial", "processes"])
def test_every_job_is_done_once_and_the_task_is_opened_once_by_each_worker(
    runner: Runner, tmp_path: Path
) -> None:
    base = torch.tensor([1.0, 2.0, 3.0])
    seen: list[tuple[int, int, str]] = []

    found = run_jobs(
        Powers(base, str(tmp_path)),
        {f"to the {i}": i for i in range(12)},
        runner,
        state=new_state(),
        progress=lambda done, total, name: seen.append((done, total, name)),
    )

    assert list(found) == [f"to the {i}" for i in range(12)]
    assert [r[0] for r in found.values()] == [float((base**i).sum()) for i in range(12)]
    assert [s[:2] for s in seen] == [(i + 1, 12) for i in range(12)]
    assert {s[2] for s in seen} == set(found)
    assert {int(p.name) for p in tmp_path.iterdir()} == {r[1] for r in found.values()}
    assert own_workers() == []


def test_threads_are_shared_out_among_workers(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        found = run_jobs(
            Powers(torch.ones(1), str(tmp_path)), {"a": 1, "b": 2}, Processes(2), state=new_state()
        )
    finally:
        torch.set_num_threads(before)

    assert {r[2] for r in found.values()} == {3}


def test_a_long_job_does_not_hold_up_the_others() -> None:
    found = run_jobs(
        Sleeps(), {"long": 1.5, **{f"short {i}": 0.01 for i in range(8)}}, Processes(2), state=new_state()
    )
    workers = {name: r[1] for name, r in found.items()}

    assert sum(w == workers["long"] for w in workers.values()) <= 2


def test_what_the_state_holds_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    state = new_state(path)
    state.put("die", "not dead")
    seen: list[tuple[int, int, str]] = []

    found = run_jobs(
        Misbehaves(),
        {"die": "die", "live": "alive"},
        Processes(1),
        state=state,
        progress=lambda *s: seen.append(s),
    )

    assert found == {"die": "not dead", "live": "alive"}
    assert seen == [(2, 2, "live")]
    assert new_state(path).measured == found


def test_nothing_is_started_when_nothing_is_missing() -> None:
    state = new_state()
    state.put("a", 1)

    assert run_jobs(CannotOpen(), {"a": "x"}, Processes(2), state=state) == {"a": 1}
    assert run_jobs(CannotOpen(), {"a": "x"}, Serial(), state=state) == {"a": 1}


@pytest.mark.parametrize(("job", "code"), [("die", "it was ended by SIGKILL"), ("exit", "exit status 3")])
def test_a_worker_that_dies_is_an_error_that_names_its_job(job: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    jobs = {"fine": 1, "the deadly one": job}

    with pytest.raises(BitwrightError, match="job 'the deadly one'") as caught:
        run_jobs(Misbehaves(), jobs, Processes(1), state=new_state(path))

    assert code in caught.value.found
    assert new_state(path).measured == {"fine": 1}
    assert own_workers() == []


@pytest.mark.parametrize("runner", [Serial(), Processes(1)], ids=["serial", "processes"])
def test_our_own_errors_come_back_as_they_were(runner: Runner) -> None:
    with pytest.raises(DataError) as caught:
        run_jobs(Misbehaves(), {"a": "data"}, runner, state=new_state())
    with pytest.raises(UnknownName) as unknown:
        run_jobs(Misbehaves(), {"a": "unknown"}, runner, state=new_state())
    with pytest.raises(DataError, match="val/: expected pictures"):
        run_jobs(CannotOpen(), {"a": 0}, runner, state=new_state())

    assert str(caught.value) == "x.npy: expected numbers; found text. Look at it."
    assert "Did you mean 'bm1684'?" in str(unknown.value)


def test_an_error_that_nobody_foresaw_names_the_job_and_keeps_its_trace() -> None:
    with pytest.raises(BitwrightError) as caught:
        run_jobs(Misbehaves(), {"fine": 0, "conv1": "bug"}, Processes(1), state=new_state())

    assert str(caught.value).startswith(
        "job 'conv1': expected a job that ends without an error; found KeyError: 'missing'"
    )
    assert 'return {}["missing"]' in caught.value.__notes__[0]


@pytest.mark.parametrize("held", [lambda x: x, (i for i in "ab")], ids=["lambda", "generator"])
def test_a_task_that_cannot_be_sent_is_a_clear_error(held: object) -> None:
    with pytest.raises(DataError, match="functions that other processes can import"):
        run_jobs(Holds(held), {"a": 1}, Processes(1), state=new_state())

    assert own_workers() == []


def test_a_function_that_workers_cannot_import_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    here = type(sys)("a_module_of_this_process_alone")
    exec("def f(x): return x", vars(here))
    monkeypatch.setitem(sys.modules, here.__name__, here)

    with pytest.raises(DataError, match="a_module_of_this_process_alone"):
        run_jobs(Holds(here.f), {"a": 1}, Processes(1), state=new_state())


@pytest.mark.parametrize("workers", [0, -1])
def test_fewer_than_one_worker_is_refused(workers: int) -> None:
    with pytest.raises(DataError, match="--workers: expected at least 1"):
        Processes(workers)


def test_leaving_early_ends_the_workers_at_once() -> None:
    results = Processes(2).run(Sleeps(), {"short": 0.0, "hour": 3600.0})
    assert next(results)[0] == "short"
    began = time.monotonic()

    results.close()

    assert time.monotonic() - began < 3
    assert own_workers() == []


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.tasks import Sleeps
from bitwright.search.jobs import Processes, run_jobs
from bitwright.search.state import SearchState

if __name__ == "__main__":
    jobs = {{"first": 0.0, "second": 3600.0, "third": 3600.0}}
    run_jobs(Sleeps(), jobs, Processes(2), state=SearchState(Path({state!r}), "key"),
             progress=lambda *s: print("ready", flush=True))
"""


def _heed_ctrl_c() -> None:
    """In the new process: tests that run in the background inherit that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_everything_at_once_and_keeps_what_was_done(tmp_path: Path) -> None:
    state, script = tmp_path / "state.json", tmp_path / "search.py"
    script.write_text(SCRIPT.format(root=str(ROOT), state=str(state)))
    run = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    workers = workers_of(psutil.Process(run.pid))
    assert len(workers) == 2
    began = time.monotonic()

    os.killpg(run.pid, signal.SIGINT)  # as a terminal does it: to the whole group
    _, said = run.communicate(timeout=20)

    assert time.monotonic() - began < 5
    assert said.count("Traceback") == 1  # of the script itself, which does not catch it
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert not any(w.is_running() for w in workers)
    assert list(json.loads(state.read_text())["measured"]) == ["first"]


def test_ctrl_c_while_workers_start_ends_them_without_a_word_of_theirs(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(SCRIPT.format(root=str(ROOT), state=str(tmp_path / "state.json")))
    run = subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )
    parent = psutil.Process(run.pid)
    while len(workers := workers_of(parent)) < 2:
        time.sleep(0.01)

    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=20)

    assert said.count("Traceback") == 1
    assert not any(w.is_running() for w in workers)

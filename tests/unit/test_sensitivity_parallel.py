"""The sensitivity search on several processes, against the same search in one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.networks import Block, Residual, pictures, randomised, ready, solved, tokens
from tests.tasks import first_of
from torch import Tensor, nn

from bitwright.errors import DataError, UnknownName
from bitwright.search.evaluator import Evaluator
from bitwright.search.jobs import Processes, Results, Serial, Task
from bitwright.search.sensitivity import Sensitivity, measure_sensitivity
from bitwright.search.similarity import Similarity
from bitwright.search.state import SearchState

CASES = [(Residual, pictures, "generic-int8"), (Block, tokens, "onnxruntime")]


class _Attention(nn.Module):
    """torch's own attention: methods cannot be stacked in it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head((x + y).mean(1))


class _Counting:
    """Serial, but through the queue; remembers the jobs that were run, and gives up after *limit* of them."""

    def __init__(self, limit: int | None = None) -> None:
        self.ran: list[str] = []
        self.limit = limit

    def run(self, task: Task, jobs: Mapping[str, Any]) -> Results:
        for name, result in Serial().run(task, jobs):
            self.ran.append(name)
            yield name, result
            if len(self.ran) == self.limit:
                raise KeyboardInterrupt


def bench(module: type[nn.Module], data, target: str, similarity: Similarity | None = None):
    x = data()
    graph = ready(randomised(module()), x)
    solver, plan = solved(graph, x, target)
    name = graph.info.inputs[0].name

    def batches(size: int) -> Iterator[dict[str, Tensor]]:
        return ({name: x[i : i + size]} for i in range(0, len(x), size))

    evaluator = Evaluator(graph, batches, similarity)
    evaluator.chunk_samples = 5
    return evaluator, plan, solver.solve


def assert_agree(found: list[Sensitivity], expected: list[Sensitivity]) -> None:
    rows = {r.name: r for r in expected}
    assert {r.name for r in found} == set(rows)
    for row in found:
        other = rows[row.name]
        assert (row.kind, row.members, set(row.losses)) == (other.kind, other.members, set(other.losses))
        for method, loss in row.losses.items():
            # Losses are differences from 1: what float32 leaves of them.
            assert loss == pytest.approx(other.losses[method], rel=1e-3, abs=2e-7)


@pytest.mark.parametrize(("module", "data", "target"), CASES)
def test_losses_on_processes_are_those_of_the_serial_search(module, data, target) -> None:
    expected = measure_sensitivity(*bench(module, data, target))

    found = measure_sensitivity(*bench(module, data, target), runner=Processes(2))

    assert_agree(found, expected)


@pytest.mark.parametrize("module", [_Attention, Block])
def test_losses_through_the_queue_are_bit_equal_with_the_same_threads(module) -> None:
    case = bench(module, tokens, "generic-int8")

    found = measure_sensitivity(*case, runner=Serial())

    assert found == measure_sensitivity(*bench(module, tokens, "generic-int8"))


def test_a_post_processing_function_goes_along() -> None:
    similarity = Similarity(post_process=first_of)
    expected = measure_sensitivity(*bench(*CASES[0], similarity))

    found = measure_sensitivity(*bench(*CASES[0], similarity), runner=Processes(1))

    assert_agree(found, expected)


def test_a_post_processing_function_that_cannot_go_along_is_a_clear_error() -> None:
    similarity = Similarity(post_process=lambda outputs: outputs)

    with pytest.raises(DataError, match="functions that other processes can import"):
        measure_sensitivity(*bench(*CASES[0], similarity), runner=Processes(1))


@pytest.mark.parametrize("first", ["here", "there"])
def test_what_was_measured_here_is_not_measured_again_there_and_the_other_way_round(
    first: str, tmp_path: Path
) -> None:
    path = tmp_path / "state.json"
    case = bench(*CASES[0])
    whole = SearchState(None, "key")
    expected = measure_sensitivity(*case, state=whole)
    runner = _Counting(limit=4) if first == "there" else None
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(
            *case, state=SearchState(path, "key"), runner=runner, progress=None if runner else interrupt_at(4)
        )
    kept = json.loads(path.read_text())["measured"]
    assert len(kept) == 4

    rest = _Counting()
    state = SearchState(path, "key")
    found = measure_sensitivity(*case, state=state, runner=rest if first == "here" else None)

    assert found == expected
    assert state.measured.keys() == whole.measured.keys()
    if first == "here":
        assert sorted(rest.ran) == sorted(whole.measured.keys() - kept.keys())


def interrupt_at(limit: int):
    def progress(done: int, total: int, group: str) -> None:
        if done == limit:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("runner", [None, Serial()], ids=["here", "there"])
def test_only_the_groups_asked_for_are_measured(runner) -> None:
    evaluator, plan, solve = bench(*CASES[0])
    some = list(plan.groups)[1:3]
    expected = [r for r in measure_sensitivity(evaluator, plan, solve) if r.name in some]
    state = SearchState(None, "")
    seen: list[tuple[int, int, str]] = []

    found = measure_sensitivity(
        evaluator,
        plan,
        solve,
        groups=some,
        runner=runner,
        state=state,
        progress=lambda *s: seen.append(s),
    )

    assert found == expected
    assert {name.partition(":")[2] for name in state.measured} == set(some)
    assert [s[:2] for s in seen] == [(i + 1, len(seen)) for i in range(len(seen))]
    assert {s[2] for s in seen} == set(some)


@pytest.mark.parametrize("runner", [None, Serial()], ids=["here", "there"])
def test_no_groups_no_work(runner) -> None:
    evaluator, plan, solve = bench(*CASES[0])

    assert measure_sensitivity(evaluator, plan, solve, groups=[], runner=runner) == []


def test_a_group_that_is_not_there_is_named() -> None:
    with pytest.raises(UnknownName, match="conv9"):
        measure_sensitivity(*bench(*CASES[0]), groups=["conv9"])


def test_work_is_counted_wherever_it_is_done() -> None:
    here, there = bench(*CASES[0]), bench(*CASES[0])

    measure_sensitivity(*here)
    measure_sensitivity(*there, runner=Serial())

    assert there[0].effort.forward_passes == pytest.approx(here[0].effort.forward_passes)


def test_a_worker_is_not_sent_more_than_the_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Chunks that are views on a large store of samples go along without the store."""
    evaluator, plan, solve = bench(*CASES[0])
    name = evaluator.graph.info.inputs[0].name
    store = torch.cat([pictures(), torch.zeros(50_000, 3, 8, 8)])
    evaluator._batches = lambda size: iter([{name: store[:4]}])
    sent: list[Task] = []

    class _Keeps(_Counting):
        def run(self, task: Task, jobs: Mapping[str, Any]) -> Results:
            sent.append(task)
            return super().run(task, jobs)

    measure_sensitivity(evaluator, plan, solve, runner=_Keeps())
    path = tmp_path / "task.pt"
    torch.save(sent[0], path)

    assert path.stat().st_size < 2**20

"""Joint effects: what costs nothing alone and everything beside a widened operator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tests.networks import Residual, bench, pictures, randomised
from torch import Tensor, nn

from bitwright.flow.settings import Settings
from bitwright.flow.tune import Tuned, tune
from bitwright.plan.plan import Plan
from bitwright.search.choose import Choice, Tried
from bitwright.search.neighbours import neighbours, with_neighbours


class _Masked(nn.Module):
    """A softmax over masked scores: in 8-bit codes of ±10,000 all scores are 0, and so is the maximum that is subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.head = nn.Linear(16, 12), nn.Linear(12, 5)
        self.register_buffer("mask", torch.where(torch.arange(12) < 8, 0.0, -10_000.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.softmax(self.scores(x) + self.mask, -1))


def tuned(folder: Path, **settings: object) -> Tuned:
    torch.manual_seed(0)
    module = _Masked().eval()
    with torch.no_grad():
        module.scores.weight.mul_(8)
    data = list(torch.randn(40, 16).split(1))
    asked = Settings(target="journey6", expected_cos=0.985, inference_num=16, max_float_ops=4, **settings)  # type: ignore[arg-type]
    return tune(module, data, output=folder, settings=asked, example_inputs=torch.randn(2, 16))


def test_the_maximum_of_masked_scores_is_widened_beside_what_reads_it(tmp_path: Path) -> None:
    """Alone it loses nothing: a softmax does not see what is subtracted from all. Beside a float difference the table of exp saturates."""
    found = tuned(tmp_path)

    alone = {r.kind: r.loss for r in found.rows}
    assert alone["ReduceMax"] < 1e-6 < alone["Sub"]
    assert found.reached
    assert {found.bench.graph.op(name).kind for name in found.choice.float_groups} >= {"ReduceMax", "Sub"}
    why = {e.why for e in found.choice.plan.ops.values() if e.precision == "float"}
    assert any(w.startswith("beside widened operators") for w in why)


def test_what_is_int16_on_every_target_does_not_use_up_the_budget(tmp_path: Path) -> None:
    """Inner operators of softmax once cost as much as the search may spend, so that nothing at all was tried."""
    found = tuned(tmp_path, precisions=("int8", "int16"))

    assert found.reached
    assert set(found.choice.groups.values()) == {"int16"}


def test_neighbours_share_a_value() -> None:
    evaluator, _, plan = bench(randomised(Residual()), pictures())
    found = neighbours(evaluator.graph, plan, ["depthwise"])
    assert {"conv1", "project"} <= set(found)
    assert not {"depthwise", "fc"} & set(found)


class _Runs:
    """True runs by a table: similarity by the groups that are float."""

    def __init__(self, similarities: dict[frozenset[str], float]) -> None:
        self.similarities, self.rounds = similarities, 0

    def __call__(self, plans: Mapping[str, Plan]) -> dict[str, float]:
        self.rounds += 1
        return {name: self._of(plan) for name, plan in plans.items()}

    def _of(self, plan: Plan) -> float:
        return self.similarities.get(frozenset(g for g in plan.groups if plan.precision(g) == "float"), 0.5)


def grown(similarities: dict[tuple[str, ...], float], *, target: float, limit: float) -> tuple[Choice, int]:
    """What becomes of a choice that left `depthwise` float and has the similarity 0.9."""
    evaluator, solver, plan = bench(randomised(Residual()), pictures())
    first = solver.solve(plan.with_precision(["depthwise"], "float", ""))
    choice = Choice(
        first, 0.9, {"depthwise": "float"}, (Tried(first, {"depthwise": "float"}, 0.9, cost=1.0),)
    )
    runs = _Runs({frozenset(k): v for k, v in similarities.items()})
    found = with_neighbours(
        evaluator.graph,
        choice,
        plan,
        solver.solve,
        dict.fromkeys(plan.groups, ("int8", "float")),
        runs,
        target=target,
        limit=limit,
        cost=lambda groups: float(len(groups)),
    )
    return found, runs.rounds


def test_the_best_neighbour_is_kept_and_its_neighbours_are_tried_next() -> None:
    known = {
        ("depthwise", "project"): 0.95,
        ("depthwise", "project", "conv1"): 0.99,
        ("depthwise", "conv1"): 0.94,
    }
    found, rounds = grown(known, target=0.98, limit=5)
    assert list(found.groups) == ["depthwise", "project", "conv1"]
    assert (found.similarity, rounds) == (0.99, 2)
    assert [t.similarity for t in found.tried] == [0.9, 0.95, 0.99]


def test_the_limit_is_kept() -> None:
    found, rounds = grown({("depthwise", "project"): 0.95}, target=0.98, limit=1)
    assert (list(found.groups), rounds) == (["depthwise"], 0)


def test_a_small_gain_is_not_worth_an_operator_unless_it_reaches_the_target() -> None:
    """A run that met the target by a hair was thrown away, and the job said that it was missed."""
    known = {("depthwise", "project"): 0.901}
    assert list(grown(known, target=0.98, limit=5)[0].groups) == ["depthwise"]
    assert list(grown(known, target=0.9005, limit=5)[0].groups) == ["depthwise", "project"]

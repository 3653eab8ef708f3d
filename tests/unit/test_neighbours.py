"""Joint effects: what costs nothing alone and everything beside a widened operator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.networks import Residual, bench, pictures, randomised
from torch import Tensor, nn

from bitwright.flow.settings import Settings
from bitwright.flow.tune import Tuned, tune
from bitwright.search.choose import unchanged
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


@pytest.mark.parametrize("limit", [0, 8])
def test_nothing_is_tried_beside_nothing(limit: int) -> None:
    evaluator, solver, plan = bench(randomised(Residual()), pictures())
    choice = unchanged(plan, 0.5)
    options = dict.fromkeys(plan.groups, ("int8", "float"))
    assert with_neighbours(evaluator, choice, plan, solver.solve, options, target=1.0, limit=limit) == choice  # type: ignore[arg-type]

"""The sketch of look-up tables: exact where the network behind the tables is linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.networks import bench, randomised, tokens
from torch import Tensor, nn

from bitwright.search.losses import LOSSES
from bitwright.search.similarity import Similarity
from bitwright.search.table_sketch import TableSketch

MSE = Similarity(loss=LOSSES.get("mse", where=""))


class _TwoFunctions(nn.Module):
    """Two elementary functions beside each other, linear behind them; *f* and *g* stand for their tables."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(
        self, x: Tensor, f: Callable[[Tensor], Tensor] = torch.tanh, g: Callable[[Tensor], Tensor] = torch.exp
    ) -> Tensor:
        y = self.before(x)
        return self.after((f(y) + 0.5 * g(y)).mean(1))


def coarse_tanh(x: Tensor) -> Tensor:
    return (torch.tanh(x) * 8).round() / 8


def coarse_exp(x: Tensor) -> Tensor:
    return (torch.exp(x) * 4).floor() / 4


def test_behind_tables_that_only_linear_operators_read_every_combination_is_exact() -> None:
    model, x = randomised(_TwoFunctions()), tokens()
    evaluator, _, _ = bench(model, x, similarity=MSE)
    tanh, exp = (next(op.name for op in evaluator.graph.ops if op.kind == k) for k in ("Tanh", "Exp"))
    sketch = TableSketch(evaluator, {}, {tanh: coarse_tanh, exp: coarse_exp}, probes=5)
    seen = []
    sketch.measure(seen.append)

    def lost(y: Tensor) -> float:
        with torch.no_grad():
            clean = model(x)
        return float(evaluator.similarity.losses({"o": clean}, {"o": y})[0].mean())

    with torch.no_grad():
        truth = {
            (tanh,): lost(model(x, f=coarse_tanh)),
            (exp,): lost(model(x, g=coarse_exp)),
            (tanh, exp): lost(model(x, coarse_tanh, coarse_exp)),
        }
    for ops, loss in truth.items():
        assert sketch.loss(ops).loss == pytest.approx(loss, rel=1e-3), ops
        assert sketch.loss(ops).error == 0.0
    assert sketch.loss(()).loss == 0.0
    assert sum(seen) == len(x)

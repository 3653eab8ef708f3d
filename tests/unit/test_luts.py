"""`run_luts`: what it says of tables where the error sketch knows nothing."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from bitwright.cli.luts import verdict
from bitwright.flow.luts import run_luts
from bitwright.flow.settings import Settings
from bitwright.numerics.lut import TableSettings


class _RootOfZero(nn.Module):
    """A square root that reads zeros behind the softmax: infinity there, times the product's zero, is no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(torch.softmax(3 * self.before(x), -1) - 0.25)
        return torch.sqrt(y * y)


def test_a_table_before_the_root_of_zero_is_measured_and_not_acquitted_unheard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = [torch.randn(1, 8) for _ in range(16)]
    found = run_luts(
        _RootOfZero().eval(),
        samples,
        output=tmp_path,
        settings=Settings(target="journey6"),
        table_settings=TableSettings(strategy="evenly", num_tables=1),
        example_inputs=samples[0],
    )
    (exp,) = (row for row in found.rows if row.kind == "Exp")

    assert exp.largest > 1
    assert exp.loss > 0
    assert all(math.isfinite(row.standard_error) for row in found.rows)


def test_where_quantization_costs_more_than_the_tables_the_verdict_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = [torch.randn(1, 8) * (100 if i == 0 else 1) for i in range(16)]
    network = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 4)).eval()
    found = run_luts(
        network, samples, output=tmp_path, settings=Settings(target="journey6"), example_inputs=samples[0]
    )

    assert not found.to_blame
    assert "Quantization costs 0." in verdict(found)
    assert "try bitwright tune" in verdict(found)

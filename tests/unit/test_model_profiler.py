"""`ModelProfiler`: statistics of modules while a network runs."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitwright.analysis import ModelProfiler
from bitwright.errors import ModelError, OutputError
from bitwright.quantization import (
    FakeQuantState,
    default_calibration_qconfig_setter,
    prepare,
    set_fake_quantize,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_statistics_are_those_of_all_calls_together(tmp_path: Path) -> None:
    model, batches = network(), [torch.randn(5, 4), 3 * torch.randn(7, 4)]
    with ModelProfiler(model, tmp_path) as profiler, torch.no_grad():
        for x in batches:
            model(x)
    model(100 * batches[0])  # outside: not seen
    profiler.get_info_manager().table()
    rows = {(r["Mod Name"], r["Attr"]): r for r in csv.DictReader((tmp_path / "statistic.csv").open())}

    x = torch.cat(batches)
    y = model[0](x).relu().detach()
    weight = model[2].weight.detach()
    for key, expected in ((("0", "input"), x), (("1", "output"), y), (("2", "weight"), weight)):
        assert float(rows[key]["Min"]) == pytest.approx(float(expected.min()), abs=1e-5)
        assert float(rows[key]["Max"]) == pytest.approx(float(expected.max()), abs=1e-5)
        assert float(rows[key]["Mean"]) == pytest.approx(float(expected.mean()), abs=1e-5)
        assert float(rows[key]["Var"]) == pytest.approx(float(expected.var(correction=0)), rel=1e-3, abs=1e-5)
    assert "Mod Name" in (tmp_path / "statistic.txt").read_text()


def test_prepared_models_tell_their_scales(tmp_path: Path) -> None:
    x = torch.randn(16, 4)
    model = prepare(network(), x, default_calibration_qconfig_setter).eval()
    set_fake_quantize(model, FakeQuantState.CALIBRATION)
    with ModelProfiler(model, tmp_path) as profiler:
        model(x)
    rows = profiler.get_info_manager.table(types=["Linear"]).rows

    scales = {r["Mod Name"]: r["Scale"] for r in rows if r["Attr"] == "output"}
    assert scales["2"] == pytest.approx(model.get_submodule("2.activation_post_process").qparams().scale[0])
    assert {r["Op Name"] for r in rows} == {"Linear"}


class Twice(nn.Module):
    """Calls one linear layer twice, and another between."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.between = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.between(self.shared(x)))  # type: ignore[no-any-return]


def test_rows_stand_in_the_order_of_first_execution() -> None:
    with ModelProfiler(Twice()) as profiler:
        profiler.model(torch.randn(2, 3))
        profiler.model(torch.randn(2, 3))

    rows = profiler.get_info_manager.table().rows
    attributes = ("input", "output", "weight", "bias")
    assert [(r["Mod Name"], r["Attr"]) for r in rows] == [
        (name, attribute) for name in ("shared", "between") for attribute in attributes
    ]
    assert [r["Index"] for r in rows] == list(range(8))


@pytest.mark.parametrize("where", [0, 1])
def test_nan_shows(where: int) -> None:
    """In one batch of two, first or last: Python's min, max and 0 would hide it."""
    batches = [torch.randn(2, 4), torch.randn(2, 4)]
    batches[where][0, 0] = math.nan
    with ModelProfiler(nn.Sequential(nn.ReLU())) as profiler:
        for x in batches:
            profiler.model(x)

    for row in profiler.get_info_manager.table().rows:
        assert all(math.isnan(row[key]) for key in ("Min", "Max", "Mean", "Var")), row["Attr"]


def test_nothing_is_written_unless_a_folder_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ModelProfiler(network()) as profiler:
        profiler.model(torch.randn(2, 4))
    table = profiler.get_info_manager.table()

    assert list(tmp_path.iterdir()) == []
    assert profiler.get_info_manager.table("new/folder").rows == table.rows
    assert {f.name for f in (tmp_path / "new" / "folder").iterdir()} == {"statistic.txt", "statistic.csv"}


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with ModelProfiler(network(), tmp_path / "file" / "out") as profiler:
        profiler.model(torch.randn(2, 4))

    with pytest.raises(OutputError, match="a place that can be written to"):
        profiler.get_info_manager.table()


def test_misuse_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"an nn\.Module"):
        ModelProfiler("model")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="inside the with statement"):
        ModelProfiler(network(), tmp_path).get_info_manager.table()

"""`ModelProfiler`: statistics of modules while a network runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from bitwright.analysis import ModelProfiler
from bitwright.errors import ModelError
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


def test_misuse_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"an nn\.Module"):
        ModelProfiler("model")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="inside the with statement"):
        ModelProfiler(network(), tmp_path).get_info_manager.table()

"""`check_qat_model`: its five tables, each with what it is there to show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.qat_cases import everywhere
from torch import Tensor, nn

from bitwright import ModuleNameQconfigSetter, PreparedModel, check_qat_model, get_default_qconfig, prepare
from bitwright.train.states import FakeQuantState

pytestmark = pytest.mark.usefixtures("one_thread")


class _Odd(nn.Module):
    """A normalisation that nothing can fuse, a block that runs twice, one that never runs, and a float head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.unused, self.wide, self.head = nn.Linear(2, 2), nn.Conv2d(3, 3, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(torch.sigmoid(x)))
        x = self.conv(torch.relu(self.conv(x)))
        return self.head(self.wide(x).mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> PreparedModel:
    torch.manual_seed(0)
    wide = get_default_qconfig(activation_qkwargs={"dtype": "int16"})
    fixed = get_default_qconfig(activation_observer="fixed_scale", activation_qkwargs={"scale": 1 / 128})
    slow = get_default_qconfig(weight_observer="mse", activation_qkwargs={"averaging_constant": 0.5})
    named = ModuleNameQconfigSetter({"wide": wide, "conv": fixed, "head": None})
    return prepare(_Odd().eval(), torch.zeros(2, 3, 8, 8), [named, everywhere(slow)])


def rows(tables: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    return list(tables[key].rows)


def test_the_tables_have_the_titles_and_columns_that_users_know(model: PreparedModel) -> None:
    tables = check_qat_model(model, verbose=False)

    assert {t.title: [c.title for c in t.columns] for t in tables.values()} == {
        "Fusable modules are listed below:": ["name", "type"],
        "Each module called times:": ["name", "called times"],
        "Each layer out qconfig:": ["Module Name", "Module Type", "Input dtype", "out dtype", "ch_axis", "observer"],
        "Weight qconfig:": ["Module Name", "Module Type", "weight dtype", "ch_axis", "observer"],
        "Please check if these OPs qconfigs are expected..": ["Module Name", "Module Type", "Msg"],
    }  # fmt: skip


def test_what_is_not_fused_and_what_does_not_run_once_is_listed(model: PreparedModel) -> None:
    tables = check_qat_model(model, verbose=False)

    assert [(r["name"], r["type"]) for r in rows(tables, "fusable")] == [("norm", "BatchNorm")]
    assert {r["name"]: r["times"] for r in rows(tables, "called_times")} == {"conv": 2, "unused": 0}


def test_formats_of_outputs_and_weights_are_listed(model: PreparedModel) -> None:
    tables = check_qat_model(model, verbose=False)

    outputs = {r["name"]: (r["input"], r["out"], r["observer"]) for r in rows(tables, "output_qconfig")}
    assert outputs["wide"] == ("int8", "int16", "MinMax")
    assert outputs["conv._call_1"] == ("int8", "int8", "FixedScale")
    assert outputs["head"][1] is None
    weights = {
        r["name"]: (r["type"], r["dtype"], r["axis"], r["observer"]) for r in rows(tables, "weight_qconfig")
    }
    assert weights == {"conv": ("Conv", "int8", 0, "MinMax"), "wide": ("Conv", "int8", 0, "MinMax")}


def test_what_looks_odd_is_said_of_the_operator(model: PreparedModel) -> None:
    found = [(r["name"], r["message"]) for r in rows(check_qat_model(model, verbose=False), "please_check")]

    assert ("wide", "input dtype [int8] is not same with out dtype int16") in found
    assert ("conv._call_1", "Fixed scale 0.00781") in found
    assert ("head", "float: asked for") in found
    assert any(message == "averaging_constant 0.5" for _, message in found)
    assert any(name == "head" and message.endswith("is not quantized") for name, message in found)


def test_a_plain_model_has_nothing_odd_but_what_it_is() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    tables = check_qat_model(prepare(module, torch.zeros(2, 3)), verbose=False)

    assert [len(rows(tables, key)) for key in ("fusable", "called_times", "please_check")] == [0, 0, 0]
    assert [len(rows(tables, key)) for key in ("output_qconfig", "weight_qconfig")] == [3, 2]


def test_the_result_is_written_and_printed(
    model: PreparedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = check_qat_model(model, torch.zeros(1, 3, 8, 8), tmp_path)

    written = (tmp_path / "model_check_result.txt").read_text()
    assert capsys.readouterr().out == written
    assert all(t.title in written for t in tables.values())
    assert sorted(p.stem for p in tmp_path.glob("*.csv")) == sorted(tables)
    assert "conv,2" in (tmp_path / "called_times.csv").read_text()


def test_running_the_example_leaves_states_and_ranges_alone(model: PreparedModel) -> None:
    model.train()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    check_qat_model(model, torch.ones(1, 3, 8, 8), verbose=False)

    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert model.training
    assert {q.state for _, q in model.quantizers} == {FakeQuantState.QAT}

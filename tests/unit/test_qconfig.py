"""Who gets which wish: attributes, setters, names, sensitivity tables; and what the report says of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.qat_cases import calibrate, of_kind, pixels, plain, prepared, small, train
from torch import nn

from bitwright import (
    ModuleNameQconfigSetter,
    PreparedModel,
    QConfig,
    calibration_8bit_weight_16bit_act_qconfig_setter,
    default_qat_qconfig_setter,
    get_default_qconfig,
    prepare,
    qat_4bit_weight_8bit_act_qconfig_setter,
    qat_8bit_weight_16bit_act_qconfig_setter,
    sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter,
)
from bitwright.errors import PlanError, UnknownName
from bitwright.plan.setters import sensitive_names
from bitwright.table import Column, Table

pytestmark = pytest.mark.usefixtures("one_thread")

INT8 = get_default_qconfig()
INT16 = get_default_qconfig(activation_qkwargs={"dtype": "int16"})
INT4 = get_default_qconfig(weight_qkwargs={"dtype": "qint4"})


def got(model: PreparedModel, *names: str) -> list[str]:
    """The precisions of operators *names*."""
    rows = {row["name"]: row for row in model.report.rows}
    return [rows[name]["precision"] for name in names]


def rule(model: PreparedModel, name: str) -> str:
    """Whose wish operator *name* got."""
    return str(next(row["rule"] for row in model.report.rows if row["name"] == name))


def formats(model: PreparedModel, *, weights: bool) -> set[str]:
    return {q.spec.dtype.name for _, q in model.quantizers if q.is_weight is weights}


# --- priority ----------------------------------------------------------------------------------------------------


def test_without_any_wish_everything_gets_the_default_for_training() -> None:
    model = prepare(small(), pixels(2))

    assert {row["rule"] for row in model.report.rows} == {"default_qat"}
    assert {row["precision"] for row in model.report.rows} == {"int8"}


class Nested(nn.Module):
    """Layers in a body, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 6)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))  # type: ignore[no-any-return]


def nested(**qconfigs: QConfig | None) -> nn.Module:
    """A `Nested` with `qconfig` attributes; `root` is the network, `body_0` the first layer of the body."""
    model = Nested()
    for name, qconfig in qconfigs.items():
        path = "" if name == "root" else name.replace("_", ".")
        model.get_submodule(path).qconfig = qconfig  # type: ignore[assignment]
    return model


def test_attributes_without_a_setter_leave_the_rest_float() -> None:
    model = prepare(nested(body=INT8), torch.randn(2, 6))

    assert got(model, "body.0", "body.1", "body.2", "head") == ["int8", "int8", "int8", "float"]
    assert rule(model, "head") == "no setter and no qconfig attribute"


def test_the_innermost_attribute_counts_and_beats_every_setter() -> None:
    model = prepare(nested(root=INT16, body=INT8, body_1=None), torch.randn(2, 6), default_qat_qconfig_setter)

    assert got(model, "body.0", "body.1", "body.2", "head") == ["int8", "float", "int8", "int16"]
    assert [rule(model, n) for n in ("body.0", "body.1", "head")] == [
        "body.qconfig",
        "body.1.qconfig",
        "model.qconfig",
    ]


def test_the_first_setter_with_an_opinion_counts() -> None:
    setters = [
        ModuleNameQconfigSetter({"body.1": None}),
        ModuleNameQconfigSetter({"body": INT16}),
        of_kind("lsq"),
    ]
    model = prepare(nested(), torch.randn(2, 6), setters)

    assert got(model, "body.0", "body.1", "body.2", "head") == ["int16", "float", "int16", "int8"]
    assert [rule(model, n) for n in ("body.1", "head")] == ["by module name", "everywhere"]


def test_none_keeps_a_part_float_with_its_values_unquantized() -> None:
    model = prepare(nested(body=None), torch.randn(2, 6), default_qat_qconfig_setter)
    inside = [path for path, _ in model.quantizers if path.startswith(("body", "_inputs"))]

    assert got(model, "body.0", "body.1", "body.2", "head") == ["float", "float", "float", "int8"]
    assert inside == ["body.2.activation_post_process"]  # what the part gives away is read as codes


def test_of_names_the_longest_counts_and_the_empty_one_fits_all() -> None:
    setter = ModuleNameQconfigSetter({"": INT8, "body": INT16, "body.1": None, "_generated_tanh_0": INT16})
    model = prepare(nested(), torch.randn(2, 6), setter)

    assert got(model, "body.0", "body.1", "head", "_generated_tanh_0") == ["int16", "float", "int8", "int16"]


# --- names that match nothing --------------------------------------------------------------------------------------


def test_a_name_that_matches_nothing_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"found 'heads'\. Did you mean 'head'\?"):
        prepare(nested(), torch.randn(2, 6), ModuleNameQconfigSetter({"body": INT8, "heads": INT8}))


def test_a_folded_batch_normalisation_has_no_wish_of_its_own() -> None:
    with pytest.raises(PlanError, match=r"computes as part of 'conv2'\. Name 'conv2' instead"):
        prepare(small(), pixels(2), [ModuleNameQconfigSetter({"bn2": None}), default_qat_qconfig_setter])


def test_an_attribute_that_is_no_qconfig_is_refused() -> None:
    model = nested()
    model.get_submodule("body").qconfig = "int8"  # type: ignore[assignment]

    with pytest.raises(PlanError, match=r"body\.qconfig: expected a bitwright QConfig .*found builtins\.str"):
        prepare(model, torch.randn(2, 6))


def test_a_qconfig_in_place_of_a_setter_says_how_to_write_it() -> None:
    with pytest.raises(PlanError, match=r"found QConfig.*ModuleNameQconfigSetter\(\{\"\": qconfig\}\)"):
        prepare(small(), pixels(2), INT8)  # type: ignore[arg-type]


BAD: list[tuple[QConfig, type[Exception], str]] = [
    (get_default_qconfig("lqs"), UnknownName, "Did you mean 'lsq'"),
    (get_default_qconfig(activation_observer="minmax"), UnknownName, "Did you mean 'min_max'"),
    (get_default_qconfig(activation_qkwargs={"percentil": 99.0}), UnknownName, "averaging_constant"),
    (get_default_qconfig(activation_qkwargs={"dtype": "int7"}), PlanError, "qint16; found 'int7'"),
    (get_default_qconfig(weight_qkwargs={"dtype": "int16"}), PlanError, "weights of int16"),
]


@pytest.mark.parametrize("qconfig, error, text", BAD)
def test_wrong_words_in_a_qconfig_are_explained(qconfig: QConfig, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        prepare(plain(), torch.randn(2, 6), ModuleNameQconfigSetter({"": qconfig}))


# --- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setter, weights, activations",
    [
        (default_qat_qconfig_setter, "int8", "int8"),
        (qat_8bit_weight_16bit_act_qconfig_setter, "int8", "int16"),
        (calibration_8bit_weight_16bit_act_qconfig_setter, "int8", "int16"),
        (qat_4bit_weight_8bit_act_qconfig_setter, "int4", "int8"),
    ],
)
def test_the_ready_made_setters_give_their_formats(setter: Any, weights: str, activations: str) -> None:
    model = prepare(small(), pixels(2), setter)

    assert formats(model, weights=True) == {weights}
    assert formats(model, weights=False) == {activations}


@pytest.mark.parametrize("dtype, error", [("int4", 0.5), ("int8", 0.05), ("int16", 0.02)])
def test_more_bits_come_nearer_to_the_float_network(dtype: str, error: float) -> None:
    wish = {"weight": "int4"} if dtype == "int4" else {"activation": dtype}
    model = calibrate(prepare(small(), pixels(2), of_kind("fake_quant", **wish)), pixels())
    expected = small()(pixels()).detach()

    assert float((model(pixels()).detach() - expected).norm() / expected.norm()) < error


def test_a_power_of_two_is_asked_for_by_the_qconfig() -> None:
    options = {"power_of_two": True}
    wish = get_default_qconfig(activation_qkwargs=options, weight_qkwargs=options)
    model = prepare(plain(), torch.randn(2, 6), ModuleNameQconfigSetter({"": wish}))
    calibrate(model, torch.randn(8, 6))
    logarithms = torch.cat([q.step().log2() for _, q in model.quantizers])

    assert torch.equal(logarithms, logarithms.round())


# --- what is refused, and the report -----------------------------------------------------------------------------


def test_a_wish_that_the_target_refuses_warns_and_is_in_the_report() -> None:
    with pytest.warns(
        UserWarning, match=r"did not get what was asked for \(conv1: bm1684x does not allow int16 Conv"
    ):
        model = prepare(small(), pixels(2), qat_8bit_weight_16bit_act_qconfig_setter, target="bm1684x")
    row = model.report.rows[0]

    assert (row["asked"], row["precision"]) == ("int16", "float")
    assert row["why"] == "bm1684x does not allow int16 Conv (allowed: int8, float)"


def test_int4_weights_that_the_target_does_not_have_become_int8_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="journey6 has no int4 weights"):
        model = prepare(small(), pixels(2), qat_4bit_weight_8bit_act_qconfig_setter, target="journey6")

    assert formats(model, weights=True) == {"int8"}


def test_an_operator_that_is_widened_by_its_group_says_by_whom() -> None:
    setter = [ModuleNameQconfigSetter({"relu": INT16}), default_qat_qconfig_setter]
    row = next(r for r in prepare(small(), pixels(2), setter).report.rows if r["name"] == "conv1")

    assert (row["asked"], row["precision"]) == ("int8", "int16")
    assert row["why"] == "computed in one with relu, which is int16"


def test_the_report_names_the_quantizers_and_options_of_each_operator() -> None:
    wish = get_default_qconfig("pact", "lsq", "clip", "mse", {"high": 6.0}, {"stride": 2})
    model = prepare(small(), pixels(2), ModuleNameQconfigSetter({"": wish}))
    rows = {row["name"]: row for row in model.report.rows}

    assert rows["head"]["activation"] == "pact, clip (high=6.0)"
    assert rows["head"]["weight"] == "lsq, mse (averaging_constant=1.0, stride=2)"
    assert rows["pool"]["weight"] is None
    assert "What each operator got" in str(model.report)


def test_the_report_is_printed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model = prepare(plain(), torch.randn(2, 6), verbose=True)

    assert capsys.readouterr().out == f"{model.report}\n"


# --- sensitivity tables ------------------------------------------------------------------------------------------

NAMES = ["conv2", "head", "conv1"]


@dataclass(frozen=True)
class Row:
    name: str
    loss: float


def in_file(folder: Path) -> Path:
    path = folder / "sensitivity.csv"
    path.write_text("rank,name,loss\n1,conv2,0.3\n2,head,0.2\n3,conv1,0.1\n")
    return path


TABLES: dict[str, Any] = {
    "names": NAMES,
    "rows that begin with a name": [[name, "Conv", 0.1] for name in NAMES],
    "dictionaries": [{"name": name, "loss": 0.1} for name in NAMES],
    "objects": [Row(name, 0.1) for name in NAMES],
    "a table": Table("", (Column("name", "operator"),), tuple({"name": name} for name in NAMES)),
}


@pytest.mark.parametrize("form", TABLES)
def test_the_most_sensitive_operators_are_read_from_every_form_of_table(form: str) -> None:
    assert sensitive_names(TABLES[form], topk=2) == ["conv2", "head"]


def test_the_most_sensitive_operators_are_read_from_a_file(tmp_path: Path) -> None:
    path = in_file(tmp_path)

    assert sensitive_names(path, topk=1) == sensitive_names(str(path), topk=1) == ["conv2"]
    assert sensitive_names([path, str(path)], topk=2) == ["conv2", "head"]


@pytest.mark.parametrize("ratio, count", [(0.0, 0), (0.1, 1), (0.34, 2), (1.0, 3)])
def test_a_ratio_is_rounded_up(ratio: float, count: int) -> None:
    assert sensitive_names(NAMES, ratio=ratio) == NAMES[:count]


def test_several_tables_give_the_union() -> None:
    tables = [[["conv1", 0.3], ["head", 0.1]], [["conv2", 0.2], ["conv1", 0.1]]]

    assert sensitive_names(tables, topk=1) == ["conv1", "conv2"]


def test_sensitive_operators_get_int16_and_the_others_int8() -> None:
    setter = sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter(NAMES, topk=1)
    model = prepare(small(), pixels(2), setter)

    assert got(model, "conv1", "conv2", "head") == ["int8", "int16", "int8"]
    assert rule(model, "head") == "sensitive_op_qat"
    assert train(model, pixels(), 3)[-1] < 1e9


def test_a_table_of_another_network_is_an_error() -> None:
    setter = sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter(["layer1.conv1", "conv1"], topk=2)

    with pytest.raises(UnknownName, match=r"sensitive_op_qat.*found 'layer1\.conv1'"):
        prepare(small(), pixels(2), setter)


@pytest.mark.parametrize(
    "options", [{}, {"topk": 1, "ratio": 0.5}, {"topk": -1}, {"ratio": 1.5}, {"ratio": -0.1}]
)
def test_how_many_operators_is_said_in_one_way(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="topk"):
        sensitive_names(NAMES, **options)


@pytest.mark.parametrize("table", [None, 3, [1, 2], [[]], "no_such.csv", {"conv1": 0.3}])
def test_what_is_no_sensitivity_table_is_refused(table: Any) -> None:
    with pytest.raises(PlanError, match="sensitivity table"):
        sensitive_names(table, topk=1)


def test_a_file_without_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("operator,loss\nconv1,0.3\n")

    with pytest.raises(PlanError, match="without a column 'name'"):
        sensitive_names(path, topk=1)


def test_the_models_of_the_other_tests_are_copies() -> None:
    prepared().get_parameter("head.weight").data.zero_()

    assert bool(prepared().get_parameter("head.weight").any())

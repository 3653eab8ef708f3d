"""Operators looked up in tables: every kind of function, in graphs, plans and prepared models; and back to float."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.networks import Block, calibrated, randomised, tokens
from torch import Tensor, nn

import bitwright as bw
from bitwright.calibrate.solve import Solver
from bitwright.calibrate.statistics import Statistics, ValueStatistics
from bitwright.errors import BitwrightError, ModelError, NumericsError, PlanError, UnknownName
from bitwright.flow.bench import prepared
from bitwright.flow.tables import build_tables, code_weights, error_on_data
from bitwright.graph.graph import Graph
from bitwright.graph.replay import Replay
from bitwright.importers.from_torch import capture
from bitwright.nn import SegmentLUT
from bitwright.nn.qat.segment_lut import QuantizedQATSegmentLUT
from bitwright.numerics.affine import dequantize, fake_quantize, qparams_from_range
from bitwright.numerics.dtype import INT8, INT16, UINT8
from bitwright.numerics.lut import DirectTable, SegmentTable, TableSettings
from bitwright.numerics.spec import QuantSpec
from bitwright.ops.table import TableLookup, TableOp, table_of, with_tables
from bitwright.plan.assign import assign
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.plan.target import Precision, load_target
from bitwright.quantization import FakeQuantState, set_fake_quantize

SOFTMAX = "_generated_scaled_dot_product_attention_1.softmax"


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


#: Functions that are one table, with a range of inputs where they are finite.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "Exp": (torch.exp, -4, 1), "Log": (torch.log, 0.1, 9), "Sigmoid": (torch.sigmoid, -6, 6), "Tanh": (torch.tanh, -3, 3),
    "Erf": (torch.erf, -3, 3), "Gelu": (F.gelu, -3, 3), "Silu": (F.silu, -5, 5), "Mish": (F.mish, -5, 5),
    "Softplus": (F.softplus, -5, 5), "Elu": (F.elu, -3, 3), "Selu": (F.selu, -3, 3), "Celu": (F.celu, -3, 3),
    "HardSwish": (F.hardswish, -4, 4), "HardSigmoid": (F.hardsigmoid, -4, 4), "Sqrt": (torch.sqrt, 0.1, 9),
    "Rsqrt": (torch.rsqrt, 0.1, 9), "Reciprocal": (torch.reciprocal, 0.5, 9), "Sin": (torch.sin, -3, 3),
    "Cos": (torch.cos, -3, 3), "Tan": (torch.tan, -1, 1), "Asin": (torch.asin, -0.9, 0.9), "Acos": (torch.acos, -0.9, 0.9),
    "Atan": (torch.atan, -3, 3), "Sinh": (torch.sinh, -2, 2), "Cosh": (torch.cosh, -2, 2), "Asinh": (torch.asinh, -3, 3),
    "Acosh": (torch.acosh, 1.1, 5), "Atanh": (torch.atanh, -0.9, 0.9), "Pow": (lambda x: x**1.5, 0.1, 4),
    "LogSigmoid": (F.logsigmoid, -3, 3), "Expm1": (torch.expm1, -2, 2),
    "SegmentLUT": (SegmentLUT(lambda x: x.sin() * x), -3, 3),
}  # fmt: skip


def solved(graph: Graph, x: Tensor, precision: Precision) -> tuple[Plan, Statistics]:
    target = load_target("generic")
    statistics = calibrated(graph, x)
    asked = dict.fromkeys(graph.op_names, precision)
    return Solver(graph, target, statistics).solve(assign(graph, target, asked=asked)), statistics


@pytest.mark.parametrize("precision", ["int8", "int16"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_every_function_is_one_table(kind: str, precision: Precision) -> None:
    function, lo, hi = FUNCTIONS[kind]
    x = torch.linspace(lo, hi, 4096).reshape(16, 256)
    graph = prepared(capture(function if isinstance(function, nn.Module) else Calls(function), x[:2]))
    plan, statistics = solved(graph, x, precision)
    (name,) = graph.op_names
    tables = build_tables(graph, plan, statistics)
    looked_up = with_tables(graph, tables)
    read, made = graph.info.inputs[0].name, graph.info.outputs[0]
    q = plan.qparams(made)
    assert q is not None

    found = Replay(looked_up).run({read: x}, quantized_reads(graph, plan))[made]

    exact = Replay(graph).run({read: x}, quantized_reads(graph, plan))[made]
    assert graph.op(name).kind == kind
    assert isinstance(tables[name], DirectTable if precision == "int8" else SegmentTable)
    largest, rms = error_on_data(graph, statistics, name, tables[name])
    assert rms < (0.4 if precision == "int8" else 3)
    assert float((found - exact).abs().max()) <= (largest + 0.51) * q.scale[0]
    torch.testing.assert_close(found, fake_quantize(found, q))  # codes of the output


@pytest.mark.parametrize(
    "function", [torch.relu, torch.abs, torch.floor, F.leaky_relu, torch.neg, torch.square]
)
def test_what_integers_compute_has_no_table(function: Callable[[Tensor], Tensor]) -> None:
    graph = capture(Calls(function), torch.randn(2, 3))

    assert [op.table_function() for op in graph.ops] == [None]


@pytest.fixture(scope="module")
def block() -> Graph:
    return prepared(capture(randomised(Block()), tokens()[:2]), tables=True)


def test_tables_of_a_plan_and_their_settings(block: Graph) -> None:
    plan, statistics = solved(block, tokens(), "int16")
    made = plan.with_tables({"norm.rsqrt": TableSettings(num_tables=3)})
    tables = build_tables(block, made, statistics, {f"{SOFTMAX}.exp": TableSettings(form="regular")})
    looked_up = with_tables(block, tables)

    assert [*tables] == ["norm.rsqrt", f"{SOFTMAX}.exp", f"{SOFTMAX}.reciprocal", "_generated_gelu_3"]
    assert len(tables["norm.rsqrt"].boundaries) == 4  # type: ignore[attr-defined]
    assert type(tables[f"{SOFTMAX}.exp"]).__name__ == "RegularTable"
    assert {op.name for op in looked_up.ops if isinstance(op, TableOp)} == {*tables}
    assert [op.kind for op in looked_up.ops] == [op.kind for op in block.ops]
    assert not any(isinstance(op, TableOp) for op in block.ops)
    restored = pickle.loads(pickle.dumps(looked_up))
    assert torch.equal(restored(tokens()), looked_up(tokens()))


def test_operators_kept_float_have_no_table(block: Graph) -> None:
    plan, statistics = solved(block, tokens(), "int8")
    plan = plan.with_precision(["_generated_gelu_3"], "float", "tried")

    assert "_generated_gelu_3" not in build_tables(block, plan, statistics)


def test_errors_of_tables_name_the_operator(block: Graph) -> None:
    plan, statistics = solved(block, tokens(), "int8")
    unsolved = assign(block, load_target("generic"))

    with pytest.raises(
        PlanError, match=r"operator norm\.rsqrt: expected a calibrated input; found that its input"
    ):
        build_tables(block, unsolved, statistics)
    with pytest.raises(UnknownName, match=r"norm\.rsqrtt"):
        build_tables(block, plan, statistics, {"norm.rsqrtt": TableSettings()})
    with pytest.raises(NumericsError, match=r"operator norm\.rsqrt"):
        build_tables(block, plan, statistics, {"norm.rsqrt": TableSettings(form="direct")})
    with pytest.raises(NumericsError, match=r"_generated_gelu_3.*16-bit input"):
        build_tables(block, plan, statistics, {"_generated_gelu_3": TableSettings(form="segment")})


@pytest.mark.parametrize("spec", [QuantSpec(INT8, True), QuantSpec(INT16, True), QuantSpec(UINT8, False)])
def test_weights_of_codes_are_counts_of_elements(spec: QuantSpec) -> None:
    x = torch.cat([torch.randn(5000).abs() * 2, torch.zeros(300), torch.tensor([-1.0])])
    seen = ValueStatistics("x")
    seen.update(x)
    q = qparams_from_range(spec, [seen.lo], [4.0])

    weights = code_weights(seen, q)

    codes = ((x / q.scale[0]).round() + q.zero_point[0]).clamp(spec.dtype.qmin, spec.dtype.qmax)
    exact = np.bincount((codes - spec.dtype.qmin).int(), minlength=len(weights))
    assert weights.sum() == pytest.approx(len(x))
    assert weights.min() >= -1e-9
    # Elements move to a neighbouring code at most, so that the running sums differ by what one bin holds.
    assert np.abs(np.cumsum(weights) - np.cumsum(exact)).max() <= 0.01 * len(x)
    assert weights[q.zero_point[0] - spec.dtype.qmin] >= 300


# --- prepared models ---------------------------------------------------------------------------------------------


def log_of_block() -> nn.Module:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = randomised(Block())
            self.decode = SegmentLUT(torch.sin, auto_divide_strategy="optimal", num_tables=4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.decode(self.a(x)) + 1.5)

    return Network().eval()


@pytest.fixture(scope="module")
def calibrated_model() -> bw.PreparedModel:
    setter = bw.ModuleNameQconfigSetter({"": bw.get_default_qconfig(activation_qkwargs={"dtype": "int16"})})
    model = bw.prepare(log_of_block(), tokens()[:2], setter).eval()
    set_fake_quantize(model, FakeQuantState.CALIBRATION)
    model(tokens())
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    return model


@pytest.fixture(scope="module")
def converted_once(calibrated_model: bw.PreparedModel) -> bw.PreparedModel:
    model = copy.deepcopy(calibrated_model)
    QuantizedQATSegmentLUT.convert_segment_lut(model)
    return model


@pytest.fixture
def converted(converted_once: bw.PreparedModel) -> bw.PreparedModel:
    return copy.deepcopy(converted_once)


def difference(a: nn.Module, b: nn.Module) -> float:
    with torch.no_grad():
        return float((a(tokens()) - b(tokens())).abs().max())


def test_all_tables_in_fixed_point(calibrated_model: bw.PreparedModel, converted: bw.PreparedModel) -> None:
    tables = [path for path, m in converted.named_modules() if isinstance(m, TableOp)]

    assert tables == [
        "a.norm.rsqrt", f"a.{SOFTMAX}.exp", f"a.{SOFTMAX}.reciprocal", "a._generated_gelu_3", "decode", "_generated_log_1",
    ]  # fmt: skip
    assert 0 < difference(calibrated_model, converted) < 0.01
    assert "decode" in [
        n for n, m in calibrated_model.named_modules() if getattr(m, "kind", "") == "SegmentLUT"
    ]
    assert len(converted.get_submodule("decode").table.boundaries) <= 5


def test_one_is_put_back_by_its_own_name_or_its_tables(
    calibrated_model: bw.PreparedModel, converted: bw.PreparedModel
) -> None:
    converted.get_submodule("_generated_log_1").quantized_forward = False
    assert not converted.get_submodule("_generated_log_1.log").quantized_forward
    converted.get_submodule("_generated_log_1.log").quantized_forward = True
    assert converted.get_submodule("_generated_log_1").quantized_forward

    for path, module in converted.named_modules():
        if isinstance(module, TableOp):
            assert difference(calibrated_model, converted) > 0
            converted.get_submodule(f"{path}.{module.table_path}").quantized_forward = False
    assert difference(calibrated_model, converted) == 0


def test_kinds_and_parts_are_put_back_together(converted: bw.PreparedModel) -> None:
    switch = bw.set_quantized_forward

    assert switch(converted, False, kind="exp") == [f"a.{SOFTMAX}.exp"]
    assert switch(converted, False, "a.norm") == ["a.norm.rsqrt"]
    assert switch(converted, False, f"a.{SOFTMAX}.reciprocal.reciprocal") == [f"a.{SOFTMAX}.reciprocal"]
    assert len(switch(converted, True)) == 6
    with pytest.raises(UnknownName, match=r"kind of table .*exp.*found 'expp'. Did you mean 'exp'"):
        switch(converted, False, kind="expp")
    with pytest.raises(UnknownName, match=r"Did you mean 'a.norm.rsqrt'"):
        switch(converted, False, "a.norm.rsqr")
    # A part and a kind that exclude each other: nothing was switched, and nothing said.
    with pytest.raises(UnknownName, match=r"in a\.norm: .*kind of table \(rsqrt\); found 'exp'"):
        switch(converted, False, "a.norm", kind="exp")


def test_copies_files_and_checkpoints(
    calibrated_model: bw.PreparedModel, converted: bw.PreparedModel
) -> None:
    assert difference(converted, copy.deepcopy(converted)) == 0
    converted.get_submodule("decode").quantized_forward = False
    restored = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    assert difference(converted, restored) == 0
    assert not restored.get_submodule("decode").quantized_forward
    assert converted.state_dict().keys() == calibrated_model.state_dict().keys()

    other = copy.deepcopy(calibrated_model)
    for _, quantizer in other.quantizers:
        quantizer.set_scale(quantizer.step() * 1.25)
    wide = copy.deepcopy(other)
    bw.convert_segment_lut(wide)
    converted.get_submodule("decode").quantized_forward = True
    converted.load_state_dict(other.state_dict())
    assert difference(converted, wide) == 0  # the tables follow the scales that were loaded


def test_states_without_rounding_are_float(
    calibrated_model: bw.PreparedModel, converted: bw.PreparedModel
) -> None:
    set_fake_quantize(converted, FakeQuantState.FLOAT)

    assert difference(converted, calibrated_model.float_graph()) == 0


def test_gradients_are_those_of_the_functions(
    calibrated_model: bw.PreparedModel, converted: bw.PreparedModel
) -> None:
    def gradient(model: nn.Module) -> Tensor:
        x = tokens().requires_grad_()
        model(x).sum().backward()
        assert x.grad is not None
        return x.grad

    expected, found = gradient(calibrated_model), gradient(converted)

    assert float(F.cosine_similarity(found.flatten(), expected.flatten(), 0)) > 0.999
    assert all(p.grad is not None for p in converted.parameters() if p.requires_grad and p.dim() > 1)


def test_what_saturates_has_no_gradient() -> None:
    graph = capture(Calls(torch.exp), torch.zeros(2, 3))
    q_in = qparams_from_range(QuantSpec(INT8, True), [-4.0], [4.0])
    q_out = qparams_from_range(QuantSpec(INT8, True), [0.0], [1.0])
    op = graph.op(graph.op_names[0])
    looked_up = TableOp(op, TableLookup(table_of(op, q_in, q_out)))
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    y = looked_up(x)
    y.sum().backward()

    assert float(y[1].detach()) == pytest.approx(1.0)
    torch.testing.assert_close(x.grad, torch.tensor([-1.0, 0.0]).exp() * torch.tensor([1.0, 0.0]))


def test_settings_are_changed_without_training(
    calibrated_model: bw.PreparedModel, converted: bw.PreparedModel
) -> None:
    op: Any = converted.get_submodule("a.norm.rsqrt")
    fine = difference(calibrated_model, converted)
    op.table_settings = TableSettings(strategy="evenly", num_tables=1)
    coarse = difference(calibrated_model, converted)
    assert coarse > fine
    assert op.table_settings.num_tables == 1
    with pytest.raises(NumericsError, match=r"operator a\.norm\.rsqrt"):
        op.table_settings = TableSettings(form="direct")
    assert op.table_settings.num_tables == 1

    early = copy.deepcopy(calibrated_model)
    early.get_submodule("a.norm.rsqrt").table_settings = TableSettings(strategy="evenly", num_tables=1)
    bw.convert_segment_lut(early)
    named = copy.deepcopy(calibrated_model)
    bw.convert_segment_lut(named, {"a.norm.rsqrt": TableSettings(strategy="evenly", num_tables=1)})
    assert difference(early, converted) == difference(named, converted) == 0


def test_conversion_asks_for_a_calibrated_prepared_model() -> None:
    model = bw.prepare(log_of_block(), tokens()[:2])

    with pytest.raises(
        PlanError, match=r"operator a\.norm\.rsqrt: .* its input a\.norm\.variance was never calibrated"
    ):
        bw.convert_segment_lut(model)
    with pytest.raises(ModelError, match="a model that prepare"):
        bw.convert_segment_lut(nn.ReLU())
    with pytest.raises(ModelError, match="a model with tables"):
        bw.set_quantized_forward(model, False)


def test_tables_inside_a_larger_model(calibrated_model: bw.PreparedModel) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(calibrated_model)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Holder()

    assert "net.decode" in bw.convert_segment_lut(model)
    assert bw.set_quantized_forward(model, False, "net.decode") == ["net.decode"]
    with pytest.raises(UnknownName):
        bw.convert_segment_lut(model, {"decode": TableSettings()})


def test_files_of_a_converted_model_hold_the_float_functions(
    calibrated_model: bw.PreparedModel, converted: bw.PreparedModel, tmp_path: Any
) -> None:
    written = bw.export(converted, tmp_path / "net.onnx")
    expected = bw.export(calibrated_model, tmp_path / "float.onnx")

    assert written.path.read_bytes() == expected.path.read_bytes()


# --- functions of the user's own ---------------------------------------------------------------------------------


def test_a_segment_lut_is_one_operator() -> None:
    module = nn.Sequential(SegmentLUT(lambda x: torch.where(x > 1, x * 3, x)), nn.Linear(3, 3)).eval()
    graph = capture(copy.deepcopy(module), torch.randn(2, 3))
    x = torch.randn(5, 3)

    assert [op.kind for op in graph.ops] == ["SegmentLUT", "Linear"]
    torch.testing.assert_close(graph(x), module(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_range": (1.0, 1.0)}, "lo < hi"),
        ({"auto_divide_strategy": "even"}, "Did you mean 'evenly'"),
        ({"num_tables": 0}, "num_tables from 1"),
        ({"dividing_points": (2.0, 1.0)}, "ascending"),
        ({"symmetric_mode": "point"}, "symmetric_mode"),
        # What was taken, and failed later in numpy, or here as a TypeError.
        ({"num_tables": 6.0}, "an integer num_tables; found 6.0"),
        ({"num_tables": "6"}, "an integer num_tables"),
        ({"gradients": (1.0,)}, "two numbers as gradients"),
        ({"input_range": [0.0]}, "two numbers as input_range"),
        ({"input_range": (0.0, "1")}, "two numbers as input_range"),
        ({"simulated_func": 3}, "a function of one tensor; found int"),
    ],
)
def test_a_segment_lut_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BitwrightError, match=message):
        SegmentLUT(**{"simulated_func": torch.sin, **arguments})


def lut_model(lut: SegmentLUT, lo: float, hi: float) -> bw.PreparedModel:
    x = torch.linspace(lo, hi, 512).reshape(8, 64)
    setter = bw.ModuleNameQconfigSetter({"": bw.get_default_qconfig(activation_qkwargs={"dtype": "int16"})})
    model = bw.prepare(nn.Sequential(lut), x[:2], setter).eval()
    set_fake_quantize(model, FakeQuantState.CALIBRATION)
    model(x)
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    return model


def test_an_inverse_narrows_the_table_to_where_the_output_is() -> None:
    model = lut_model(
        SegmentLUT(lambda x: 1 / x, inverse_func=lambda y: 1 / y, input_range=(0.01, 4)), 0.5, 4
    )
    bw.convert_segment_lut(model)
    table = model.get_submodule("0").table

    assert dequantize(torch.tensor([table.first + table.q_in.spec.dtype.qmin]), table.q_in) == pytest.approx(
        0.5, rel=0.01
    )


@pytest.mark.parametrize("inverse", [lambda y: y, torch.sin])
def test_an_inverse_that_does_not_fall_is_refused(inverse: Callable[[Tensor], Tensor]) -> None:
    model = lut_model(SegmentLUT(lambda x: 1 / x, inverse_func=inverse, input_range=(0.5, 4)), 0.5, 4)

    with pytest.raises(NumericsError, match=r"operator 0.*inverse_func"):
        bw.convert_segment_lut(model)


def test_the_older_word_for_odd() -> None:
    with pytest.warns(FutureWarning, match="symmetric_mode"):
        lut = SegmentLUT(torch.sin, is_centrosymmetric=True)

    assert lut.definition.settings.symmetric_mode == "odd"

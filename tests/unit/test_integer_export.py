"""The integer model: exact rescales and tables, proofs, islands, and what the file says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from tests.networks import Residual, pictures, randomised, ready
from tests.networks import calibrated as statistics_of
from tests.unit.integer_cases import calibrated, lowered, run_alone
from torch import Tensor, nn

from bitwright.calibrate.solve import Solver
from bitwright.errors import NumericsError
from bitwright.exporters.integer import export_integer, lower
from bitwright.exporters.integer.export import ISLANDS_KEY
from bitwright.exporters.integer.lowering import LOWERINGS, TABLE, Lowering
from bitwright.exporters.integer.number import Integer
from bitwright.exporters.integer.rescale import multiplier_of, requantize
from bitwright.graph.op import Op
from bitwright.numerics.dtype import INT8, INT16, UINT8, UINT16, DType
from bitwright.numerics.fixed_point import rescale
from bitwright.numerics.lut import TableSettings, build_table
from bitwright.numerics.rounding import Rounding
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.plan.assign import assign
from bitwright.plan.code_names import codes_in
from bitwright.plan.target import PRECISIONS, FuseRule, Precision, RescaleRule, load_target
from bitwright.runtime.session import Session
from bitwright.runtime.verify import measure


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() + x


def bare(form: str = "float", bits: int = 31) -> tuple[Lowering, Op]:
    """A lowering to write single nodes with."""
    graph, statistics, _ = calibrated(_TWICE, ((2, 3),))
    target = load_target("generic-int8").model_copy(
        update={"rescale": RescaleRule(form=form, multiplier_bits=bits)}
    )
    plan = Solver(graph, target, statistics).solve(assign(graph, target))
    low = Lowering(graph, plan, target, {})
    low.writer.begin_edge("test")
    return low, next(iter(graph.ops))


_TWICE = Twice()


def codes(dtype: DType, scale: float, zero: int = 0, rounding: Rounding = Rounding.HALF_EVEN) -> QParams:
    return QParams(QuantSpec(dtype, zero == 0, None, rounding), (float(np.float32(scale)),), (zero,))


def computed(low: Lowering, name: str) -> np.ndarray:  # type: ignore[type-arg]
    x = np.zeros((2, 3), np.float32)
    return run_alone(low.writer.model(), name, {"x": x})


# --- rescale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("form, bits", [("float", 31), ("multiplier_shift", 15), ("shift", 31)])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31), size=st.sampled_from([8, 20, 31, 42]), dtype=st.sampled_from([INT8, UINT8, INT16, UINT16]),
    exponents=st.lists(st.integers(-40, 3), min_size=4, max_size=4), power=st.booleans(), channels=st.sampled_from([4, 20]),
)  # fmt: skip
def test_onnx_runtime_rescales_as_the_reference(
    rounding: Rounding,
    form: str,
    bits: int,
    seed: int,
    size: int,
    dtype: DType,
    exponents: list[int],
    power: bool,
    channels: int,
) -> None:
    """The constants of few channels are stored; those of many are computed in the file."""
    random = np.random.default_rng(seed)
    low, op = bare(form, bits)
    mantissa = (
        np.ones(channels) if power else random.uniform(0.5, 1.0, channels) * random.choice([-1, 1], channels)
    )
    q = codes(dtype, 0.37, int(random.integers(dtype.qmin, dtype.qmax + 1)), rounding)
    units = 2.0 ** np.tile(exponents, channels // 4)
    scale = q.scale[0] * mantissa * units
    zero = random.integers(-(2**7), 2**7, channels).astype(np.float64)
    top = 1 << (size - 1)
    n = random.integers(-top, top, (50, channels))
    n[:8] = np.rint(zero + (np.arange(8)[:, None] - 4) / 2 / units).clip(-top, top - 1)  # ties
    carrier = "int32" if size <= 31 else "int64"
    x = Integer(low.constant(n.astype(carrier)), carrier, scale, zero, -top, top - 1)  # type: ignore[arg-type]

    result = requantize(low, op, x, q)
    m, s = (torch.from_numpy(a) for a in multiplier_of(low, x, q))
    expected = rescale(torch.from_numpy(n) - torch.from_numpy(zero).long(), m, s, rounding) + q.zero_point[0]

    assert (computed(low, result.name) == expected.clamp(dtype.qmin, dtype.qmax).numpy()).all()


def test_a_sum_so_large_that_its_rescale_would_be_coarse_is_refused() -> None:
    """A multiplier of 12 bits beside a sum of 49: up to 8 steps of 16-bit codes wrong."""
    low, _ = bare()
    x = Integer("sum", "int64", np.array(3e-12), np.zeros(()), -(1 << 48), 1 << 48)

    with pytest.raises(NumericsError, match=r"leaves 18 of 61 bits for the multiplier .* which leaves 12"):
        multiplier_of(low, x, codes(INT16, 0.01))
    assert multiplier_of(low, x, codes(INT8, 0.01))[1] > 0
    power = replace(x, scale=np.array(codes(INT16, 0.01).scale[0] * 2.0**-30))
    assert tuple(int(v) for v in multiplier_of(low, power, codes(INT16, 0.01))) == (1, 30)


@pytest.mark.parametrize("top, ratio", [(1 << 60, 0.75), (1 << 61, 0.5), (1 << 66, 0.5)])
def test_an_exact_ratio_is_refused_too_where_the_product_does_not_fit(top: int, ratio: float) -> None:
    """3 · 2^60 is above the 2^61 that the offset takes for granted."""
    low, _ = bare()
    q = codes(INT8, 0.37)
    x = Integer("sum", "int64", np.array(q.scale[0] * ratio), np.zeros(()), -top, top)

    with pytest.raises(NumericsError, match="which leaves 0"):
        multiplier_of(low, x, q)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0])
def test_a_constant_between_two_codes_counts_where_scales_are_powers_of_two(ratio: float) -> None:
    """x + 1.3 codes with the multiplier 1: the constant was once rounded to 1 code, half of a step too little."""
    low, op = bare()
    q = codes(INT8, 0.37, 3)
    n = np.arange(-60, 60)
    x = Integer(
        low.constant(n.astype(np.int32)), "int32", np.array(q.scale[0] * ratio), np.array(-1.3), -60, 59
    )

    expected = np.rint((n + 1.3) * ratio) + 3
    assert (computed(low, requantize(low, op, x, q).name) == expected.clip(-128, 127)).all()


@pytest.mark.parametrize("channels", [3, 16])
def test_a_constant_counts_beside_a_channel_that_is_nearly_dead(channels: int) -> None:
    """The longest shift of all once left no bits for constants between two codes, which then were rounded to one."""
    low, op = bare()
    q = codes(INT16, 0.37, 3)
    n = np.arange(-60, 60)[:, None].repeat(channels, 1)
    ratio, zero = np.full(channels, 0.25), np.linspace(-1.7, 1.7, channels)
    ratio[0] = 2.0**-61
    x = Integer(low.constant(n.astype(np.int32)), "int32", q.scale[0] * ratio, zero, -60, 59)

    expected = np.rint((n - zero) * ratio) + 3
    assert (computed(low, requantize(low, op, x, q).name) == expected).all()


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("zero, bound, error", [(-1.9, 1 << 60, 2.0**-3), (2.0**28 + 0.9, 1 << 29, 2.0**-12)])
def test_constants_of_many_channels_are_stored_where_computing_them_is_coarse(
    zero: float, bound: int, error: float, channels: int
) -> None:
    """No room left for bits behind the point: in the accumulator, which leaves a rounding at s = 2, and in 32 bits of a zero."""
    low, op = bare()
    q = codes(INT8, 0.37)
    n = np.arange(-60, 60)[:, None].repeat(channels, 1) + np.int64(zero)
    scale, zeros = np.full(channels, q.scale[0] * 0.25), np.full(channels, zero)
    x = Integer(low.constant(n), "int64", scale, zeros, -bound, bound - 1)

    apart = computed(low, requantize(low, op, x, q).name) - (n - zero) * 0.25
    assert np.abs(apart).max() <= 0.5 + error


class Level(nn.Module):
    """A constant without axes, computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.level.sigmoid()


@pytest.mark.parametrize("target", ["generic-int8", "journey6"])
def test_a_constant_without_axes_may_be_computed(target: str) -> None:
    """NumPy's number in place of an array once ended the whole export."""
    _, _, model, proof = lowered(Level(), ((2, 3),), target, "int8")

    assert not model.islands
    assert [d.steps for d in proof.per_op] == [0] * len(proof.per_op)
    assert proof.per_op


class Gram(nn.Module):
    """A product whose sums run over the batch: as long as whoever calls it likes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 8).t() @ x.reshape(-1, 8)


def test_a_sum_over_the_batch_has_no_proof_and_stays_float() -> None:
    graph, _, model, _ = lowered(Gram(), ((3, 4, 8),), "generic-int8", "int8")
    (name,) = model.islands

    assert graph.op(name).kind == "MatMul"
    assert "axes of fixed length" in model.islands[name]


class Dead(nn.Module):
    """A convolution with a channel whose weights are nearly 0: its bias is 10^5 steps of its accumulator."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        weight[1] *= 1e-6
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.tensor([0.1, -0.6, 0.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias)


def test_a_channel_that_is_nearly_dead_is_right_too() -> None:
    _, _, model, proof = lowered(Dead(), ((2, 3, 4, 4),), "generic-int8", "int8")

    assert not model.islands
    assert [d.steps for d in proof.per_op] == [0]


# --- tables ------------------------------------------------------------------------------------------------------

TABLES = [
    (torch.exp, INT8, 0, INT8, 0, TableSettings()),
    (torch.sigmoid, UINT8, 100, UINT8, 3, TableSettings()),
    (torch.tanh, INT16, 0, INT16, 0, TableSettings(form="regular")),
    (torch.sigmoid, UINT16, 30000, INT8, 0, TableSettings(form="regular")),
    (torch.tanh, INT16, 0, INT16, 0, TableSettings(strategy="curvature", num_tables=6)),
    (torch.exp, UINT16, 50000, UINT16, 7, TableSettings(strategy="evenly", input_range=(-3.0, 1.0))),
    (torch.erf, INT16, 0, INT16, 0, TableSettings(symmetric_mode="odd", strategy="evenly")),
    (torch.cosh, INT16, 0, UINT8, 1, TableSettings(symmetric_mode="even", strategy="evenly", input_range=(-2.0, 2.0))),
    (torch.sin, INT16, 0, INT16, 0, TableSettings(period=2 * np.pi)),
]  # fmt: skip


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize(
    "case", TABLES, ids=lambda c: f"{c[0].__name__}-{c[1].name}-{c[5].form}-{c[5].symmetric_mode}"
)
def test_tables_are_computed_code_by_code(case: tuple, rounding: Rounding) -> None:  # type: ignore[type-arg]
    function, d_in, z_in, d_out, z_out, wish = case
    q_in = codes(d_in, 8.0 / (d_in.qmax - d_in.qmin), z_in, rounding)
    q_out = codes(d_out, 4.0 / (d_out.qmax - d_out.qmin), z_out, rounding)
    table = build_table(function, q_in, q_out, wish)
    low, op = bare()
    every = torch.arange(d_in.qmin, d_in.qmax + 1)
    low.tables = {op.name: table}
    name = low.graph.op_inputs(op.name)[0]
    assert name is not None
    low.inner[name] = low.constant_codes(every, q_in)
    low.plan = replace(
        low.plan,
        values={**low.plan.values, op.outputs[0]: replace(low.plan.values[op.outputs[0]], qparams=q_out)},
    )
    lowering = LOWERINGS.find(TABLE)
    assert lowering is not None
    lowering(low, op)

    assert (computed(low, low.codes[op.outputs[0]].name) == table.results.numpy()).all()


# --- proofs ------------------------------------------------------------------------------------------------------


def test_every_sum_is_proven_from_its_weights() -> None:
    layer = nn.Linear(10, 3)
    graph, plan, model, _ = lowered(layer, ((4, 10),), "generic-int8", "int8")
    (proof,) = model.accumulators
    w = plan.qparams(graph.op_inputs(proof.op)[1] or "")
    assert w is not None
    steps = (layer.weight.detach() / torch.tensor(w.scale)[:, None]).round().abs().sum(1).max()

    assert proof.peak == 128 * int(steps)
    assert proof.bits == 32
    assert "largest sum" in str(model.proofs())


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(140_000, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_sum_that_may_overflow_stays_float_and_says_so() -> None:
    _, _, model, proof = lowered(Wide(), ((2, 140_000),), "generic-int8", "int8")
    (why,) = model.islands.values()

    assert (
        why == f"expected sums that provably fit into 32 bits; found magnitudes up to {128 * 127 * 140_000}"
    )
    assert all(d.holds for d in proof.per_op)


# --- the file ----------------------------------------------------------------------------------------------------


def test_the_file_lists_its_islands_and_names_its_codes() -> None:
    graph, statistics, _ = calibrated(_TWICE, ((2, 3),))
    rules = load_target("generic-int8")
    plan = Solver(graph, rules, statistics).solve(assign(graph, rules))
    model = export_integer(graph, plan, rules, {})
    islands = json.loads(next(p.value for p in model.metadata_props if p.key == ISLANDS_KEY))

    assert list(islands.values()) == ["no table was built"]
    assert set(codes_in(model)) == {n for n, e in plan.values.items() if e.qparams is not None}


def test_only_integers_between_the_edges() -> None:
    _, _, model, _ = lowered(_TWICE, ((2, 3),), "onnxruntime", "int8")
    flat = onnx.inliner.inline_local_functions(model.model)
    types = onnx.shape_inference.infer_shapes(flat).graph.value_info
    floats = {v.name for v in types if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}

    assert len(flat.graph.node) > 10
    assert not flat.functions
    assert not floats
    assert [n.op_type for n in flat.graph.node if n.op_type.endswith("Linear")] == [
        "QuantizeLinear",
        "DequantizeLinear",
    ]


class Attention(nn.Module):
    """A convolution, tokens, attention, a norm, an activation: most forms of arithmetic of an integer model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, 2, 1, groups=1), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        mixed = (tokens @ tokens.transpose(1, 2) * 0.3).softmax(-1) @ tokens
        return self.fc(nn.functional.gelu(self.norm(tokens + mixed))).mean(1)


@pytest.mark.parametrize(
    "target, precision", [("journey6", "int8"), ("generic-int8", "int8"), ("onnxruntime", "int16")]
)
@pytest.mark.parametrize("samples", [1, 7])
def test_another_runtime_computes_the_same_bits(target: str, precision: Precision, samples: int) -> None:
    """The reference evaluator of the ONNX project shares no code with ONNX Runtime."""
    _, _, model, _ = lowered(Attention(), ((4, 3, 8, 8),), target, precision)
    onnx.checker.check_model(model.model, full_check=True)
    name = model.model.graph.input[0].name
    x = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(samples)) * 2  # some saturate
    (reference,) = ReferenceEvaluator(model.model).run(None, {name: x.numpy()})

    assert not model.islands
    for level in ("disabled", "default"):
        (found,) = Session(model.model, optimisation=level).run({name: x}).values()  # type: ignore[arg-type]
        assert np.array_equal(found, reference)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)) * -0.5


def test_values_inside_a_group_are_rectified_where_something_follows() -> None:
    graph, statistics, batch = calibrated(Chain(), ((2, 3, 4, 4),))
    fuse = (
        FuseRule(producers=("Conv",), consumers={"Relu": "always"}),
        FuseRule(producers=("Relu",), consumers={"Mul": "scalar"}),
    )
    rules = load_target("generic-int8").model_copy(update={"fuse": fuse})
    rules.__dict__.pop("fusable", None)
    plan = Solver(graph, rules, statistics).solve(assign(graph, rules))
    model = lower(graph, plan, rules, {})
    proof = measure(graph, plan, model.model, [batch])

    assert len(plan.groups) == 1
    assert not model.islands
    assert [d.steps for d in proof.per_op] == [0]


@pytest.mark.parametrize("seed", range(4))
def test_precisions_may_alternate(seed: int) -> None:
    """int4 weights, int8, int16 and float side by side: codes are rescaled, islands converted."""
    graph = ready(randomised(Residual()), pictures())
    rules = load_target("onnxruntime")
    random = np.random.default_rng(seed)
    asked = {op: str(random.choice(PRECISIONS)) for op in graph.op_names}
    plan = Solver(graph, rules, statistics_of(graph, pictures())).solve(assign(graph, rules, asked=asked))  # type: ignore[arg-type]
    model = lower(graph, plan, rules, {})
    proof = measure(graph, plan, model.model, [{graph.info.inputs[0].name: pictures()}])

    assert set(model.islands) == {n for n, e in plan.ops.items() if e.precision == "float" and e.quantizable}
    assert all(d.holds for d in proof.per_op)
    assert max((d.steps for d in proof.per_op), default=0) <= 1
    assert not proof.default.failure

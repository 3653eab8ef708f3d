"""The integer model: tables, proofs, islands, and what the file says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from tests.networks import Residual, pictures, randomised, ready
from tests.networks import calibrated as statistics_of
from tests.unit.integer_cases import TWICE, bare, calibrated, codes, computed, lowered
from torch import Tensor, nn

from bitwright.calibrate.solve import Solver
from bitwright.exporters.integer import export_integer, lower
from bitwright.exporters.integer.export import ISLANDS_KEY
from bitwright.exporters.integer.lowering import LOWERINGS, TABLE
from bitwright.numerics.dtype import INT8, INT16, UINT8, UINT16
from bitwright.numerics.lut import TableSettings, build_table
from bitwright.numerics.rounding import Rounding
from bitwright.plan.assign import assign
from bitwright.plan.code_names import codes_in
from bitwright.plan.target import PRECISIONS, FuseRule, Precision, load_target
from bitwright.runtime.session import Session
from bitwright.runtime.verify import measure

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
    graph, statistics, _ = calibrated(TWICE, ((2, 3),))
    rules = load_target("generic-int8")
    plan = Solver(graph, rules, statistics).solve(assign(graph, rules))
    model = export_integer(graph, plan, rules, {})
    islands = json.loads(next(p.value for p in model.metadata_props if p.key == ISLANDS_KEY))

    assert list(islands.values()) == ["no table was built"]
    assert set(codes_in(model)) == {n for n, e in plan.values.items() if e.qparams is not None}


def test_only_integers_between_the_edges() -> None:
    _, _, model, _ = lowered(TWICE, ((2, 3),), "onnxruntime", "int8")
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

"""int4 weights: which operators get them, which codes they have, and that ONNX Runtime computes the same."""

from __future__ import annotations

import onnx
import pytest
import torch
from tests.networks import Block, Residual, bench, pictures, randomised, tokens
from torch import nn

from bitwright.exporters.onnx_qdq import export_qdq
from bitwright.numerics.affine import fake_quantize
from bitwright.plan.assign import allowed_precisions, assign
from bitwright.plan.target import load_target
from bitwright.runtime.verify import verify

CASES = [(Residual, pictures), (Block, tokens)]
TARGETS = ["onnxruntime", "generic-int8"]


def narrow(module: type[nn.Module], data, target: str):
    evaluator, solver, plan = bench(randomised(module()), data(), target)
    graph, chosen = evaluator.graph, load_target(target)
    groups = [g for g in plan.groups if "w4a8" in allowed_precisions(graph, plan, chosen, g)]
    return graph, plan, solver.solve(plan.with_precision(groups, "w4a8", "asked")), groups


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("module", "data"), CASES)
def test_operators_with_weights_may_have_int4_ones_and_others_not(module, data, target: str) -> None:
    graph, _, plan, groups = narrow(module, data, target)
    weighted = {
        plan.ops[r.op].group
        for v in graph.values.values()
        for r in v.readers
        if r.role.name == "WEIGHT" and v.is_constant
    }
    assert set(groups) == weighted
    for entry in (e for e in plan.values.values() if e.role == "weight"):
        assert entry.qparams is not None
        assert entry.qparams.spec.dtype.bits == 4
    for entry in (e for e in plan.values.values() if e.role == "activation"):
        assert entry.qparams is None or entry.qparams.spec.dtype.bits == 8


@pytest.mark.parametrize(("module", "data"), CASES)
def test_codes_of_int4_weights_lie_between_minus_7_and_7_with_the_peak_of_each_channel_at_7(
    module, data
) -> None:
    graph, _, plan, _ = narrow(module, data, "generic-int8")
    for name, entry in plan.values.items():
        if entry.role == "weight":
            q = entry.qparams
            assert q is not None
            axis = q.spec.axis
            w = graph.constant(name).detach()
            shape = [1] * w.dim()
            if axis is not None:
                shape[axis] = -1
            codes = fake_quantize(w, q) / torch.tensor(q.scale).reshape(shape)
            assert torch.allclose(codes, codes.round(), atol=1e-4)
            peaks = (
                codes.round().abs().movedim(axis or 0, 0).flatten(1).amax(1)
                if axis is not None
                else codes.abs().amax()
            )
            assert torch.equal(peaks, torch.full_like(peaks, 7.0))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("module", "data"), CASES)
def test_onnx_runtime_computes_every_operator_with_int4_weights_as_the_simulation_does(
    module, data, target: str
) -> None:
    graph, _, plan, groups = narrow(module, data, target)
    model = export_qdq(graph, plan)
    stored = [
        t
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.INT4 and not t.name.endswith("zero_point")
    ]
    proof = verify(graph, plan, model, [{graph.info.inputs[0].name: data()}])

    assert len(stored) == len(groups)
    assert sum(d.differing - d.ties for d in proof.per_op) == 0


def test_a_target_without_int4_gives_int8_and_says_why() -> None:
    evaluator, _, plan = bench(randomised(Residual()), pictures())
    target = load_target("bm1684x")
    asked = dict.fromkeys(plan.ops, "w4a8")
    granted = assign(evaluator.graph, target, asked=asked)  # type: ignore[arg-type]

    assert granted.ops["conv1"].precision == "int8"
    assert granted.ops["conv1"].why == "bm1684x has no int4 weights"
    assert "w4a8" not in allowed_precisions(evaluator.graph, plan, target, "conv1")


def test_a_weight_that_an_int8_operator_reads_too_is_int8_and_says_so() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.fc(torch.relu(self.fc(x.mean(1)))))

    evaluator, solver, plan = bench(randomised(Shared()), tokens())
    weight, readers = next(
        (n, [r.op for r in v.readers])
        for n, v in evaluator.graph.values.items()
        if v.is_constant and len(v.readers) == 2 and v.readers[0].role.name == "WEIGHT"
    )
    mixed = solver.solve(plan.with_precision([plan.ops[readers[0]].group], "w4a8", ""))
    assert mixed.values[weight].why == "int8, as one of the operators that read it"
    assert mixed.values[weight].qparams == plan.values[weight].qparams
    both = solver.solve(plan.with_precision([plan.ops[r].group for r in readers], "w4a8", ""))
    assert both.values[weight].qparams is not None
    assert both.values[weight].qparams.spec.dtype.bits == 4

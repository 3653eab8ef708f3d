"""Parameters from statistics: weights, biases, shift-only targets (docs/numerics.md §5)."""

from __future__ import annotations

import math

import pytest
import torch
from tests.networks import Residual, calibrated, pictures, randomised, ready, solved, tokens

from bitwright.calibrate.collect import collect
from bitwright.calibrate.solve import Solver
from bitwright.errors import DataError
from bitwright.graph.graph import Graph
from bitwright.plan.assign import assign
from bitwright.plan.target import load_target


@pytest.fixture(scope="module")
def graph() -> Graph:
    return ready(randomised(Residual()), pictures())


def test_weight_scales_are_the_channel_maxima(graph: Graph) -> None:
    _, plan = solved(graph, pictures())
    q = plan.qparams("fc.weight")
    peaks = graph.constant("fc.weight").abs().amax(1)

    assert q is not None
    assert torch.allclose(torch.tensor(q.scale), (peaks / 127).detach())


class _Tied(torch.nn.Module):
    """One weight whose output channels lie on axis 0 for one operator and on axis 1 for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x)) @ self.fc.weight


def test_a_weight_with_two_output_axes_has_one_scale() -> None:
    graph = ready(randomised(_Tied()), tokens())
    _, plan = solved(graph, tokens())
    q = plan.qparams("fc.weight")

    assert q is not None
    assert q.spec.axis is None


def test_bias_scale_is_input_scale_times_weight_scale(graph: Graph) -> None:
    _, plan = solved(graph, pictures())
    bias, weight = plan.qparams("fc.bias"), plan.qparams("fc.weight")
    x = plan.qparams(graph.op_inputs("fc")[0] or "")

    assert bias is not None
    assert weight is not None
    assert x is not None
    assert bias.spec.dtype.name == "int32"
    assert bias.scale == pytest.approx([x.scale[0] * s for s in weight.scale], rel=1e-6)


def test_nonnegative_values_are_unsigned_on_targets_with_auto_dtype(graph: Graph) -> None:
    _, plan = solved(graph, pictures(), "bm1684x")
    relu = plan.qparams(graph.op_inputs("depthwise")[0] or "")
    project = plan.qparams("project")

    assert relu is not None
    assert project is not None
    assert relu.spec.dtype.name == "uint8"
    assert project.spec.dtype.name == "int8"


@pytest.mark.parametrize("method", ["max", "percentile", "kl", "mse"])
def test_shift_only_scales_are_bound_by_a_power_of_two(graph: Graph, method: str) -> None:
    _, plan = solved(graph, pictures(), "bm1684", method)
    checked = 0
    for op in ("conv1", "depthwise", "project", "fc"):
        if plan.ops[op].precision == "float":
            continue
        x = plan.qparams(graph.op_inputs(op)[0] or "")
        w = plan.qparams(f"{op}.weight")
        y = plan.qparams([v for m in plan.groups[plan.ops[op].group] for v in graph.op(m).outputs][-1])
        assert x is not None
        assert w is not None
        assert y is not None
        r = -math.log2(x.scale[0] * w.scale[0] / y.scale[0])
        peak = float(graph.constant(f"{op}.weight").detach().abs().max()) / w.scale[0]
        checked += 1

        assert r == pytest.approx(round(r), abs=1e-6)
        assert r >= 0
        assert peak <= 127 * (1 + 1e-6)
        assert (
            peak > 127 / 2
            or "bias" in str(plan.values[f"{op}.weight"].why)
            or _bias_limits(graph, op, y.scale[0], r)
        )
    assert checked >= 3


def _bias_limits(graph: Graph, op: str, scale: float, r: float) -> bool:
    bias = graph.constant(f"{op}.bias").detach().abs()
    return float((bias / (scale * 2.0 ** -(r + 1)) > 32767).float().mean()) > 0.03


def test_changing_a_value_s_method_solves_its_producer_s_and_readers_weights_again(graph: Graph) -> None:
    solver, plan = solved(graph, pictures(), "bm1684")
    value = graph.op_inputs("depthwise")[0] or ""
    other = solver.solve(plan.with_methods({value: "percentile(90)"}))

    assert other.qparams(value) != plan.qparams(value)
    assert other.qparams("conv1.weight") != plan.qparams("conv1.weight")
    assert other.qparams("depthwise.weight") != plan.qparams("depthwise.weight")
    assert other.qparams("fc.weight") == plan.qparams("fc.weight")


def test_a_weight_that_would_need_a_left_shift_leaves_its_operator_float() -> None:
    module = randomised(Residual())
    with torch.no_grad():
        module.fc.weight.mul_(1e-6)
        module.fc.bias.fill_(50.0)
        module.fc.weight[0, 0] = 1e4
    x = pictures()
    graph = ready(module, x)
    solver = Solver(graph, load_target("bm1684"), calibrated(graph, x))
    plan = assign(graph, load_target("bm1684"))
    solved_plan = solver.solve(plan.with_methods({"fc": "percentile(0.001)"}))

    assert solved_plan.precision("fc") == "float"
    assert "shift" in solved_plan.ops["fc"].why


def test_an_input_that_never_varies_is_refused(graph: Graph) -> None:
    with pytest.raises(DataError, match="the constant 0 in all 4 samples"):
        collect(graph, [{"x": torch.zeros(4, 3, 8, 8)}])


def test_no_data_is_refused(graph: Graph) -> None:
    with pytest.raises(DataError, match="at least one sample"):
        collect(graph, [])


def test_nan_in_the_data_is_refused(graph: Graph) -> None:
    x = pictures(4)
    x[2, 0, 0, 0] = float("nan")

    with pytest.raises(DataError, match="x"):
        collect(graph, [{"x": x}])


class _Causal(torch.nn.Module):
    """Self-attention under a causal mask: its masked scores hold minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)
        self.out = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_scores_masked_with_infinity_stay_float_and_the_rest_is_quantized() -> None:
    graph = ready(randomised(_Causal()), tokens())
    solver, plan = solved(graph, tokens())
    masked = [v for v in solver.statistics.infinite if v in plan.values]

    assert masked
    assert all(plan.qparams(v) is None for v in masked)
    assert plan.precision("qkv") == "int8"
    assert plan.precision("out") == "int8"
    assert any("holds infinity" in why for why in plan.refusals.values())


def test_infinity_in_the_data_is_refused(graph: Graph) -> None:
    x = pictures(4)
    x[0, 0, 0, 0] = float("inf")

    with pytest.raises(DataError, match="infinite"):
        collect(graph, [{"x": x}])

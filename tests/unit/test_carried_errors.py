"""Local errors that are met behind the next activation function."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.networks import bench, pictures, randomised
from torch import Tensor, nn

from bitwright.graph.replay import Reads
from bitwright.numerics.affine import fake_quantize
from bitwright.ops.unary import Unary
from bitwright.plan.reads import quantized_reads
from bitwright.search.carrying import FUNCTIONS, way_of
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.evaluator import Evaluator
from bitwright.search.losses import LOSSES
from bitwright.search.similarity import Similarity

MSE = Similarity(loss=LOSSES.get("mse", where=""))


class _Switched(nn.Module):
    """Activation functions that are off nearly everywhere, until an error switches them on; linear from there to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(3, 3, 3, groups=3)
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.depthwise(x)).mean((2, 3)))


class _SwitchedSquare(_Switched):
    """An operator that reads one value twice on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = 0.9 * float(pictures().abs().max()) ** 2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.clamp(x * x, self.threshold, 1e6).mean((2, 3)))


class _SwitchedOutput(_Switched):
    """The activation function makes the network's output."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.depthwise(x))


def switched(module: nn.Module) -> tuple[Evaluator, Reads]:
    """*module*, its convolution's output barely above 0 at one place of each channel, and all its reads."""
    x = pictures()
    randomised(module)
    with torch.no_grad():
        module.depthwise.bias.zero_()
        module.depthwise.bias.copy_(-0.99 * module.depthwise(x).amax((0, 2, 3)))
    evaluator, _, plan = bench(module, x, similarity=MSE)
    return evaluator, quantized_reads(evaluator.graph, plan)


def coarse(evaluator: Evaluator, reads: Reads) -> Reads:
    """The read of the network's input alone, eight times as coarse."""
    (edge,) = (e for e in reads if e[0] == evaluator.graph.info.inputs[0].name)
    return {edge: replace(reads[edge], scale=(8 * reads[edge].scale[0],))}


def predicted(evaluator: Evaluator, reads: Reads, base: Reads | None = None) -> float:
    sketch = ErrorSketch(evaluator, probes=512, base=base)
    sketch.measure(sketch.missing([reads]))
    assert sketch.unreachable == {}
    return sketch.predict(reads).loss


@pytest.mark.parametrize("module", [_Switched, _SwitchedOutput])
def test_an_error_that_switches_on_what_was_off_is_seen(module: type[nn.Module]) -> None:
    """MobileNetV2's fourth convolution lost two and a half times what gradients at clean values told."""
    evaluator, reads = switched(module())
    wish = coarse(evaluator, reads)
    assert predicted(evaluator, wish) == pytest.approx(float(evaluator.losses(wish).mean()), rel=2e-3)


def test_an_operator_that_reads_a_value_twice_is_run_with_both_changed() -> None:
    evaluator, reads = switched(_SwitchedSquare())
    graph = evaluator.graph
    (edge,) = (e for e in reads if e[0] == graph.info.inputs[0].name)
    assert [op.kind for op in way_of(graph, edge[1], {})] == ["Mul", "Clip"]
    wish = {edge: replace(reads[edge], scale=(8 * reads[edge].scale[0],))}
    assert predicted(evaluator, wish) == pytest.approx(float(evaluator.losses(wish).mean()), rel=2e-3)


def test_around_a_base_errors_are_carried_by_operators_as_the_base_has_them() -> None:
    """As in the network whose weight the base's rounded one is."""
    module = _Switched()
    evaluator, reads = switched(module)
    wish = coarse(evaluator, reads)
    base = {
        ("depthwise.weight", "depthwise"): replace(reads[("depthwise.weight", "depthwise")], scale=(0.1,) * 3)
    }
    change = predicted(evaluator, {**base, **wish}, base) - predicted(evaluator, base, base)

    rounded = copy.deepcopy(module)
    with torch.no_grad():
        rounded.depthwise.weight.copy_(fake_quantize(module.depthwise.weight, *base.values()))
    other, _, _ = bench(rounded, pictures(), similarity=MSE)
    assert change == pytest.approx(predicted(other, wish), rel=1e-3)
    assert change != pytest.approx(predicted(evaluator, wish), rel=1e-1)


def test_a_dense_operator_is_not_run_again_for_every_unit() -> None:
    dense = bench(nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU()), pictures())[0].graph
    assert way_of(dense, "0", {}) == ()  # 75 multiply-accumulates for each element


def test_a_quantized_read_between_ends_the_way() -> None:
    evaluator, reads = switched(_Switched())
    graph = evaluator.graph
    relu = graph.value("depthwise").readers[0].op
    assert [op.name for op in way_of(graph, "depthwise", {})] == ["depthwise", relu]
    assert [op.name for op in way_of(graph, relu, {})] == [relu]
    assert way_of(graph, "fc", {}) == ()
    assert way_of(graph, "depthwise", {("depthwise", relu): next(iter(reads.values()))}) == ()


class _Logarithm(nn.Module):
    """A pole that a rounding to 0 hits, while the clean values keep away from it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.log(x.abs() + 0.01).mean((2, 3)))


def test_a_rounding_that_hits_a_pole_does_not_look_free() -> None:
    """An infinite error counted as one that no gradient tells: as none."""
    evaluator, _, plan = bench(randomised(_Logarithm()), pictures(), similarity=MSE)
    reads = quantized_reads(evaluator.graph, plan)
    (logarithm,) = (op.name for op in evaluator.graph.ops if op.kind == "Log")
    wish = {e: q for e, q in reads.items() if e[1] == logarithm}
    assert torch.isinf(evaluator.losses(wish)).any() or torch.isnan(evaluator.losses(wish)).any()
    assert predicted(evaluator, wish) > 0


PARAMETERS = {
    "LeakyRelu": {"alpha": 0.01},
    "ThresholdedRelu": {"alpha": 1.0},
    "Shrink": {"lambd": 0.5, "bias": 0.0},
    "Elu": {"alpha": 1.0},
    "Celu": {"alpha": 1.0},
    "Gelu": {"approximate": "tanh"},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "Softplus": {"beta": 1.0},
}


@pytest.mark.parametrize("kind", sorted(FUNCTIONS - {"Clip", "PRelu"}))
def test_every_function_is_finite_wherever_its_input_is(kind: str) -> None:
    x = torch.tensor([0.0, 1e-30, 1.0, 1e3, 1e30])
    assert torch.isfinite(Unary(kind, **PARAMETERS.get(kind, {}))(torch.cat([x, -x]))).all()

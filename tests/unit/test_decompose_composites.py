"""Composite operators taken apart: the same floats, parts with names, the author's parameters where they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.graph.graph import Graph
from bitwright.graph.replay import Replay
from bitwright.importers.from_torch import capture
from bitwright.rewrite.decompose_composites import decompose_composites
from bitwright.rewrite.fold_batchnorm import fold_batchnorm

SOFTMAX = ["max", "sub", "exp", "sum", "reciprocal", "mul"]
NORM = ["mean", "sub", "square", "variance", "rsqrt", "mul"]
AFFINE = ["weight_mul", "bias_add"]


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(*xs)


class Holds(nn.Module):
    """A layer called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def taken_apart(module: nn.Module, *shapes: tuple[int, ...]) -> tuple[Graph, Graph, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=generator) + 0.5 for shape in shapes]
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    graph = capture(module, tuple(xs))
    return graph, decompose_composites(graph), xs


def check(module: nn.Module, expected: list[str], *shapes: tuple[int, ...]) -> Graph:
    graph, apart, xs = taken_apart(module, *shapes)
    more = [torch.cat([x, x, -x]) for x in xs]
    before, after = graph(*more), apart(*more)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    (name,) = graph.op_names
    assert apart.op_names == [f"{name}.{part}" for part in expected]
    assert apart.info.outputs == graph.info.outputs
    observed: dict[str, tuple[int, ...]] = {}
    for value in apart.values.values():
        assert value.info.shape is not None, value.name
        observed[value.name] = value.info.shape
    assert {n: tuple(x.shape) for n, x in run_all(apart, xs).items()}.items() <= observed.items()
    assert apart.state_dict().keys() == graph.state_dict().keys()
    inner = [op.is_inner for op in apart.ops]
    assert not inner[-1]
    assert all(op.composite and op.composite.name == name for op in apart.ops)
    return apart


def run_all(graph: Graph, xs: list[Tensor]) -> dict[str, Tensor]:
    names = [i.name for i in graph.info.inputs]
    return Replay(graph).run(dict(zip(names, xs, strict=True)), keep=None)


@pytest.mark.parametrize(("shape", "axis"), [((2, 5), -1), ((2, 5, 3), 1), ((2, 5, 3, 4), 2), ((2, 3), 0)])
def test_softmax_of_any_axis(shape: tuple[int, ...], axis: int) -> None:
    graph, apart, xs = taken_apart(nn.Softmax(axis), shape)

    torch.testing.assert_close(apart(*xs), graph(*xs), rtol=1e-5, atol=1e-5)
    assert [n.rpartition(".")[2] for n in apart.op_names] == SOFTMAX
    reduced = apart.value(apart.op(apart.op_names[3]).outputs[0]).info
    assert reduced.shape is not None
    assert reduced.shape[axis] == 1


def test_log_softmax() -> None:
    check(Holds(nn.LogSoftmax(-1)), ["max", "sub", "exp", "sum", "log", "sub_log"], (2, 7))


@pytest.mark.parametrize(
    ("layer", "parts", "shape"),
    [
        (nn.LayerNorm(6), NORM + AFFINE, (2, 4, 6)),
        (nn.LayerNorm((4, 6)), NORM + AFFINE, (2, 3, 4, 6)),
        (nn.LayerNorm(6, elementwise_affine=False), NORM, (2, 6)),
        (nn.LayerNorm(6, bias=False), [*NORM, "weight_mul"], (2, 6)),
        (nn.RMSNorm(6), ["square", "mean_square", "rsqrt", "mul", "weight_mul"], (2, 4, 6)),
        (nn.RMSNorm((4, 6), elementwise_affine=False), ["square", "mean_square", "rsqrt", "mul"], (2, 4, 6)),
        (nn.InstanceNorm1d(3), NORM, (2, 3, 5)),
        (nn.InstanceNorm2d(3, affine=True), ["weight_shape", "bias_shape", *NORM, *AFFINE], (2, 3, 5, 4)),
        (nn.InstanceNorm3d(3), NORM, (2, 3, 2, 3, 4)),
        (
            nn.GroupNorm(2, 4),
            ["weight_shape", "bias_shape", "split", *NORM, "merge", *AFFINE],
            (2, 4, 5),
        ),
        (nn.GroupNorm(2, 4, affine=False), ["split", *NORM, "merge"], (2, 4, 5, 3)),
        (
            nn.GroupNorm(4, 4),
            ["weight_shape", "bias_shape", "split", *NORM, "merge", *AFFINE],
            (2, 4, 2, 3, 2),
        ),
    ],
    ids=str,
)
def test_norms(layer: nn.Module, parts: list[str], shape: tuple[int, ...]) -> None:
    apart = check(Holds(layer), parts, shape)

    assert "layer.rsqrt" in apart.op_names
    if any(True for _ in layer.parameters()):
        assert torch.equal(apart.get_submodule("layer").weight, layer.weight)


def test_division_by_an_activation_only() -> None:
    _, apart, _ = taken_apart(Calls(lambda a, b: a / b.abs().add(1)), (2, 3, 4), (2, 1, 4))
    _, constant, _ = taken_apart(Calls(lambda a: a / 3.0), (2, 3))

    assert [n.rpartition(".")[2] for n in apart.op_names][-2:] == ["reciprocal", "mul"]
    assert [op.kind for op in constant.ops] == ["Div"]


def test_a_square_written_as_a_power() -> None:
    _, apart, _ = taken_apart(Calls(lambda a: a**2 + a.abs() ** 1.5), (2, 3))

    assert [op.kind for op in apart.ops] == ["Square", "Abs", "Pow", "Add"]


def test_parts_of_a_folded_graph_train_on() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(self.norm(self.bn(self.conv(x))).flatten(1), -1)

    graph, apart, xs = taken_apart(Network().eval(), (2, 3, 4, 4))
    folded = fold_batchnorm(apart).eval()
    torch.testing.assert_close(folded(*xs), graph(*xs), rtol=1e-4, atol=1e-5)
    apart(*xs)[:, 0].sum().backward()

    assert all(p.grad is not None for p in apart.parameters())
    assert dict(apart.named_parameters()).keys() == dict(graph.named_parameters()).keys()


@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e-6, 1.0])
def test_the_root_of_a_norm_is_finite_for_every_code(variance: float) -> None:
    _, apart, _ = taken_apart(Holds(nn.LayerNorm(6)), (2, 6))
    function = apart.op("layer.rsqrt").table_function()
    assert function is not None

    found = function(torch.tensor([variance, -1.0], dtype=torch.float64))

    expected = torch.tensor([variance, 0.0], dtype=torch.float64).add(1e-5).rsqrt()
    torch.testing.assert_close(found, expected)

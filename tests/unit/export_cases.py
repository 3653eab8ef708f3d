"""Small hand-made graphs, and plans solved for them, for the tests of export and proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bitwright.calibrate.collect import collect
from bitwright.calibrate.solve import Solver
from bitwright.graph.graph import Graph, GraphInfo, GraphInput
from bitwright.graph.op import Op
from bitwright.graph.replay import Replay
from bitwright.importers.assemble import Assembler, look_at_values
from bitwright.ops.conv import Conv
from bitwright.ops.elementwise import Elementwise
from bitwright.ops.linear import Linear, MatMul
from bitwright.ops.shape import Flatten
from bitwright.ops.unary import Unary
from bitwright.plan.assign import assign
from bitwright.plan.plan import Plan
from bitwright.plan.target import Target, load_target
from bitwright.runtime.session import Session


class Builder:
    """An `Assembler` with random constants; `done` looks at the values once."""

    def __init__(self, seed: int = 0) -> None:
        self.assembler = Assembler()
        self.random = torch.Generator().manual_seed(seed)

    def input(self, name: str, *shape: int | None, dtype: torch.dtype = torch.float32) -> str:
        self.assembler.add_input(GraphInput(name, shape, dtype))
        return name

    def constant(self, name: str, *shape: int, scale: float = 0.3) -> str:
        return self.assembler.add_constant(name, torch.randn(shape, generator=self.random) * scale)

    def op(self, op: Op, name: str, *inputs: str | None, outputs: Sequence[str] | None = None) -> str:
        self.assembler.add_op(op, name, inputs, outputs or [name])
        return name

    def conv(
        self, name: str, x: str, channels: tuple[int, int], *, kernel: int = 3, bias: bool = True
    ) -> str:
        inputs, made = channels
        weight = self.constant(f"{name}.weight", made, inputs, kernel, kernel)
        b = self.constant(f"{name}.bias", made) if bias else None
        pad = kernel // 2
        conv = Conv((kernel, kernel), stride=(1, 1), pads=[pad] * 4, dilation=(1, 1), groups=1)
        return self.op(conv, name, x, weight, b)

    def linear(self, name: str, x: str, inputs: int, outputs: int) -> str:
        weight, bias = (
            self.constant(f"{name}.weight", outputs, inputs),
            self.constant(f"{name}.bias", outputs),
        )
        return self.op(Linear(), name, x, weight, bias)

    def done(self, *outputs: str) -> Graph:
        info = GraphInfo(source="torch", inputs=(), outputs=(), dynamic_batch=True, example_batch=2)
        graph = self.assembler.finish(outputs[0] if len(outputs) == 1 else tuple(outputs), info)
        example, double = samples(graph, 2), samples(graph, 4)
        graph.info = replace(graph.info, values=look_at_values(graph, example, double))
        graph.refresh()
        return graph


def samples(graph: Graph, n: int, seed: int = 1) -> dict[str, Tensor]:
    """Normal random numbers, or indices 0 … 3, for every input."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for spec in graph.info.inputs:
        shape = [n if d is None else d for d in spec.shape]
        found[spec.name] = (
            torch.randn(shape, generator=random).to(spec.dtype)
            if spec.dtype.is_floating_point
            else torch.randint(0, 4, shape, generator=random).to(spec.dtype)
        )
    return found


def residual() -> Graph:
    """conv1 → relu1 → conv2 → add (with relu1's output) → relu2 → flatten → fc."""
    b = Builder()
    x = b.input("x", None, 3, 6, 6)
    first = b.op(Unary("Relu"), "relu1", b.conv("conv1", x, (3, 4)))
    added = b.op(Elementwise("Add"), "add", b.conv("conv2", first, (4, 4)), first)
    b.op(Unary("Relu"), "relu2", added)
    return b.done(b.linear("fc", b.op(Flatten(1), "flatten", "relu2"), 4 * 36, 5))


def attention() -> Graph:
    """Two products of activations and a softmax in between, on rank-3 values: queries times keys, times values."""
    b = Builder(3)
    x = b.input("x", None, 7, 8)
    q, k = b.linear("q", x, 8, 8), b.input("k", None, 8, 7)
    scores = b.op(MatMul(), "scores", q, k)
    scaled = b.op(Elementwise("Mul", scalar=0.35), "scaled", scores)
    return b.done(b.op(MatMul(), "mix", b.op(Unary("Sigmoid"), "gate", scaled), q))


def solved(
    graph: Graph, target: str | Target, *, method: str = "max", asked: dict[str, str] | None = None
) -> Plan:
    """The plan of *target*, calibrated on 16 random samples. *asked*: operator -> precision."""
    data = samples(graph, 16, seed=2)
    chosen = load_target(target) if isinstance(target, str) else target
    plan = assign(graph, chosen, asked=asked, method=method)  # type: ignore[arg-type]
    return Solver(graph, chosen, collect(graph, [data])).solve(plan)


def runs_alike(graph: Graph, model: object, *, tolerance: float = 2e-5) -> None:
    """Assert that ONNX Runtime computes from *model* what the graph computes."""
    data = samples(graph, 3, seed=5)
    ours = Replay(graph).run(data)
    theirs = Session(model, optimisation="disabled").run(data)  # type: ignore[arg-type]
    assert set(theirs) == set(graph.info.outputs)
    for name, x in theirs.items():
        np.testing.assert_allclose(x, np.asarray(ours[name]), rtol=tolerance, atol=tolerance)

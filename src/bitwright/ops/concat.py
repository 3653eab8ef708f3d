"""Joining values along an axis that exists, or along a new one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitwright.graph.op import Emitter, Op
from bitwright.ops.sizes import int_constant
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall


class Concat(Op):
    """All inputs behind one another along *axis*."""

    kind = "Concat"

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.axis)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("Concat", inputs, self.outputs, axis=self.axis)

    def describe(self) -> str:
        return f"axis={self.axis}"


class Stack(Op):
    """All inputs behind one another along a new *axis*."""

    kind = "Stack"

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.stack(xs, self.axis)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        axes = int_constant(emit, [self.axis], "axes")
        parts = [emit.temporary(f"part_{i}") for i in range(len(inputs))]
        for x, part in zip(inputs, parts, strict=True):
            emit.node("Unsqueeze", [x, axes], [part])
        emit.node("Concat", parts, self.outputs, axis=self.axis)

    def describe(self) -> str:
        return f"axis={self.axis}"


@ONNX.register("Concat")
def _concat_from_onnx(call: OnnxCall) -> Built:
    return Built(Concat(call.attributes["axis"]), call.inputs)


@ATEN.register("cat", "concat", "concatenate")
def _concat_from_aten(call: AtenCall) -> Built:
    return Built(Concat(call["dim"]), tuple(call["tensors"]))


@ATEN.register("stack")
def _stack_from_aten(call: AtenCall) -> Built:
    return Built(Stack(call["dim"]), tuple(call["tensors"]))

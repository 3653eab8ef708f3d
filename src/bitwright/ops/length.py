"""Operators that read shapes: the length of one axis, a shape vector, the number of elements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall


class Size(Op):
    """The length of one axis, as a Python integer."""

    kind = "Size"
    roles = (Role.INDEX,)

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> int:
        return int(x.shape[self.axis])

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        shape = emit.temporary("shape")
        emit.node("Shape", inputs, [shape])
        axis = emit.constant(np.array(self.axis, dtype=np.int64), "axis")
        emit.node("Gather", [shape, axis], self.outputs, axis=0)

    def describe(self) -> str:
        return f"axis={self.axis}"


class Shape(Op):
    """The lengths of the axes from *start* to *end* (exclusive, None: to the last), `[k]` int64."""

    kind = "Shape"
    roles = (Role.INDEX,)

    def __init__(self, start: int = 0, end: int | None = None) -> None:
        super().__init__()
        self.start, self.end = start, end

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(x.shape[self.start : self.end], dtype=torch.int64, device=x.device)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node(
            "Shape", inputs, self.outputs, start=self.start, **({} if self.end is None else {"end": self.end})
        )


class ElementCount(Op):
    """The number of elements, `[]` int64."""

    kind = "ElementCount"
    roles = (Role.INDEX,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(math.prod(x.shape), dtype=torch.int64, device=x.device)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("Size", inputs, self.outputs)


@ATEN.register("sym_size")
def _size_from_aten(call: AtenCall) -> Built:
    return Built(Size(call["dim"]), (call["self"],))


@ONNX.register("Shape")
def _shape_from_onnx(call: OnnxCall) -> Built:
    return Built(Shape(call.attribute("start", 0), call.attribute("end", None)), (call.inputs[0],))


@ONNX.register("Size")
def _count_from_onnx(call: OnnxCall) -> Built:
    return Built(ElementCount(), (call.inputs[0],))

"""Softmax and its relatives along one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitwright.graph.op import Emitter, Op
from bitwright.ops.elementwise import seen
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


_FUNCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Softmax": torch.softmax,
    "LogSoftmax": torch.log_softmax,
    "Hardmax": _hardmax,
}


class Softmax(Op):
    """Softmax, LogSoftmax or Hardmax (one-hot of the first maximum) along *axis*."""

    def __init__(self, kind: str, *, axis: int) -> None:
        super().__init__()
        self.__dict__["kind"] = kind
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return _FUNCTIONS[self.kind](x, self.axis)

    def output_range(self) -> tuple[float, float] | None:
        return None if self.kind == "LogSoftmax" else (0.0, 1.0)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node(self.kind, inputs, self.outputs, axis=self.axis)

    def describe(self) -> str:
        return f"axis={self.axis}"


@ATEN.register("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax_from_aten(call: AtenCall) -> Built | None:
    dtype = call.args.get("dtype")
    if dtype is not None and dtype != seen(call["self"]).dtype:
        return None
    kind = "LogSoftmax" if "log" in call.target else "Softmax"
    return Built(Softmax(kind, axis=call["dim"]), (call["self"],))


@ONNX.register("Softmax", "LogSoftmax", "Hardmax")
def _softmax_from_onnx(call: OnnxCall) -> Built:
    if call.opset >= 13:
        return Built(Softmax(call.op_type, axis=call.attribute("axis", -1)), (call.inputs[0],))
    # Until opset 12 all axes from `axis` on were normalised together: the same only if it is the last one.
    axis, shape = call.attribute("axis", 1), call.shape(call.inputs[0])
    if axis != -1 and (shape is None or axis != len(shape) - 1):
        raise Unsupported("before opset 13 only the last axis can be normalised")
    return Built(Softmax(call.op_type, axis=-1), (call.inputs[0],))

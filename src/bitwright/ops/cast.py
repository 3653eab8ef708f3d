"""Conversion between data types."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx import TensorProto
from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported

#: torch dtype -> ONNX element type.
ELEMENTS: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.int16: TensorProto.INT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
DTYPES = {element: dtype for dtype, element in ELEMENTS.items()}


class Cast(Op):
    """x as another data type."""

    kind = "Cast"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("Cast", inputs, self.outputs, to=ELEMENTS[self.dtype])

    def describe(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class CastLike(Op):
    """x as the data type of the second input."""

    kind = "CastLike"
    roles = (Role.ACTIVATION, Role.INDEX)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("CastLike", inputs, self.outputs)


@ONNX.register("Cast")
def _cast_from_onnx(call: OnnxCall) -> Built:
    to = call.attributes["to"]
    if to not in DTYPES:
        raise Unsupported(f"to={TensorProto.DataType.Name(to)}")
    return Built(Cast(DTYPES[to]), (call.inputs[0],))


@ONNX.register("CastLike")
def _cast_like_from_onnx(call: OnnxCall) -> Built:
    return Built(CastLike(), (call.inputs[0], call.inputs[1]))


@ATEN.register("to", "_to_copy")
def _cast_from_aten(call: AtenCall) -> Built | None:
    if "other" in call.args:
        return Built(CastLike(), (call["self"], call["other"]))
    dtype = call.args.get("dtype")
    if dtype is None:  # another device or layout only
        seen = call["self"].meta.get("val") if isinstance(call["self"], fx.Node) else None
        dtype = seen.dtype if isinstance(seen, Tensor) else None
    return Built(Cast(dtype), (call["self"],)) if dtype in ELEMENTS else None


@ATEN.register("type_as")
def _type_as_from_aten(call: AtenCall) -> Built:
    return Built(CastLike(), (call["self"], call["other"]))

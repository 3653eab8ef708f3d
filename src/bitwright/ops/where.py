"""Selection between two values, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.elementwise import ELEMENT_TYPES, TORCH_TYPES, dtype_of, seen
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall


class Where(Op):
    """`a` where the condition holds, else `b`. Inputs: condition, then those of a and b that are not *constants*."""

    kind = "Where"
    roles = (Role.INDEX, Role.ACTIVATION, Role.ACTIVATION)

    def __init__(
        self, *, a: float | None = None, b: float | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.a, self.b, self.dtype = a, b, dtype

    def forward(self, condition: Tensor, *xs: Tensor) -> Tensor:
        rest = iter(xs)
        a, b = (next(rest) if v is None else v for v in (self.a, self.b))
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            a = torch.tensor(a, dtype=self.dtype)
        return torch.where(condition, a, b)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        numpy_type = ELEMENT_TYPES[self.dtype or torch.float32][1]
        rest = iter(inputs[1:])
        names = [
            next(rest) if v is None else emit.constant(np.asarray(v, dtype=numpy_type), hint)
            for v, hint in ((self.a, "a"), (self.b, "b"))
        ]
        emit.node("Where", [inputs[0], *names], self.outputs)

    def describe(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in (("a", self.a), ("b", self.b)) if v is not None)


def _where(condition: Any, a: Any, b: Any) -> Built | None:
    dtype = torch.result_type(seen(a), seen(b))
    nodes = [x for x in (a, b) if isinstance(x, fx.Node)]
    if dtype not in ELEMENT_TYPES or any(dtype_of(n) != dtype for n in nodes):
        return None
    constants = [None if isinstance(x, fx.Node) else x for x in (a, b)]
    return Built(Where(a=constants[0], b=constants[1], dtype=dtype), (condition, *nodes))


@ATEN.register("where")
def _where_from_aten(call: AtenCall) -> Built | None:
    return None if "self" not in call.args else _where(call["condition"], call["self"], call["other"])


@ATEN.register("masked_fill")
def _masked_fill_from_aten(call: AtenCall) -> Built | None:
    return _where(call["mask"], call["value"], call["self"])


@ONNX.register("Where")
def _where_from_onnx(call: OnnxCall) -> Built:
    values: list[Any] = [call.inputs[1], call.inputs[2]]
    dtype = None
    for i in (0, 1):
        array = call.constant(i + 1)
        if array is not None and array.ndim == 0 and array.dtype in TORCH_TYPES and dtype is None:
            dtype, values[i] = TORCH_TYPES[array.dtype], array.item()
    constants = [None if isinstance(v, str) else v for v in values]
    return Built(
        Where(a=constants[0], b=constants[1], dtype=dtype),
        (call.inputs[0], *(v for v in values if isinstance(v, str))),
    )

"""Clipping between two bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.elementwise import ELEMENT_TYPES, seen
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall


class Clip(Op):
    """x held between *lo* and *hi* (None: unbounded). Bounds that are not constant are further inputs, in that order."""

    kind = "Clip"
    roles = (Role.ACTIVATION, Role.PARAMETER)

    def __init__(
        self,
        lo: float | None = None,
        hi: float | None = None,
        *,
        lo_is_input: bool = False,
        hi_is_input: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.lo, self.hi, self.dtype = lo, hi, dtype
        self.lo_is_input, self.hi_is_input = lo_is_input, hi_is_input

    def forward(self, x: Tensor, *bounds: Tensor) -> Tensor:
        rest = iter(bounds)
        lo = next(rest) if self.lo_is_input else self.lo
        hi = next(rest) if self.hi_is_input else self.hi
        if isinstance(lo, float) and isinstance(hi, float) and lo <= hi and x.is_floating_point():
            return functional.hardtanh(
                x, lo, hi
            )  # the same numbers; its gradient is one kernel, clamp's is four
        if lo is not None:
            x = torch.clamp(x, min=lo)
        return x if hi is None else torch.clamp(x, max=hi)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        rest = iter(inputs[1:])
        x, numpy_type = inputs[0], ELEMENT_TYPES[self.dtype][1]

        def bound(value: float | None, is_input: bool, hint: str) -> str | None:
            if is_input:
                return next(rest)
            return None if value is None else emit.constant(np.asarray(value, dtype=numpy_type), hint)

        lo, hi = bound(self.lo, self.lo_is_input, "lo"), bound(self.hi, self.hi_is_input, "hi")
        if not (self.lo_is_input or self.hi_is_input):
            emit.node("Clip", [x, lo, hi], self.outputs)
            return
        # Clip wants scalar bounds; Max and Min broadcast.
        if lo is not None:
            inner = self.outputs[0] if hi is None else emit.temporary("floor")
            emit.node("Max", [x, lo], [inner])
            x = inner
        if hi is not None:
            emit.node("Min", [x, hi], self.outputs)

    def output_range(self) -> tuple[float, float] | None:
        if self.lo is None or self.hi is None:
            return None
        return float(self.lo), float(self.hi)

    def describe(self) -> str:
        return f"lo={'·' if self.lo_is_input else self.lo}, hi={'·' if self.hi_is_input else self.hi}"


def _clip(x: Any, lo: Any, hi: Any) -> Built | None:
    bounds = [b for b in (lo, hi) if isinstance(b, fx.Node)]
    dtype = seen(x).dtype
    if dtype not in ELEMENT_TYPES or any(
        torch.result_type(seen(x), seen(b)) != dtype for b in (lo, hi) if b is not None
    ):
        return None
    op = Clip(
        None if isinstance(lo, fx.Node) else lo,
        None if isinstance(hi, fx.Node) else hi,
        lo_is_input=isinstance(lo, fx.Node),
        hi_is_input=isinstance(hi, fx.Node),
        dtype=dtype,
    )
    return Built(op, (x, *bounds))


@ATEN.register("relu6")
def _relu6_from_aten(call: AtenCall) -> Built | None:
    return _clip(call["self"], 0.0, 6.0)


@ATEN.register("hardtanh")
def _hardtanh_from_aten(call: AtenCall) -> Built | None:
    return _clip(call["self"], call["min_val"], call["max_val"])


@ATEN.register("clamp", "clip", "clamp_min", "clamp_max")
def _clamp_from_aten(call: AtenCall) -> Built | None:
    return _clip(call["self"], call.args.get("min"), call.args.get("max"))


@ONNX.register("Clip")
def _clip_from_onnx(call: OnnxCall) -> Built:
    values: list[Any] = [call.attributes.get("min"), call.attributes.get("max")]  # attributes until opset 10
    inputs: list[str] = [call.inputs[0]]
    is_input, dtype = [False, False], torch.float32
    for i in (0, 1):
        name, array = call.input(i + 1), call.constant(i + 1)
        if name is not None and (array is None or array.size != 1):
            is_input[i] = True
            inputs.append(name)
        elif array is not None:
            values[i] = array.reshape(()).item()
            dtype = torch.from_numpy(np.array(array)).dtype
    op = Clip(values[0], values[1], lo_is_input=is_input[0], hi_is_input=is_input[1], dtype=dtype)
    return Built(op, tuple(inputs))

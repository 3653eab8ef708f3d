"""Values made from shapes and numbers alone: filled tensors and ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.cast import ELEMENTS
from bitwright.ops.sizes import Sizes, as_vector, emit_sizes, resolve, split_sizes
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported


def _scalar(value: float, dtype: torch.dtype) -> Any:
    """A zero-dimensional numpy array."""
    return torch.tensor(value, dtype=dtype).numpy()


class Fill(Op):
    """A tensor of *shape* (`Sizes`) with *value* everywhere."""

    kind = "Fill"
    roles = (Role.INDEX,)

    def __init__(self, shape: Sizes, *, value: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.value, self.dtype = shape, value, dtype
        # Moves with the graph: where results are made.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def forward(self, *given: Any) -> Tensor:
        device = self.get_buffer("anchor").device
        return torch.full(resolve(self.shape, given), self.value, dtype=self.dtype, device=device)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        value = emit.constant(_scalar(self.value, self.dtype), "value")
        emit.node("Expand", [value, emit_sizes(emit, self.shape, inputs, "shape")], self.outputs)

    def describe(self) -> str:
        return f"shape={'?' if self.shape is None else self.shape}, value={self.value}"


class FillLike(Op):
    """*value* everywhere, in the shape of the input."""

    kind = "FillLike"
    roles = (Role.INDEX,)

    def __init__(self, *, value: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.value, self.dtype = value, dtype

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.value, dtype=self.dtype)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        shape = emit.temporary("shape")
        emit.node("Shape", inputs, [shape])
        emit.node("Expand", [emit.constant(_scalar(self.value, self.dtype), "value"), shape], self.outputs)

    def describe(self) -> str:
        return f"value={self.value}"


class Range(Op):
    """*start*, *start* + *step*, … below *end*, `[k]`. None: given at run time, in this order."""

    kind = "Range"
    roles = (Role.INDEX,)

    def __init__(
        self, start: float | None, end: float | None, step: float | None, *, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.bounds = (start, end, step)
        self.dtype = dtype
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def forward(self, *given: Any) -> Tensor:
        rest = iter(given)
        bounds = [next(rest) if b is None else b for b in self.bounds]
        dtype = self.dtype or next((b.dtype for b in bounds if isinstance(b, Tensor)), torch.int64)
        numbers = [b.item() if isinstance(b, Tensor) else b for b in bounds]
        start, end, step = numbers
        end = max(start, end) if step > 0 else min(start, end)  # an empty range, where torch refuses
        return torch.arange(start, end, step, dtype=dtype, device=self.get_buffer("anchor").device)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        dtype = self.dtype or torch.int64
        rest = iter(inputs)
        names: list[str | None] = []
        for bound, hint in zip(self.bounds, ("start", "end", "step"), strict=True):
            if bound is not None:
                names.append(emit.constant(_scalar(bound, dtype), hint))
            elif self.dtype in (None, torch.int64):
                names.append(next(rest))
            else:
                names.append(emit.temporary(hint))
                emit.node("Cast", [next(rest)], [str(names[-1])], to=ELEMENTS[dtype])
        emit.node("Range", names, self.outputs)

    def describe(self) -> str:
        return ", ".join("?" if b is None else str(b) for b in self.bounds)


# --- ONNX ----------------------------------------------------------------------------------------------------


@ONNX.register("ConstantOfShape")
def _fill_from_onnx(call: OnnxCall) -> Built:
    value = np.asarray(call.attribute("value", np.zeros(1, dtype=np.float32))).reshape(-1)
    dtype = torch.from_numpy(value.copy()).dtype
    shape = as_vector(call.constant(0))
    op = Fill(shape, value=value[0].item(), dtype=dtype)
    return Built(op, () if shape is not None else (call.inputs[0],))


@ONNX.register("Range")
def _range_from_onnx(call: OnnxCall) -> Built:
    bounds, given = [], []
    dtype: torch.dtype | None = None
    for index in range(3):
        array = call.constant(index)
        bounds.append(None if array is None else array.item())
        if array is None:
            given.append(call.inputs[index])
        else:
            dtype = torch.from_numpy(np.array(array)).dtype
    return Built(Range(*bounds, dtype=dtype), tuple(given))


@ONNX.register("EyeLike")
def _eye_from_onnx(call: OnnxCall) -> Built:
    raise Unsupported("the shape must be known before run time")


# --- ATen ----------------------------------------------------------------------------------------------------


def _dtype(call: AtenCall, *values: Any) -> torch.dtype:
    """The dtype asked for, else torch's default for these numbers."""
    asked = call.args.get("dtype")
    if isinstance(asked, torch.dtype):
        return asked
    if any(isinstance(v, float) for v in values):
        return torch.get_default_dtype()
    return torch.bool if values and all(isinstance(v, bool) for v in values) else torch.int64


@ATEN.register("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
def _fill_from_aten(call: AtenCall) -> Built | None:
    name = call.target
    value: Any = 0.0 if "zeros" in name else 1.0 if "ones" in name else call["fill_value"]
    dtype = (
        _seen(call["self"])
        if name.startswith("new_") and call.args.get("dtype") is None
        else _dtype(call, value)
    )
    if dtype not in ELEMENTS or isinstance(value, fx.Node):
        return None
    shape, given = split_sizes(call["size"])
    return Built(Fill(shape, value=value, dtype=dtype), given)


@ATEN.register("zeros_like", "ones_like", "full_like")
def _fill_like_from_aten(call: AtenCall) -> Built | None:
    name = call.target
    value: Any = 0.0 if "zeros" in name else 1.0 if "ones" in name else call["fill_value"]
    dtype = call.args.get("dtype") or _seen(call["self"])
    if dtype not in ELEMENTS or isinstance(value, fx.Node):
        return None
    return Built(FillLike(value=value, dtype=dtype), (call["self"],))


@ATEN.register("scalar_tensor")
def _scalar_from_aten(call: AtenCall) -> Built | None:
    value = call["s"]
    dtype = call.args.get("dtype") or torch.get_default_dtype()
    if isinstance(value, fx.Node) or dtype not in ELEMENTS:
        return None
    return Built(Fill((), value=value, dtype=dtype), ())


@ATEN.register("arange")
def _range_from_aten(call: AtenCall) -> Built | None:
    bounds = [call.args.get("start", 0), call["end"], call.args.get("step", 1)]
    dtype = _dtype(call, *bounds)
    if dtype not in ELEMENTS:
        return None
    given = tuple(b for b in bounds if isinstance(b, fx.Node))
    op = Range(*(None if isinstance(b, fx.Node) else b for b in bounds), dtype=dtype)
    return Built(op, given)


def _seen(value: Any) -> torch.dtype | None:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return found.dtype if isinstance(found, Tensor) else None

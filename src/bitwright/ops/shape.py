"""Operators that only change the shape or the order of axes: reshape, flatten, squeeze, unsqueeze, transpose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.sizes import Sizes, as_vector, emit_sizes, int_constant, resolve
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, ints


class Reshape(Op):
    """x in another shape. *shape*: `Sizes`; 0 copies x's length at that place (unless *zero_is_zero*), -1 is inferred."""

    kind = "Reshape"
    roles = (Role.ACTIVATION, Role.INDEX)
    passthrough = True

    def __init__(self, shape: Sequence[int | None] | None, *, zero_is_zero: bool = False) -> None:
        super().__init__()
        self.shape: Sizes = None if shape is None else tuple(shape)
        self.zero_is_zero = zero_is_zero

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        target = resolve(self.shape, given)
        if not self.zero_is_zero:
            target = tuple(x.shape[i] if t == 0 else t for i, t in enumerate(target))
        return x.reshape(target)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        shape = emit_sizes(emit, self.shape, inputs[1:], "shape")
        emit.node("Reshape", [inputs[0], shape], self.outputs, allowzero=int(self.zero_is_zero))

    def describe(self) -> str:
        return f"shape={'?' if self.shape is None else self.shape}"


class Flatten(Op):
    """x as a matrix: the axes before *axis* become one, and those from *axis* on."""

    kind = "Flatten"
    passthrough = True

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        axis = self.axis + x.dim() if self.axis < 0 else self.axis
        return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("Flatten", inputs, self.outputs, axis=self.axis)

    def describe(self) -> str:
        return f"axis={self.axis}"


class Squeeze(Op):
    """x without the given axes, which have length 1; without all axes of length 1 if *axes* is None."""

    kind = "Squeeze"
    passthrough = True

    def __init__(self, axes: Sequence[int] | None) -> None:
        super().__init__()
        self.axes = None if axes is None else tuple(axes)

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze() if self.axes is None else x.squeeze(self.axes)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        if self.axes == ():
            emit.node("Identity", inputs, self.outputs)
            return
        axes = None if self.axes is None else int_constant(emit, self.axes, "axes")
        emit.node("Squeeze", [inputs[0], axes], self.outputs)

    def describe(self) -> str:
        return f"axes={self.axes}"


class Unsqueeze(Op):
    """x with new axes of length 1. *axes*: places in the output's shape."""

    kind = "Unsqueeze"
    passthrough = True

    def __init__(self, axes: Sequence[int]) -> None:
        super().__init__()
        self.axes = tuple(axes)

    def forward(self, x: Tensor) -> Tensor:
        rank = x.dim() + len(self.axes)
        for axis in sorted(a % rank for a in self.axes):
            x = x.unsqueeze(axis)
        return x

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("Unsqueeze", [inputs[0], int_constant(emit, self.axes, "axes")], self.outputs)

    def describe(self) -> str:
        return f"axes={self.axes}"


class Transpose(Op):
    """x with its axes in another order; reversed if *perm* is None."""

    kind = "Transpose"
    passthrough = True

    def __init__(self, perm: Sequence[int] | None) -> None:
        super().__init__()
        self.perm = None if perm is None else tuple(perm)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(tuple(range(x.dim()))[::-1] if self.perm is None else self.perm)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node(
            "Transpose", inputs, self.outputs, **({} if self.perm is None else {"perm": list(self.perm)})
        )

    def describe(self) -> str:
        return f"perm={self.perm}"


# --- ONNX ----------------------------------------------------------------------------------------------------


@ONNX.register("Reshape")
def _reshape_from_onnx(call: OnnxCall) -> Built:
    shape = as_vector(call.constant(1))
    op = Reshape(shape, zero_is_zero=bool(call.attribute("allowzero", 0)))
    return Built(op, (call.inputs[0],) if shape is not None else (call.inputs[0], call.inputs[1]))


@ONNX.register("Flatten")
def _flatten_from_onnx(call: OnnxCall) -> Built:
    return Built(Flatten(call.attribute("axis", 1)), (call.inputs[0],))


@ONNX.register("Squeeze")
def _squeeze_from_onnx(call: OnnxCall) -> Built:
    axes = None if call.input(1) is None else ints(call.required_constant(1, "axes"))
    return Built(Squeeze(axes), (call.inputs[0],))


@ONNX.register("Unsqueeze")
def _unsqueeze_from_onnx(call: OnnxCall) -> Built:
    return Built(Unsqueeze(ints(call.required_constant(1, "axes"))), (call.inputs[0],))


@ONNX.register("Transpose")
def _transpose_from_onnx(call: OnnxCall) -> Built:
    return Built(Transpose(call.attribute("perm", None)), (call.inputs[0],))


# --- ATen ----------------------------------------------------------------------------------------------------


@ATEN.register("view", "reshape", "_unsafe_view", "unflatten")
def _reshape_from_aten(call: AtenCall) -> Built | None:
    x = call["self"]
    asked = next((call.args[k] for k in ("size", "shape") if k in call.args), None)
    shape = call.output_shape
    if shape.count(None) <= 1:
        return Built(Reshape([-1 if d is None else d for d in shape]), (x,))
    if not isinstance(asked, (list, tuple)) or len(asked) != len(shape):
        return None
    sizes: list[int | None] = []
    given: list[fx.Node] = []
    for i, (length, wish) in enumerate(zip(shape, asked, strict=True)):
        if length is not None:
            sizes.append(length)
        elif isinstance(wish, fx.Node) and not _is_length(wish, x, i):
            sizes.append(None)
            given.append(wish)
        else:
            sizes.append(0 if isinstance(wish, fx.Node) else -1)
    return Built(Reshape(sizes), (x, *given))


def _is_length(node: fx.Node, x: Any, axis: int) -> bool:
    """True if *node* is the length of x's *axis*."""
    return node.target is torch.ops.aten.sym_size.int and node.args[0] is x and bool(node.args[1] == axis)


@ATEN.register("flatten")
def _flatten_from_aten(call: AtenCall) -> Built | None:
    x, rank = call["self"], len(call.shape(call["self"]))
    if rank == 0:
        return Built(Reshape([1]), (x,))
    start, end = call["start_dim"] % rank, call["end_dim"] % rank
    if start == 1 and end == rank - 1:
        return Built(Flatten(1), (x,))
    shape = call.output_shape
    if shape.count(None) <= 1:
        return Built(Reshape([-1 if d is None else d for d in shape]), (x,))
    # Lengths before the flattened axes stay at their places; the flattened one is inferred.
    sizes = [0 if i < start else -1 if i == start else d for i, d in enumerate(shape)]
    return None if None in sizes else Built(Reshape(sizes), (x,))


@ATEN.register("squeeze")
def _squeeze_from_aten(call: AtenCall) -> Built:
    shape = call.shape(call["self"])
    dims = call.args.get("dim", range(len(shape)))
    asked = [dims] if isinstance(dims, int) else list(dims)
    # torch leaves an axis alone whose length is not 1; at capture lengths are known, except the batch's.
    axes = [d % len(shape) for d in asked if shape and shape[d] == 1]
    return Built(Squeeze(axes), (call["self"],))


@ATEN.register("unsqueeze")
def _unsqueeze_from_aten(call: AtenCall) -> Built:
    return Built(Unsqueeze([call["dim"]]), (call["self"],))


@ATEN.register("permute")
def _permute_from_aten(call: AtenCall) -> Built:
    dims = call["dims"]
    return Built(Transpose([d % len(dims) for d in dims]), (call["self"],))


@ATEN.register("transpose", "swapaxes", "swapdims")
def _transpose_from_aten(call: AtenCall) -> Built:
    a, b = (call[k] for k in (("dim0", "dim1") if "dim0" in call.args else ("axis0", "axis1")))
    return _swapped(call, a, b)


@ATEN.register("t", "numpy_T", "mT", "matrix_H", "adjoint")
def _matrix_transpose_from_aten(call: AtenCall) -> Built:
    rank = len(call.shape(call["self"]))
    if call.target == "numpy_T":
        return Built(Transpose(range(rank)[::-1]), (call["self"],))
    return _swapped(call, -1, -2) if rank > 1 else Built(Transpose(range(rank)), (call["self"],))


def _swapped(call: AtenCall, a: int, b: int) -> Built:
    perm = list(range(len(call.shape(call["self"]))))
    if perm:
        perm[a], perm[b] = perm[b], perm[a]
    return Built(Transpose(perm), (call["self"],))


@ATEN.register("movedim", "moveaxis")
def _movedim_from_aten(call: AtenCall) -> Built:
    rank = len(call.shape(call["self"]))
    sources, targets = (
        [d % rank for d in ([call[k]] if isinstance(call[k], int) else call[k])]
        for k in ("source", "destination")
    )
    rest = iter(d for d in range(rank) if d not in sources)
    perm = [sources[targets.index(i)] if i in targets else next(rest) for i in range(rank)]
    return Built(Transpose(perm), (call["self"],))

"""Operators that only rearrange: their output holds the input's elements in another shape or order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.sizes import FAR, Sizes, as_vector, emit_sizes, int_constant, resolve
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported, ints


class Reshape(Op):
    """x in another shape. *shape*: `Sizes`; 0 copies x's length at that place (unless *zero_is_zero*), -1 is inferred."""

    kind = "Reshape"
    roles = (Role.ACTIVATION, Role.INDEX)
    passthrough = True

    def __init__(self, shape: Sizes, *, zero_is_zero: bool = False) -> None:
        super().__init__()
        self.shape, self.zero_is_zero = shape, zero_is_zero

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
        emit.node("Transpose", inputs, self.outputs, **({} if self.perm is None else {"perm": list(self.perm)}))

    def describe(self) -> str:
        return f"perm={self.perm}"


class Expand(Op):
    """x repeated along axes of length 1, and along new leading axes. *shape*: `Sizes`; a 1 keeps x's length."""

    kind = "Expand"
    roles = (Role.ACTIVATION, Role.INDEX)
    passthrough = True

    def __init__(self, shape: Sizes) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        return x.broadcast_to(torch.broadcast_shapes(tuple(x.shape), resolve(self.shape, given)))

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("Expand", [inputs[0], emit_sizes(emit, self.shape, inputs[1:], "shape")], self.outputs)

    def describe(self) -> str:
        return f"shape={'?' if self.shape is None else self.shape}"


class ExpandAs(Op):
    """x broadcast to the shape of the second input."""

    kind = "ExpandAs"
    roles = (Role.ACTIVATION, Role.INDEX)
    passthrough = True

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        return x.expand_as(like)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        shape = emit.temporary("shape")
        emit.node("Shape", [inputs[1]], [shape])
        emit.node("Expand", [inputs[0], shape], self.outputs)


class Tile(Op):
    """x laid side by side. *repeats*: `Sizes`, per axis; if longer than x's rank, x gets leading axes of length 1."""

    kind = "Tile"
    roles = (Role.ACTIVATION, Role.INDEX)
    passthrough = True

    def __init__(self, repeats: Sizes) -> None:
        super().__init__()
        self.repeats = repeats

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        return x.repeat(resolve(self.repeats, given))

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        x = inputs[0]
        assert x is not None
        shape = emit.shape(x)
        added = 0 if self.repeats is None or shape is None else len(self.repeats) - len(shape)
        if added > 0:
            wide = emit.temporary("wide")
            emit.node("Unsqueeze", [x, int_constant(emit, range(added), "axes")], [wide])
            x = wide
        emit.node("Tile", [x, emit_sizes(emit, self.repeats, inputs[1:], "repeats")], self.outputs)

    def describe(self) -> str:
        return f"repeats={'?' if self.repeats is None else self.repeats}"


class DepthToSpace(Op):
    """`[n, c b b, h, w]` to `[n, c, h b, w b]`. *mode*: `DCR` (block outermost in depth) or `CRD` (pixel shuffle)."""

    kind = "DepthToSpace"
    passthrough = True

    def __init__(self, block: int, *, mode: str) -> None:
        super().__init__()
        self.block, self.mode = block, mode

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        b = self.block
        if self.mode == "CRD":
            y = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
        else:
            y = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return y.reshape(n, c // b**2, h * b, w * b)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("DepthToSpace", inputs, self.outputs, blocksize=self.block, mode=self.mode)

    def describe(self) -> str:
        return f"block={self.block}, mode={self.mode}"


class SpaceToDepth(Op):
    """The inverse of `DepthToSpace`; ONNX knows the mode `DCR` only."""

    kind = "SpaceToDepth"
    passthrough = True

    def __init__(self, block: int, *, mode: str) -> None:
        super().__init__()
        self.block, self.mode = block, mode

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        b = self.block
        y = x.reshape(n, c, h // b, b, w // b, b)
        order = (0, 1, 3, 5, 2, 4) if self.mode == "CRD" else (0, 3, 5, 1, 2, 4)
        return y.permute(order).reshape(n, c * b**2, h // b, w // b)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        if self.mode == "DCR":
            emit.node("SpaceToDepth", inputs, self.outputs, blocksize=self.block)
            return
        assert inputs[0] is not None
        shape = emit.shape(inputs[0])
        assert shape is not None
        _, c, h, w = shape
        b = self.block
        split, ordered = emit.temporary("split"), emit.temporary("ordered")
        blocks = int_constant(emit, [0, c, h // b, b, w // b, b], "blocks")
        emit.node("Reshape", [inputs[0], blocks], [split])
        emit.node("Transpose", [split], [ordered], perm=[0, 1, 3, 5, 2, 4])
        emit.node(
            "Reshape", [ordered, int_constant(emit, [0, c * b**2, h // b, w // b], "shape")], self.outputs
        )

    def describe(self) -> str:
        return f"block={self.block}, mode={self.mode}"


class Flip(Op):
    """x with the order of elements reversed along *axes*."""

    kind = "Flip"
    passthrough = True

    def __init__(self, axes: Sequence[int]) -> None:
        super().__init__()
        self.axes = tuple(axes)

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(self.axes)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        n = len(self.axes)
        lists = ("starts", [-1] * n), ("ends", [-FAR] * n), ("axes", self.axes), ("steps", [-1] * n)
        emit.node("Slice", [inputs[0], *(int_constant(emit, v, hint) for hint, v in lists)], self.outputs)

    def describe(self) -> str:
        return f"axes={self.axes}"


class Size(Op):
    """The length of one axis, as a Python integer."""

    kind = "Size"
    roles = (Role.INDEX,)

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> int:
        return x.shape[self.axis]

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        shape = emit.temporary("shape")
        emit.node("Shape", inputs, [shape])
        axis = emit.constant(int_array(self.axis), "axis")
        emit.node("Gather", [shape, axis], self.outputs, axis=0)

    def describe(self) -> str:
        return f"axis={self.axis}"

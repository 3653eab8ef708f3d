"""Operators that repeat elements (expand, tile) or reverse their order (flip)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.sizes import FAR, Sizes, as_vector, emit_sizes, int_constant, resolve, split_sizes
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall


class Expand(Op):
    """x repeated along axes of length 1, and along new leading axes. *shape*: `Sizes`; a 1 keeps x's length."""

    kind = "Expand"
    roles = (Role.ACTIVATION, Role.INDEX)
    passthrough = True

    def __init__(self, shape: Sizes) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        asked = resolve(self.shape, given)
        shift = len(asked) - x.dim()
        # A 1 keeps x's length, and where x has more axes than asked for, so do they.
        kept = [x.shape[i - shift] if a == 1 and i >= shift else a for i, a in enumerate(asked)]
        return x.broadcast_to([*x.shape[: max(0, -shift)], *kept])

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


@ONNX.register("Expand")
def _expand_from_onnx(call: OnnxCall) -> Built:
    shape = as_vector(call.constant(1))
    return Built(Expand(shape), (call.inputs[0],) if shape is not None else (call.inputs[0], call.inputs[1]))


@ONNX.register("Tile")
def _tile_from_onnx(call: OnnxCall) -> Built:
    repeats = as_vector(call.constant(1))
    return Built(
        Tile(repeats), (call.inputs[0],) if repeats is not None else (call.inputs[0], call.inputs[1])
    )


@ATEN.register("expand", "broadcast_to")
def _expand_from_aten(call: AtenCall) -> Built:
    x, asked = call["self"], call["size"]
    own = call.shape(x)
    shift = len(asked) - len(own)
    sizes: list[int | None] = []
    given: list[fx.Node] = []
    for i, wish in enumerate(asked):
        length = own[i - shift] if i >= shift else 1
        if length != 1 or wish == -1:
            sizes.append(1)  # ONNX's 1 keeps the length
        elif isinstance(wish, fx.Node):
            sizes.append(None)
            given.append(wish)
        else:
            sizes.append(int(wish))
    return Built(Expand(tuple(sizes)), (x, *given))


@ATEN.register("expand_as")
def _expand_as_from_aten(call: AtenCall) -> Built:
    return Built(ExpandAs(), (call["self"], call["other"]))


@ATEN.register("repeat", "tile")
def _tile_from_aten(call: AtenCall) -> Built:
    asked = list(call["repeats"] if "repeats" in call.args else call["dims"])
    asked = [1] * (len(call.shape(call["self"])) - len(asked)) + asked
    sizes, given = split_sizes(asked)
    return Built(Tile(sizes), (call["self"], *given))


@ATEN.register("flip")
def _flip_from_aten(call: AtenCall) -> Built:
    return Built(Flip(call["dims"]), (call["self"],))

"""Cutting a range out of a tensor, and cutting a tensor into parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.sizes import (
    FAR,
    Sizes,
    as_vector,
    emit_sizes,
    input_count,
    int_constant,
    resolve,
    split_sizes,
    static_ints,
)
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported, ints


class Slice(Op):
    """Every *step*-th element from *start* to *end* (exclusive) along each of *axes*. Negative steps go backwards.

    *starts*, *ends*: `Sizes`; negative entries count from the end, entries beyond the ends are clamped.
    """

    kind = "Slice"
    roles = (Role.ACTIVATION, Role.INDEX)
    passthrough = True

    def __init__(self, starts: Sizes, ends: Sizes, *, axes: Sequence[int], steps: Sequence[int]) -> None:
        super().__init__()
        self.starts, self.ends, self.axes, self.steps = starts, ends, tuple(axes), tuple(steps)

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        n = input_count(self.starts)
        starts, ends = resolve(self.starts, given[:n]), resolve(self.ends, given[n:])
        for axis, start, end, step in zip(self.axes, starts, ends, self.steps, strict=True):
            # Python's own rules for negative and overlong bounds are ONNX's and torch's.
            first, last, _ = slice(start, end, step).indices(x.shape[axis])
            if step < 0:
                x = x.index_select(axis, torch.arange(first, min(last, first), step, device=x.device))
            else:
                x = torch.ops.aten.slice.Tensor(x, axis, first, max(first, last), step)
        return x

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        n = 1 + input_count(self.starts)
        names = [
            emit_sizes(emit, self.starts, inputs[1:n], "starts"),
            emit_sizes(emit, self.ends, inputs[n:], "ends"),
            int_constant(emit, self.axes, "axes"),
            int_constant(emit, self.steps, "steps"),
        ]
        emit.node("Slice", [inputs[0], *names], self.outputs)

    def describe(self) -> str:
        shown = ("?" if s is None else s for s in (self.starts, self.ends))
        return f"axes={self.axes}, starts={next(shown)}, ends={next(shown)}, steps={self.steps}"


class Split(Op):
    """x cut along *axis* into parts of *sizes*, or into *parts* equal ones (a smaller last one). *squeeze*: drop the axis."""

    kind = "Split"
    passthrough = True

    def __init__(
        self, axis: int, *, sizes: Sequence[int] | None = None, parts: int = 0, squeeze: bool = False
    ) -> None:
        super().__init__()
        self.axis, self.parts, self.squeeze = axis, parts, squeeze
        self.sizes = None if sizes is None else tuple(sizes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        sizes = self.sizes
        if sizes is None:
            length = x.shape[self.axis]
            each = -(-length // self.parts)
            sizes = tuple(max(0, min(each, length - i * each)) for i in range(self.parts))
        found = tuple(torch.split(x, list(sizes), self.axis))
        if self.squeeze:
            found = tuple(part.squeeze(self.axis) for part in found)
        return found[0] if len(self.outputs) == 1 else found

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        count = self.parts if self.sizes is None else len(self.sizes)
        names = [*self.outputs, *[""] * count][:count]
        names = [name or emit.temporary(f"part_{i}") for i, name in enumerate(names)]
        parts = [emit.temporary(f"slice_{i}") for i in range(count)] if self.squeeze else names
        if self.sizes is None:
            emit.node("Split", inputs, parts, axis=self.axis, num_outputs=self.parts)
        else:
            emit.node("Split", [inputs[0], int_constant(emit, self.sizes, "sizes")], parts, axis=self.axis)
        if self.squeeze:
            axes = int_constant(emit, [self.axis], "axes")
            for part, name in zip(parts, names, strict=True):
                emit.node("Squeeze", [part, axes], [name])

    def describe(self) -> str:
        return f"axis={self.axis}, " + (
            f"parts={self.parts}" if self.sizes is None else f"sizes={self.sizes}"
        )


@ONNX.register("Slice")
def _slice_from_onnx(call: OnnxCall) -> Built:
    starts, ends = as_vector(call.constant(1)), as_vector(call.constant(2))
    count = None if starts is None and ends is None else len(starts or ends or ())
    if count is None:
        shape = call.shape(call.inputs[1])
        count = shape[0] if shape else None
    if call.input(3) is not None:
        axes = ints(call.required_constant(3, "axes"))
    elif count is not None:
        axes = tuple(range(count))
    else:
        raise Unsupported("the number of starts must be known")
    steps = (1,) * len(axes) if call.input(4) is None else ints(call.required_constant(4, "steps"))
    given = [call.inputs[i] for i, bounds in ((1, starts), (2, ends)) if bounds is None]
    return Built(Slice(starts, ends, axes=axes, steps=steps), (call.inputs[0], *given))


@ONNX.register("Split")
def _split_from_onnx(call: OnnxCall) -> Built:
    axis = call.attribute("axis", 0)
    if call.input(1) is not None:
        op = Split(axis, sizes=ints(call.required_constant(1, "split")))
    else:
        op = Split(axis, parts=call.attribute("num_outputs", len(call.outputs)))
    return Built(op, (call.inputs[0],))


@ATEN.register("slice")
def _slice_from_aten(call: AtenCall) -> Built | None:
    step = call["step"]
    if isinstance(step, fx.Node):
        return None
    start, end = call["start"], call["end"]
    starts, given_starts = split_sizes([0 if start is None else start])
    ends, given_ends = split_sizes([FAR if end is None else end])
    op = Slice(starts, ends, axes=[call["dim"]], steps=[step])
    return Built(op, (call["self"], *given_starts, *given_ends))


@ATEN.register("narrow")
def _narrow_from_aten(call: AtenCall) -> Built | None:
    bounds = static_ints([call["start"], call["length"]]) if not isinstance(call["start"], fx.Node) else None
    if bounds is None:
        return None
    start, length = bounds
    shape = call.shape(call["self"])
    if start < 0:
        known = shape[call["dim"]]
        if known is None:
            return None
        start += known
    return Built(Slice((start,), (start + length,), axes=[call["dim"]], steps=[1]), (call["self"],))


@ATEN.register("split", "split_with_sizes", "chunk", "unbind")
def _split_from_aten(call: AtenCall) -> Built | None:
    axis = call["dim"]
    length = call.shape(call["self"])[axis]
    asked = next((call.args[k] for k in ("split_size", "split_sizes", "chunks") if k in call.args), None)
    if isinstance(asked, (list, tuple)):
        listed = static_ints(asked)
        return None if listed is None else Built(Split(axis, sizes=listed), (call["self"],))
    if length is None or isinstance(asked, fx.Node):
        return None
    if asked is None:
        return Built(Split(axis, sizes=[1] * length, squeeze=True), (call["self"],))
    each = -(-length // asked) if "chunks" in call.args else asked
    sizes = [min(each, length - i) for i in range(0, length, each)] if each else [0]
    return Built(Split(axis, sizes=sizes), (call["self"],))

"""Reading and writing elements at computed places: gather, select, scatter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall


def _counted_from_end(indices: Tensor, length: int) -> Tensor:
    return torch.where(indices < 0, indices + length, indices).long()


class Gather(Op):
    """Entries of x along *axis*: at *index*, dropping the axis, or at a second input `[...]`, which takes its place.

    *table*: x is a constant (an embedding) and counts as a weight.
    """

    kind = "Gather"
    roles = (Role.ACTIVATION, Role.INDEX)

    def __init__(self, axis: int, *, index: int | None = None, table: bool = False) -> None:
        super().__init__()
        self.axis, self.index, self.table = axis, index, table

    @property
    def passthrough(self) -> bool:  # type: ignore[override]
        return not self.table

    def role(self, index: int) -> Role:
        return Role.WEIGHT if self.table and index == 0 else super().role(index)

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        if indices is None:
            assert self.index is not None
            return x.select(self.axis, self.index)
        axis = self.axis % x.dim()
        flat = _counted_from_end(indices, x.shape[axis]).reshape(-1)
        shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
        return x.index_select(axis, flat).reshape(shape)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        indices = (
            inputs[1] if self.index is None else emit.constant(np.array(self.index, dtype=np.int64), "index")
        )
        emit.node("Gather", [inputs[0], indices], self.outputs, axis=self.axis)

    def describe(self) -> str:
        return f"axis={self.axis}" + ("" if self.index is None else f", index={self.index}")


class GatherElements(Op):
    """Entry `[i, j, …]` is x's at the same place, but with the axis's coordinate taken from the indices."""

    kind = "GatherElements"
    roles = (Role.ACTIVATION, Role.INDEX)
    passthrough = True

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        return x.gather(self.axis, _counted_from_end(indices, x.shape[self.axis]))

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("GatherElements", inputs, self.outputs, axis=self.axis)

    def describe(self) -> str:
        return f"axis={self.axis}"


def _coordinates(x: Tensor, indices: Tensor, batch_dims: int) -> tuple[Tensor, ...]:
    """Index tensors for `x[...]` from indices `[*batch, ..., k]` that name k coordinates each."""
    outer = []
    for d in range(batch_dims):
        shape = [1] * (indices.dim() - 1)
        shape[d] = -1
        outer.append(torch.arange(x.shape[d], device=x.device).reshape(shape))
    inner = [_counted_from_end(indices[..., i], x.shape[batch_dims + i]) for i in range(indices.shape[-1])]
    return (*outer, *inner)


class GatherND(Op):
    """Slices of x at coordinates `[*batch, ..., k]`; the first *batch_dims* axes are walked together."""

    kind = "GatherND"
    roles = (Role.ACTIVATION, Role.INDEX)
    passthrough = True

    def __init__(self, batch_dims: int = 0) -> None:
        super().__init__()
        self.batch_dims = batch_dims

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        return x[_coordinates(x, indices, self.batch_dims)]

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("GatherND", inputs, self.outputs, batch_dims=self.batch_dims)

    def describe(self) -> str:
        return f"batch_dims={self.batch_dims}"


_COMBINE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


class ScatterND(Op):
    """x with the slices at coordinates `[..., k]` replaced by, or combined with, updates."""

    kind = "ScatterND"
    roles = (Role.ACTIVATION, Role.INDEX, Role.ACTIVATION)

    def __init__(self, reduction: str = "none") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        if self.reduction == "none":
            return x.index_put(_coordinates(x, indices, 0), updates)
        k = indices.shape[-1]
        rows, rest = math.prod(x.shape[:k]), tuple(x.shape[k:])
        at = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
        for i in range(k):
            at = at * x.shape[i] + _counted_from_end(indices[..., i], x.shape[i])
        flat = at.reshape(-1, *[1] * len(rest)).expand(-1, *rest)
        source = updates.reshape(flat.shape)
        y = x.reshape(rows, *rest).scatter_reduce(0, flat, source, _COMBINE[self.reduction])
        return y.reshape(x.shape)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("ScatterND", inputs, self.outputs, reduction=self.reduction)

    def describe(self) -> str:
        return f"reduction={self.reduction}"


class ScatterElements(Op):
    """x with the entries that indices name along *axis* replaced by, or combined with, updates."""

    kind = "ScatterElements"
    roles = (Role.ACTIVATION, Role.INDEX, Role.ACTIVATION)

    def __init__(self, axis: int, reduction: str = "none") -> None:
        super().__init__()
        self.axis, self.reduction = axis, reduction

    def forward(self, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        at = _counted_from_end(indices, x.shape[self.axis])
        if self.reduction == "none":
            return x.scatter(self.axis, at, updates)
        return x.scatter_reduce(self.axis, at, updates, _COMBINE[self.reduction])

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("ScatterElements", inputs, self.outputs, axis=self.axis, reduction=self.reduction)

    def describe(self) -> str:
        return f"axis={self.axis}, reduction={self.reduction}"


# --- ONNX ----------------------------------------------------------------------------------------------------


@ONNX.register("Gather")
def _gather_from_onnx(call: OnnxCall) -> Built:
    axis, index = call.attribute("axis", 0), call.constant(1)
    table = call.constant(0) is not None
    if index is not None and index.ndim == 0 and not table:
        return Built(Gather(axis, index=int(index)), (call.inputs[0],))
    return Built(Gather(axis, table=table), (call.inputs[0], call.inputs[1]))


@ONNX.register("GatherElements")
def _gather_elements_from_onnx(call: OnnxCall) -> Built:
    return Built(GatherElements(call.attribute("axis", 0)), (call.inputs[0], call.inputs[1]))


@ONNX.register("GatherND")
def _gather_nd_from_onnx(call: OnnxCall) -> Built:
    return Built(GatherND(call.attribute("batch_dims", 0)), (call.inputs[0], call.inputs[1]))


@ONNX.register("ScatterND")
def _scatter_nd_from_onnx(call: OnnxCall) -> Built:
    return Built(
        ScatterND(call.attribute("reduction", "none")), (call.inputs[0], call.inputs[1], call.inputs[2])
    )


@ONNX.register("ScatterElements")
def _scatter_elements_from_onnx(call: OnnxCall) -> Built:
    op = ScatterElements(call.attribute("axis", 0), call.attribute("reduction", "none"))
    return Built(op, (call.inputs[0], call.inputs[1], call.inputs[2]))


# --- ATen ----------------------------------------------------------------------------------------------------


@ATEN.register("select")
def _select_from_aten(call: AtenCall) -> Built | None:
    if isinstance(call["index"], fx.Node):
        return None
    return Built(Gather(call["dim"], index=call["index"]), (call["self"],))


@ATEN.register("index_select")
def _index_select_from_aten(call: AtenCall) -> Built:
    return Built(Gather(call["dim"]), (call["self"], call["index"]))


@ATEN.register("index")
def _index_from_aten(call: AtenCall) -> Built | None:
    """`x[:, i]` with one integer index tensor; masks and several indices stay opaque."""
    given = [(axis, i) for axis, i in enumerate(call["indices"]) if i is not None]
    if len(given) != 1:
        return None
    axis, index = given[0]
    seen = index.meta.get("val") if isinstance(index, fx.Node) else None
    if not isinstance(seen, Tensor) or seen.dtype not in (torch.int64, torch.int32):
        return None
    return Built(Gather(axis), (call["self"], index))


@ATEN.register("gather")
def _gather_from_aten(call: AtenCall) -> Built | None:
    x, index = call.shape(call["self"]), call.shape(call["index"])
    axis = call["dim"] % max(1, len(x))
    # ONNX wants equal lengths off the axis; torch allows shorter ones.
    if any(a != b for i, (a, b) in enumerate(zip(x, index, strict=True)) if i != axis):
        return None
    return Built(GatherElements(axis), (call["self"], call["index"]))


@ATEN.register("scatter")
def _scatter_from_aten(call: AtenCall) -> Built | None:
    if "src" not in call.args or call.args.get("reduce") is not None:
        return None
    if call.shape(call["src"]) != call.shape(call["index"]):
        return None
    return Built(ScatterElements(call["dim"]), (call["self"], call["index"], call["src"]))

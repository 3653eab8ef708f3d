"""Operators about order and position: top k, arg max, positions of non-zeros, one-hot, running sums, triangles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.sizes import int_constant
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall


class TopK(Op):
    """The *k* largest (smallest) elements along *axis*, sorted, and where they were. k None: a second input `[1]`."""

    kind = "TopK"
    roles = (Role.ACTIVATION, Role.INDEX)

    def __init__(self, k: int | None, *, axis: int, largest: bool) -> None:
        super().__init__()
        self.k, self.axis, self.largest = k, axis, largest

    def forward(self, x: Tensor, k: Any = None) -> Tensor | tuple[Tensor, Tensor]:
        count = int(k) if self.k is None else self.k
        # A stable sort, unlike torch.topk, takes the first of equal elements, as ONNX demands.
        values, indices = torch.sort(x, dim=self.axis, descending=self.largest, stable=True)
        found = values.narrow(self.axis, 0, count), indices.narrow(self.axis, 0, count)
        return found[0] if len(self.outputs) == 1 else found

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        k = inputs[1] if self.k is None else int_constant(emit, [self.k], "k")
        names = [
            name or emit.temporary(hint)
            for name, hint in zip((*self.outputs, "")[:2], ("values", "indices"), strict=True)
        ]
        emit.node("TopK", [inputs[0], k], names, axis=self.axis, largest=int(self.largest))

    def describe(self) -> str:
        return f"k={self.k}, axis={self.axis}, {'largest' if self.largest else 'smallest'}"


class ArgExtremum(Op):
    """Where the largest or smallest element along *axis* is, int64; *last*: the last of equal ones, else the first."""

    def __init__(self, kind: str, *, axis: int, keep: bool, last: bool = False) -> None:
        super().__init__()
        self.__dict__["kind"] = kind
        self.axis, self.keep, self.last = axis, keep, last

    def forward(self, x: Tensor) -> Tensor:
        find = torch.argmax if self.kind == "ArgMax" else torch.argmin
        if self.last:
            return x.shape[self.axis] - 1 - find(x.flip(self.axis), self.axis, keepdim=self.keep)
        return find(x, self.axis, keepdim=self.keep)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node(
            self.kind,
            inputs,
            self.outputs,
            axis=self.axis,
            keepdims=int(self.keep),
            select_last_index=int(self.last),
        )

    def describe(self) -> str:
        return f"axis={self.axis}, keep={self.keep}"


class NonZero(Op):
    """Coordinates of all elements other than 0, `[rank, count]` int64."""

    kind = "NonZero"
    roles = (Role.INDEX,)

    def forward(self, x: Tensor) -> Tensor:
        return x.nonzero().t()

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("NonZero", inputs, self.outputs)


class OneHot(Op):
    """*on* where the new axis's coordinate is the index, *off* elsewhere. Inputs: indices `[...]`, values `[off, on]`."""

    kind = "OneHot"
    roles = (Role.INDEX, Role.PARAMETER)

    def __init__(self, depth: int, *, axis: int = -1) -> None:
        super().__init__()
        self.depth, self.axis = depth, axis

    def forward(self, indices: Tensor, values: Tensor | None = None) -> Tensor:
        places = torch.arange(self.depth, device=indices.device)
        at = torch.where(indices < 0, indices + self.depth, indices).long()
        hit = (at.unsqueeze(-1) == places).movedim(-1, self.axis)
        return hit.long() if values is None else torch.where(hit, values[1], values[0])

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        depth = emit.constant(np.array(self.depth, dtype=np.int64), "depth")
        values = (*inputs, None)[1] or int_constant(emit, [0, 1], "values")
        emit.node("OneHot", [inputs[0], depth, values], self.outputs, axis=self.axis)

    def describe(self) -> str:
        return f"depth={self.depth}, axis={self.axis}"


class CumSum(Op):
    """Running sums along *axis*; *exclusive*: without the element itself; *reverse*: from the end."""

    kind = "CumSum"

    def __init__(self, axis: int, *, exclusive: bool = False, reverse: bool = False) -> None:
        super().__init__()
        self.axis, self.exclusive, self.reverse = axis, exclusive, reverse

    def forward(self, x: Tensor) -> Tensor:
        y = x.flip(self.axis) if self.reverse else x
        sums = y.cumsum(self.axis, dtype=x.dtype)
        if self.exclusive:
            sums = torch.cat([torch.zeros_like(sums.narrow(self.axis, 0, 1)), sums], self.axis)
            sums = sums.narrow(self.axis, 0, x.shape[self.axis])
        return sums.flip(self.axis) if self.reverse else sums

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        axis = emit.constant(np.array(self.axis, dtype=np.int64), "axis")
        emit.node(
            "CumSum",
            [inputs[0], axis],
            self.outputs,
            exclusive=int(self.exclusive),
            reverse=int(self.reverse),
        )

    def describe(self) -> str:
        return f"axis={self.axis}"


class Trilu(Op):
    """The upper or lower triangle of the last two axes, from diagonal *k* on; 0 elsewhere."""

    kind = "Trilu"
    passthrough = True

    def __init__(self, *, upper: bool, k: int = 0) -> None:
        super().__init__()
        self.upper, self.k = upper, k

    def forward(self, x: Tensor) -> Tensor:
        return x.triu(self.k) if self.upper else x.tril(self.k)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        k = emit.constant(np.array(self.k, dtype=np.int64), "k")
        emit.node("Trilu", [inputs[0], k], self.outputs, upper=int(self.upper))

    def describe(self) -> str:
        return f"{'upper' if self.upper else 'lower'}, k={self.k}"


# --- ONNX ----------------------------------------------------------------------------------------------------


@ONNX.register("TopK")
def _top_k_from_onnx(call: OnnxCall) -> Built:
    k = call.constant(1)
    op = TopK(
        None if k is None else int(k.reshape(())),
        axis=call.attribute("axis", -1),
        largest=bool(call.attribute("largest", 1)),
    )
    return Built(op, (call.inputs[0], call.inputs[1]) if k is None else (call.inputs[0],))


@ONNX.register("ArgMax", "ArgMin")
def _arg_extremum_from_onnx(call: OnnxCall) -> Built:
    op = ArgExtremum(
        call.op_type,
        axis=call.attribute("axis", 0),
        keep=bool(call.attribute("keepdims", 1)),
        last=bool(call.attribute("select_last_index", 0)),
    )
    return Built(op, (call.inputs[0],))


@ONNX.register("NonZero")
def _non_zero_from_onnx(call: OnnxCall) -> Built:
    return Built(NonZero(), (call.inputs[0],))


@ONNX.register("OneHot")
def _one_hot_from_onnx(call: OnnxCall) -> Built:
    depth = call.required_constant(1, "the depth")
    return Built(
        OneHot(int(depth.reshape(())), axis=call.attribute("axis", -1)), (call.inputs[0], call.inputs[2])
    )


@ONNX.register("CumSum")
def _cum_sum_from_onnx(call: OnnxCall) -> Built:
    op = CumSum(
        int(call.required_constant(1, "the axis").reshape(())),
        exclusive=bool(call.attribute("exclusive", 0)),
        reverse=bool(call.attribute("reverse", 0)),
    )
    return Built(op, (call.inputs[0],))


@ONNX.register("Trilu")
def _trilu_from_onnx(call: OnnxCall) -> Built:
    k = 0 if call.input(1) is None else int(call.required_constant(1, "the diagonal").reshape(()))
    return Built(Trilu(upper=bool(call.attribute("upper", 1)), k=k), (call.inputs[0],))


# --- ATen ----------------------------------------------------------------------------------------------------


@ATEN.register("topk")
def _top_k_from_aten(call: AtenCall) -> Built:
    run_time = isinstance(call["k"], fx.Node)
    op = TopK(None if run_time else call["k"], axis=call["dim"], largest=call["largest"])
    return Built(op, (call["self"], call["k"]) if run_time else (call["self"],))


@ATEN.register("argmax", "argmin")
def _arg_extremum_from_aten(call: AtenCall) -> Built | None:
    if call["dim"] is None:
        return None
    kind = "ArgMax" if "argmax" in call.target else "ArgMin"
    return Built(ArgExtremum(kind, axis=call["dim"], keep=call["keepdim"]), (call["self"],))


@ATEN.register("one_hot")
def _one_hot_from_aten(call: AtenCall) -> Built | None:
    return None if call["num_classes"] < 0 else Built(OneHot(call["num_classes"]), (call["self"],))


@ATEN.register("cumsum")
def _cum_sum_from_aten(call: AtenCall) -> Built | None:
    seen = call["self"].meta.get("val") if isinstance(call["self"], fx.Node) else None
    if call["dtype"] is not None or not (isinstance(seen, Tensor) and seen.is_floating_point()):
        return None
    return Built(CumSum(call["dim"]), (call["self"],))


@ATEN.register("tril", "triu")
def _trilu_from_aten(call: AtenCall) -> Built:
    return Built(Trilu(upper="triu" in call.target, k=call["diagonal"]), (call["self"],))

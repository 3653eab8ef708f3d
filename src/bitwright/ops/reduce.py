"""Reductions along axes: mean, sum, extrema, product and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from bitwright.graph.op import Emitter, Op
from bitwright.ops.elementwise import Elementwise
from bitwright.ops.sizes import int_constant
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported, ints

#: Reduces x along axes (never empty), keeping them with length 1 or not.
_Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    return x.double().mean(axes, keepdim=keep).to(x.dtype)


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


_REDUCTIONS: dict[str, _Reduction] = {
    "ReduceMean": _mean,
    "ReduceSum": _sum,
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceProd": _prod,
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: _sum(x * x, axes, keep).double().sqrt().to(x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: _sum(x, axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
}


class Reduce(Op):
    """One of the reductions above. *axes*: None for all, () for none."""

    def __init__(self, kind: str, axes: Sequence[int] | None, *, keep: bool) -> None:
        super().__init__()
        self.__dict__["kind"] = kind
        self.axes = None if axes is None else tuple(axes)
        self.keep = keep

    @property
    def passthrough(self) -> bool:  # type: ignore[override]
        return self.kind in ("ReduceMax", "ReduceMin")

    def forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(x.dim())) if self.axes is None else tuple(a % x.dim() for a in self.axes)
        return _REDUCTIONS[self.kind](x, axes, self.keep) if axes else x

    def output_range(self) -> tuple[float, float] | None:
        return (0.0, float("inf")) if self.kind in ("ReduceL1", "ReduceL2", "ReduceSumSquare") else None

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        axes = None if self.axes is None else int_constant(emit, self.axes, "axes")
        emit.node(
            self.kind,
            [inputs[0], axes],
            self.outputs,
            keepdims=int(self.keep),
            noop_with_empty_axes=int(self.axes == ()),
        )

    def describe(self) -> str:
        return f"axes={self.axes}, keep={self.keep}"


class Extremum(Op):
    """The largest or smallest element along *axis*, and where it was: two outputs, as `torch.max(x, dim)` gives them."""

    kind = "Extremum"

    def __init__(self, axis: int, *, largest: bool, keep: bool) -> None:
        super().__init__()
        self.axis, self.largest, self.keep = axis, largest, keep

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        values, indices = (torch.max if self.largest else torch.min)(x, self.axis, keepdim=self.keep)
        return values if len(self.outputs) == 1 else (values, indices)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        kind = "Max" if self.largest else "Min"
        axes = int_constant(emit, [self.axis], "axes")
        if self.outputs[0]:
            emit.node(f"Reduce{kind}", [inputs[0], axes], [self.outputs[0]], keepdims=int(self.keep))
        if len(self.outputs) > 1 and self.outputs[1]:
            emit.node(f"Arg{kind}", [inputs[0]], [self.outputs[1]], axis=self.axis, keepdims=int(self.keep))

    def describe(self) -> str:
        return f"axis={self.axis}, {'largest' if self.largest else 'smallest'}, keep={self.keep}"


# --- ONNX ----------------------------------------------------------------------------------------------------


def _from_onnx(call: OnnxCall) -> Built:
    axes: Sequence[int] | None = None
    if call.input(1) is not None:
        axes = ints(call.required_constant(1, "axes"))
    if not axes:  # absent or empty: everything, or nothing at all
        axes = () if call.attribute("noop_with_empty_axes", 0) else None
    if axes == () and call.op_type not in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"):
        raise Unsupported("noop_with_empty_axes")
    return Built(Reduce(call.op_type, axes, keep=bool(call.attribute("keepdims", 1))), (call.inputs[0],))


for _kind in _REDUCTIONS:
    ONNX.add(_kind, _from_onnx)


# --- ATen ----------------------------------------------------------------------------------------------------

_ATEN = {
    "mean": "ReduceMean",
    "sum": "ReduceSum",
    "amax": "ReduceMax",
    "amin": "ReduceMin",
    "logsumexp": "ReduceLogSumExp",
}


def _dtype_of(value: object) -> torch.dtype | None:
    seen = value.meta.get("val") if isinstance(value, fx.Node) else None
    return seen.dtype if isinstance(seen, Tensor) else None


@ATEN.register(*_ATEN)
def _reduce_from_aten(call: AtenCall) -> Built | None:
    own, asked = _dtype_of(call["self"]), call.args.get("dtype")
    if asked is not None and asked != own:
        return None
    if own is not None and not own.is_floating_point:  # torch widens integer sums; ONNX does not
        return None
    dims = call.args.get("dim")
    axes = [dims] if isinstance(dims, int) else list(dims) if dims else None
    kind = _ATEN[call.target]
    return Built(Reduce(kind, axes, keep=bool(call.args.get("keepdim", False))), (call["self"],))


@ATEN.register("prod")
def _prod_from_aten(call: AtenCall) -> Built | None:
    own = _dtype_of(call["self"])
    if call.args.get("dtype") not in (None, own) or (own is not None and not own.is_floating_point):
        return None
    dim = call.args.get("dim")
    axes = None if dim is None else [dim]
    return Built(Reduce("ReduceProd", axes, keep=bool(call.args.get("keepdim", False))), (call["self"],))


@ATEN.register("max", "min")
def _extremum_from_aten(call: AtenCall) -> Built:
    largest = call.target == "max"
    if "other" in call.args:
        return Built(Elementwise("Max" if largest else "Min"), (call["self"], call["other"]))
    if "dim" in call.args:
        op = Extremum(call["dim"], largest=largest, keep=call["keepdim"])
        return Built(op, (call["self"],))
    return Built(Reduce("ReduceMax" if largest else "ReduceMin", None, keep=False), (call["self"],))


@ATEN.register("norm", "linalg_vector_norm")
def _norm_from_aten(call: AtenCall) -> Built | None:
    order = call.args.get("p", call.args.get("ord"))
    kind = {1: "ReduceL1", 2: "ReduceL2", None: "ReduceL2"}.get(order)
    if kind is None or call.args.get("dtype") is not None:
        return None
    dims = call.args.get("dim")
    axes = [dims] if isinstance(dims, int) else list(dims) if dims else None
    return Built(Reduce(kind, axes, keep=bool(call.args.get("keepdim", False))), (call["self"],))

"""Composite operators taken apart into what integer hardware computes: sums, products, and functions looked up in tables.

    Softmax      max, sub, exp, sum, reciprocal, mul
    LogSoftmax   max, sub, exp, sum, log, sub_log
    LayerNorm    mean, sub, square, variance, rsqrt, mul, weight_mul, bias_add
    RMSNorm      square, mean_square, rsqrt, mul, weight_mul
    InstanceNorm as LayerNorm, with weight_shape and bias_shape
    GroupNorm    split, then as InstanceNorm, with merge before the weight
    Div          reciprocal, mul; not where a constant divides
    Pow          square, where the exponent is 2

All parts are named `<operator>.<part>` and have ordinary values. The epsilon of a norm is inside its `rsqrt`, so that the
code 0 of a small variance stays a number.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx

from bitwright.graph.graph import Graph, ValueInfo
from bitwright.graph.op import Composite, Op
from bitwright.ops.elementwise import Elementwise
from bitwright.ops.norm import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from bitwright.ops.reduce import Reduce
from bitwright.ops.shape import Reshape
from bitwright.ops.softmax import Softmax
from bitwright.ops.unary import Unary
from bitwright.rewrite.parts import Parts


def decompose_composites(graph: Graph) -> Graph:
    """A copy of *graph* without composite operators. Where these were float, the result is the same but for rounding."""
    taken_apart = copy.deepcopy(graph)
    for name in graph.op_names:
        build = _builder(taken_apart, taken_apart.op(name))
        if build is not None:
            build(_Composite(taken_apart, name))
    return taken_apart


def _builder(graph: Graph, op: Op) -> Callable[[_Composite], None] | None:
    """What takes *op* apart, or None if it is not composite."""
    inputs = [None if v is None else graph.value(v) for v in graph.op_inputs(op.name)]
    if op.kind not in _BUILDERS or not all(v is None or v.info.is_float for v in inputs):
        return None
    if op.kind == "Pow":
        return _square if isinstance(op, Elementwise) and op.scalar == 2 and not op.scalar_first else None
    if op.kind == "Div" and (len(inputs) != 2 or inputs[1] is None or inputs[1].is_constant):
        return None
    return _BUILDERS[op.kind]


class _Composite(Parts):
    """One operator being taken apart. *x*: what it reads first; *rank*: of that."""

    def __init__(self, graph: Graph, name: str) -> None:
        super().__init__(graph, name)
        x, *self.rest = self.node.args
        assert isinstance(x, fx.Node)
        self.x = x
        self.rank = len(self.shape(x))

    def part(
        self, name: str, op: Op, args: Sequence[object], info: ValueInfo | None = None, *, inner: bool = True
    ) -> fx.Node:
        """Append a part; *info*: None if as the composite's own value."""
        composite = Composite(self.op.name, self.op.kind, inner)
        return self.add(name, op, tuple(args), info or self.output, composite=composite)

    def reduced(self, info: ValueInfo, axes: Sequence[int]) -> ValueInfo:
        """What is known of a value after *axes* of it were reduced to length 1."""
        assert info.shape is not None
        shape = tuple(1 if i in axes else n for i, n in enumerate(info.shape))
        return replace(info, shape=shape, batch_axis=None if info.batch_axis in axes else info.batch_axis)


# --- softmax -----------------------------------------------------------------------------------------------------


def _softmax(parts: _Composite) -> None:
    op = parts.op
    assert isinstance(op, Softmax)
    axes = [op.axis % parts.rank]
    row = parts.reduced(parts.output, axes)
    largest = parts.part("max", Reduce("ReduceMax", axes, keep=True), [parts.x], row)
    lowered = parts.part("sub", Elementwise("Sub"), [parts.x, largest])
    power = parts.part("exp", Unary("Exp"), [lowered])
    total = parts.part("sum", Reduce("ReduceSum", axes, keep=True), [power], row)
    if op.kind == "LogSoftmax":
        log = parts.part("log", Unary("Log"), [total], row)
        parts.finish(parts.part("sub_log", Elementwise("Sub"), [lowered, log], inner=False))
        return
    share = parts.part("reciprocal", Unary("Reciprocal"), [total], row)
    parts.finish(parts.part("mul", Elementwise("Mul"), [power, share], inner=False))


# --- normalisation -----------------------------------------------------------------------------------------------


def _layer_norm(parts: _Composite) -> None:
    op = parts.op
    assert isinstance(op, LayerNorm)
    axes = range(parts.rank - op.rank, parts.rank)
    weight, bias = (*parts.rest, None, None)[:2]
    affine = weight is not None or bias is not None
    y = _normalised(parts, parts.x, axes, op.epsilon, parts.output, inner=affine)
    parts.finish(_affine(parts, y, weight, bias))


def _rms_norm(parts: _Composite) -> None:
    op = parts.op
    assert isinstance(op, RMSNorm)
    axes = range(parts.rank - op.rank, parts.rank)
    weight = (*parts.rest, None)[0]
    root = _root(parts, parts.x, axes, op.epsilon, parts.output, "mean_square")
    y = parts.part("mul", Elementwise("Mul"), [parts.x, root], inner=weight is not None)
    parts.finish(_affine(parts, y, weight, None))


def _instance_norm(parts: _Composite) -> None:
    op = parts.op
    assert isinstance(op, InstanceNorm)
    weight, bias = (_column(parts, p, n) for p, n in zip((*parts.rest, None, None), _COLUMNS, strict=False))
    affine = weight is not None or bias is not None
    y = _normalised(parts, parts.x, range(2, parts.rank), op.epsilon, parts.output, inner=affine)
    parts.finish(_affine(parts, y, weight, bias))


def _group_norm(parts: _Composite) -> None:
    op = parts.op
    assert isinstance(op, GroupNorm)
    n, *rest = parts.shape(parts.x)
    weight, bias = (_column(parts, p, n) for p, n in zip((*parts.rest, None, None), _COLUMNS, strict=False))
    affine = weight is not None or bias is not None
    length = math.prod(rest) // op.groups
    batch_axis = 0 if parts.output.batch_axis == 0 else None
    grouped = replace(parts.output, shape=(n, op.groups, length), batch_axis=batch_axis)
    split = parts.part("split", Reshape((0, op.groups, length)), [parts.x], grouped)
    y = _normalised(parts, split, [2], op.epsilon, grouped, inner=affine)
    merged = parts.part("merge", Reshape((0, *rest)), [y], inner=affine)
    parts.finish(_affine(parts, merged, weight, bias))


_COLUMNS = ("weight_shape", "bias_shape")


def _column(parts: _Composite, parameter: object, name: str) -> fx.Node | None:
    """The node of a *parameter* `[c]` as `[c, 1, …]`, to meet `[n, c, …]`."""
    if not isinstance(parameter, fx.Node):
        return None
    info = parts.info(parameter)
    assert info.shape is not None
    shape = (*info.shape, *[1] * (parts.rank - 2))
    return parts.part(name, Reshape(shape), [parameter], replace(info, shape=shape))


def _normalised(
    parts: _Composite, x: fx.Node, axes: Sequence[int], epsilon: float, info: ValueInfo, *, inner: bool
) -> fx.Node:
    """*x* (*info*) with mean 0 and variance 1 over *axes*."""
    row = parts.reduced(info, axes)
    mean = parts.part("mean", Reduce("ReduceMean", axes, keep=True), [x], row)
    centred = parts.part("sub", Elementwise("Sub"), [x, mean], info)
    root = _root(parts, centred, axes, epsilon, info, "variance")
    return parts.part("mul", Elementwise("Mul"), [centred, root], info, inner=inner)


def _root(
    parts: _Composite, x: fx.Node, axes: Sequence[int], epsilon: float, info: ValueInfo, mean: str
) -> fx.Node:
    """1 / sqrt(mean(x^2) + epsilon) over *axes* of *x* (*info*)."""
    row = parts.reduced(info, axes)
    square = parts.part("square", Unary("Square"), [x], info)
    variance = parts.part(mean, Reduce("ReduceMean", axes, keep=True), [square], row)
    return parts.part("rsqrt", Unary("Rsqrt", epsilon=epsilon), [variance], row)


def _affine(parts: _Composite, y: fx.Node, weight: object, bias: object) -> fx.Node:
    """*y* times *weight* plus *bias*, as far as these are there. Their names leave `weight` and `bias` to the author."""
    if weight is not None:
        y = parts.part("weight_mul", Elementwise("Mul"), [y, weight], inner=bias is not None)
    if bias is not None:
        y = parts.part("bias_add", Elementwise("Add"), [y, bias], inner=False)
    return y


# --- arithmetic --------------------------------------------------------------------------------------------------


def _division(parts: _Composite) -> None:
    divisor = parts.rest[0]
    assert isinstance(divisor, fx.Node)
    inverse = parts.part("reciprocal", Unary("Reciprocal"), [divisor], parts.info(divisor))
    parts.finish(parts.part("mul", Elementwise("Mul"), [parts.x, inverse], inner=False))


def _square(parts: _Composite) -> None:
    parts.finish(parts.part("square", Unary("Square"), [parts.x], inner=False))


_BUILDERS: dict[str, Callable[[_Composite], None]] = {
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "LayerNorm": _layer_norm,
    "RMSNorm": _rms_norm,
    "InstanceNorm": _instance_norm,
    "GroupNorm": _group_norm,
    "Div": _division,
    "Pow": _square,
}

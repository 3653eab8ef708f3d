"""Fully connected layers and matrix products as MatMulInteger."""

from __future__ import annotations

from itertools import product as pairs_of

import numpy as np

from bitwright.exporters.integer.lowering import LOWERINGS, Lowering
from bitwright.exporters.integer.number import Integer
from bitwright.exporters.integer.products import Byte, Multiply, in_bytes, join, weight_byte, zero_points
from bitwright.exporters.integer.rescale import finish
from bitwright.graph.op import Op
from bitwright.numerics.fixed_point import Integers, Reals
from bitwright.ops.linear import Gemm, Linear


@LOWERINGS.register("Linear")
def _linear(low: Lowering, op: Op) -> None:
    assert isinstance(op, Linear)
    w, scale = low.weight(op, 1)
    acc = _by_weight(low, op, low.integer(op, 0), w if op.transposed else w.T, scale.reshape(-1))
    finish(low, op, acc.shifted(low.real_constant(op, 2)) if low.has_input(op, 2) else acc)


@LOWERINGS.register("MatMul")
def _matmul(low: Lowering, op: Op) -> None:
    if low.is_constant(op, 1):
        w, scale = low.weight(op, 1)
        if w.ndim < 2:
            raise low.refusal(op, "a matrix as second operand")
        finish(low, op, _by_weight(low, op, low.integer(op, 0), w, scale.reshape(-1)))
        return
    if min(len(low.shape_of(op, i)) for i in (0, 1)) < 2:
        raise low.refusal(op, "two matrices")
    a, b = low.integer(op, 0), low.integer(op, 1)
    finish(low, op, _of_two(low, op, a, b, len(low.shape_of(op)) - 1))


@LOWERINGS.register("Gemm")
def _gemm(low: Lowering, op: Op) -> None:
    assert isinstance(op, Gemm)
    a = low.integer(op, 0)
    if op.trans_a:
        a = _turned(low, a)
    if low.is_constant(op, 1):
        w, scale = low.weight(op, 1)
        acc = _by_weight(low, op, a, w.T if op.trans_b else w, scale.reshape(-1))
    else:
        b = low.integer(op, 1)
        acc = _of_two(low, op, a, _turned(low, b) if op.trans_b else b, 0 if op.trans_a else 1)
    acc = acc.scaled(op.alpha)
    finish(low, op, acc.shifted(op.beta * low.real_constant(op, 2)) if low.has_input(op, 2) else acc)


def _turned(low: Lowering, x: Integer) -> Integer:
    return Integer(low.node("Transpose", x.name, perm=[1, 0]), x.carrier, x.scale, x.zero, x.lo, x.hi)


def _by_weight(low: Lowering, op: Op, x: Integer, w: Integers, scale: Reals) -> Integer:
    """x `[..., m, k]` times codes *w* `[..., k, n]` with scales `[n]` or `[1]`."""
    reach = int(np.abs(w.astype(np.int64)).sum(-2).max(initial=0))
    stored = weight_byte(low, np.ascontiguousarray(w))
    scale = scale.reshape(()) if scale.size == 1 else scale
    return join(
        low,
        op,
        [(a, stored) for a in in_bytes(low, x)],
        _multiply(low),
        lambda a, b: a.peak * reach,
        np.asarray(x.scale * scale),
    )


def _of_two(low: Lowering, op: Op, a: Integer, b: Integer, axis: int) -> Integer:
    """a `[..., m, k]` times b `[..., k, n]`; *axis*: of the first input, the one of length k."""
    (k,) = low.fixed_lengths(op, [axis])
    pairs = list(pairs_of(in_bytes(low, a), in_bytes(low, b)))
    return join(
        low, op, pairs, _multiply(low), lambda x, y: k * x.peak * y.peak, np.asarray(a.scale * b.scale)
    )


def _multiply(low: Lowering) -> Multiply:
    def multiply(a: Byte, b: Byte) -> str:
        return low.node("MatMulInteger", a.name, b.name, *zero_points(low, a, b))

    return multiply

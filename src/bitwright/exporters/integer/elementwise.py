"""Sums, products and extrema of several values, element by element."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.exporters.integer.arithmetic import product, total
from bitwright.exporters.integer.lowering import LOWERINGS, Lowering
from bitwright.exporters.integer.number import Integer
from bitwright.exporters.integer.rescale import finish, requantize
from bitwright.graph.op import Op
from bitwright.numerics.fixed_point import Reals
from bitwright.ops.elementwise import Elementwise

#: Constants of more elements are read as codes: in a rescale they take 8 to 24 bytes an element.
_FEW = 1024


def operands(low: Lowering, op: Op) -> list[Integer | Reals]:
    """What *op* combines, its scalar included: integers, and constants as real numbers."""
    count = len(low.graph.op_inputs(op.name))
    found: list[Integer | Reals] = [low.operand(op, i, _FEW) for i in range(count)]
    if isinstance(op, Elementwise) and op.scalar is not None:
        found.insert(0 if op.scalar_first else 1, np.array(float(op.scalar)))
    if not any(isinstance(x, Integer) for x in found):
        raise low.refusal(op, "an operand that is not constant")
    return found


@LOWERINGS.register("Add", "Sub", "Mean")
def _sum(low: Lowering, op: Op) -> None:
    values = operands(low, op)
    if op.kind == "Sub":
        values = [
            x if i == 0 else x.scaled(-1.0) if isinstance(x, Integer) else -x for i, x in enumerate(values)
        ]
    if op.kind == "Mean":
        share = 1 / len(values)
        values = [x.scaled(share) if isinstance(x, Integer) else x * share for x in values]
    integers = [x for x in values if isinstance(x, Integer)]
    constant = sum((x for x in values if not isinstance(x, Integer)), np.zeros(()))
    if len(integers) == 1:
        finish(low, op, integers[0].shifted(constant))
    else:
        finish(low, op, total(low, op, integers, np.asarray(constant), low.output_q(op)))


@LOWERINGS.register("Mul")
def _mul(low: Lowering, op: Op) -> None:
    values = operands(low, op)
    acc: Integer | None = None
    factor: Reals = np.ones(())
    for x in values:
        if isinstance(x, Integer):
            acc = x if acc is None else product(low, acc, x)
        else:
            factor = np.asarray(factor * x)
    assert acc is not None
    finish(low, op, replace(acc, q=None).scaled(factor))


@LOWERINGS.register("Div")
def _div(low: Lowering, op: Op) -> None:
    values = operands(low, op)
    if (
        len(values) != 2
        or not isinstance(values[0], Integer)
        or isinstance(values[1], Integer)
        or not values[1].all()
    ):
        raise low.refusal(op, "a constant divisor without zeros")
    finish(low, op, values[0].scaled(1 / values[1]))


@LOWERINGS.register("Max", "Min")
def _extremum(low: Lowering, op: Op) -> None:
    """Rounding never swaps two numbers: the extremum of the codes is the code of the extremum."""
    values, q = operands(low, op), low.output_q(op)
    name = ""
    integers = [x for x in values if isinstance(x, Integer)]
    constants = [x for x in values if not isinstance(x, Integer)]
    if any(x.size > 1 for x in constants):
        integers = [low.integer(op, i) for i in range(len(values))]
        constants = []
    codes = [requantize(low, op, x, q) for x in integers]
    for x in codes:
        name = low.node(op.kind, name, x.name) if name else x.name
    result = replace(codes[0], name=name)
    if constants:
        bound = float((np.max if op.kind == "Max" else np.min)(constants))
        limit = {"floor": bound} if op.kind == "Max" else {"ceiling": bound}
        result = requantize(low, op, replace(result, **limit), q)  # type: ignore[arg-type]
    elif len(codes) == 1:
        result = requantize(low, op, result, q)
    finish(low, op, result)

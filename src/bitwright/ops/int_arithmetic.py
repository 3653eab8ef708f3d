"""Arithmetic of Python integers that depend on input sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.spelling import Built

#: Python functions of shape integers that export leaves in the graph.
INTEGER_FUNCTIONS: dict[Any, str] = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.floordiv: "Div",  # sizes are not negative, so truncating is flooring
    operator.mod: "Mod",
    operator.neg: "Neg",
    torch.sym_max: "Max",
    torch.sym_min: "Min",
}


class IntArithmetic(Op):
    """Arithmetic of Python integers that depend on input sizes. *operands*: numbers, None where an input stands."""

    kind = "IntArithmetic"
    roles = (Role.INDEX,)

    def __init__(self, function: Callable[..., Any], operands: Sequence[int | None]) -> None:
        super().__init__()
        self.function, self.operands = function, tuple(operands)

    def forward(self, *xs: Any) -> Any:
        rest = iter(xs)
        return self.function(*(next(rest) if o is None else o for o in self.operands))

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        rest = iter(inputs)
        names = [
            next(rest) if o is None else emit.constant(np.asarray(o, dtype=np.int64), f"operand{i}")
            for i, o in enumerate(self.operands)
        ]
        op_type = INTEGER_FUNCTIONS[self.function]
        emit.node(op_type, names, self.outputs)

    def describe(self) -> str:
        return f"{self.function.__name__}({', '.join('·' if o is None else str(o) for o in self.operands)})"


def integer_arithmetic(function: Callable[..., Any], operands: Sequence[Any]) -> Built:
    """The operator for *function* of fx nodes and numbers."""
    nodes = tuple(o for o in operands if isinstance(o, fx.Node))
    return Built(IntArithmetic(function, [None if isinstance(o, fx.Node) else o for o in operands]), nodes)

"""How far a local error is carried before a gradient meets it (docs/error-sketch.md §1).

What an error switches on behind an activation function, a gradient at clean values does not see: there the error is met behind it.
"""

from __future__ import annotations

import math

from bitwright.graph.graph import Graph
from bitwright.graph.op import Op
from bitwright.graph.replay import Reads

#: Activation functions: finite wherever their input is, so that no error becomes infinite on its way.
FUNCTIONS = frozenset(
    [
        "Clip",
        "Relu",
        "PRelu",
        "LeakyRelu",
        "ThresholdedRelu",
        "Shrink",
        "Elu",
        "Selu",
        "Celu",
        "Sigmoid",
        "HardSigmoid",
        "LogSigmoid",
        "HardSwish",
        "Silu",
        "Mish",
        "Gelu",
        "Softplus",
        "Softsign",
        "Tanh",
        "Erf",
    ]
)
#: An operator of so many multiply-accumulates for each element of its output is run again for every unit of what it reads.
_CHEAP_MACS = 32


def way_of(graph: Graph, reader: str, base: Reads) -> tuple[Op, ...]:
    """The operators from *reader* to the activation function behind it, itself among them.

    Empty if there is none that alone reads what *reader* makes, without a quantized read of *base* between, or if *reader* is not cheap.
    """
    op = graph.op(reader)
    if _is_activation_function(graph, op):
        return (op,)
    value = graph.value(op.outputs[0])
    if value.is_output or len(value.readers) != 1 or len(op.outputs) != 1 or not _is_cheap(graph, op):
        return ()
    after = graph.op(value.readers[0].op)
    return (
        (op, after) if _is_activation_function(graph, after) and (value.name, after.name) not in base else ()
    )


def _is_activation_function(graph: Graph, op: Op) -> bool:
    return op.kind in FUNCTIONS and graph.value(op.outputs[0]).info.is_float


def _is_cheap(graph: Graph, op: Op) -> bool:
    names = [*graph.op_inputs(op.name), *op.outputs]
    shapes = [None if n is None else graph.value(n).info.shape for n in names]
    if any(s is None for n, s in zip(names, shapes, strict=True) if n is not None):
        return False
    made = shapes[-1]
    assert made is not None
    return op.macs(shapes[:-1], [made]) <= _CHEAP_MACS * math.prod(made)

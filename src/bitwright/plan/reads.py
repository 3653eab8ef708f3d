"""Who reads what: from a plan to the quantized reads that the executor performs.

If the producer of a value is quantized, every reader sees the quantized value. If the producer is float (or there is
none: a graph input), only quantized readers see a quantized copy. Weights and biases are quantized for quantized readers.
"""

from __future__ import annotations

from bitwright.graph.graph import OUTPUT, Graph, Value
from bitwright.graph.op import Role
from bitwright.graph.replay import Reads
from bitwright.numerics.spec import QParams
from bitwright.plan.plan import Plan

#: Inputs in these roles are read quantized by quantized operators.
_READ_QUANTIZED = {Role.ACTIVATION, Role.WEIGHT, Role.BIAS}


def quantized_reads(graph: Graph, plan: Plan) -> Reads:
    """(value, operator) -> parameters, for every read of a quantized value. Pure look-up, no tensors."""
    reads: dict[tuple[str, str], QParams] = {}
    for name, entry in plan.values.items():
        if entry.qparams is None:
            continue
        value = graph.value(name)
        made_quantized = is_made_quantized(plan, value)
        for reader in value.readers:
            if made_quantized or (reader.role in _READ_QUANTIZED and is_quantized(plan, reader.op)):
                reads[(name, reader.op)] = entry.qparams
        if made_quantized and value.is_output:
            reads[(name, OUTPUT)] = entry.qparams
    return reads


def is_quantized(plan: Plan, op: str) -> bool:
    """True if the operator runs on codes."""
    return plan.ops[op].precision != "float"


def is_made_quantized(plan: Plan, value: Value) -> bool:
    """True if the value's producer is a quantized operator."""
    return value.producer is not None and is_quantized(plan, value.producer)

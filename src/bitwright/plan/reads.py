"""Who reads what: from a plan to the quantized reads that the executor performs.

If the producer of a value is quantized, every reader sees the quantized value. If the producer is float (or there is
none: a graph input), only quantized readers see a quantized copy. Weights and biases are quantized for quantized readers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from bitwright.graph.graph import OUTPUT, Graph, Value
from bitwright.graph.op import Role
from bitwright.graph.replay import Reads
from bitwright.numerics.spec import QParams
from bitwright.plan.plan import Plan
from bitwright.plan.target import Precision

#: What to do about infinity in masks.
GIVE_MASKS = "give masks as numbers not much larger than the scores, such as -50"
#: Inputs in these roles are read quantized by quantized operators.
_READ_QUANTIZED = {Role.ACTIVATION, Role.WEIGHT, Role.BIAS}


def quantized_reads(graph: Graph, plan: Plan) -> Reads:
    """(value, operator) -> parameters, for every read of a quantized value. Pure look-up, no tensors."""
    reads: dict[tuple[str, str], QParams] = {}
    for name, entry in plan.values.items():
        if entry.qparams is not None:
            edges = read_edges(graph.value(name), lambda op: is_quantized(plan, op))
            reads.update(dict.fromkeys(edges, entry.qparams))
    return reads


def reads_of_group(graph: Graph, plan: Plan, members: Iterable[str]) -> Reads:
    """The quantized reads of *plan* (solved) if only the operators *members* were quantized, and nothing else."""
    inside = {m for m in members if is_quantized(plan, m)}
    touched: dict[str, None] = {}
    for op in inside:
        touched.update({n: None for n in graph.op_inputs(op) if n is not None})
        touched.update(dict.fromkeys(graph.op(op).outputs))
    reads: dict[tuple[str, str], QParams] = {}
    for name in touched:
        q = plan.qparams(name)
        if q is not None:
            reads.update(dict.fromkeys(read_edges(graph.value(name), inside.__contains__), q))
    return reads


def masked_groups(graph: Graph, plan: Plan, infinite: Collection[str]) -> dict[str, str]:
    """Quantized groups that write or read one of the values *infinite*, for which no code stands: group -> reason."""
    found: dict[str, str] = {}
    for name in plan.values:
        if name in infinite:
            why = f"value {name} holds infinity (a mask); to quantize this, {GIVE_MASKS}"
            value = graph.value(name)
            ops = [r.op for r in value.readers] + ([value.producer] if value.producer else [])
            found.update({plan.ops[op].group: why for op in ops if is_quantized(plan, op)})
    return found


def read_edges(value: Value, quantized: Callable[[str], bool]) -> list[tuple[str, str]]:
    """The reads (value, operator) that see *value* quantized, by which operators are *quantized*."""
    made = value.producer is not None and quantized(value.producer)
    edges = [
        (value.name, r.op) for r in value.readers if made or (r.role in _READ_QUANTIZED and quantized(r.op))
    ]
    return [*edges, (value.name, OUTPUT)] if made and value.is_output else edges


def width(graph: Graph, plan: Plan, name: str) -> Precision:
    """`int16` or `int8`: how a value is quantized: as its producer is; if that is float, as the widest of its quantized readers.

    What a composite operator reads counts as read by the whole; its constants are int16: a bias is added to an int16 value.
    """
    value = graph.value(name)
    if is_made_quantized(plan, value):
        return "int16" if plan.ops[value.producer or ""].precision == "int16" else "int8"
    readers = [r.op for r in value.readers]
    in_composite = value.is_constant and any(graph.op(op).composite is not None for op in readers)
    wide = any(_precision_seen_from(graph, plan, value, op) == "int16" for op in readers)
    return "int16" if in_composite or wide else "int8"


def _precision_seen_from(graph: Graph, plan: Plan, value: Value, reader: str) -> Precision:
    """The precision of *reader*; where it is the first inner part of a composite operator, of that operator."""
    part = graph.op(reader).composite
    source = None if value.producer is None else graph.op(value.producer).composite
    if part is None or not part.is_inner or (source is not None and source.name == part.name):
        return plan.ops[reader].precision
    ends = [op.name for op in graph.ops if op.composite == replace(part, is_inner=False)]
    return plan.ops[ends[-1]].precision


def is_quantized(plan: Plan, op: str) -> bool:
    """True if the operator runs on codes."""
    return plan.ops[op].precision != "float"


def is_made_quantized(plan: Plan, value: Value) -> bool:
    """True if the value's producer is a quantized operator."""
    return value.producer is not None and is_quantized(plan, value.producer)

"""From a graph and a target to a plan without parameters: which values are quantized, which operators form a group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from bitwright.graph.graph import Graph, Reader, Value
from bitwright.graph.op import Op, Role
from bitwright.plan.plan import OpEntry, Plan, ValueEntry, ValueRole
from bitwright.plan.target import PRECISIONS, Precision, Target

_QUANTIZED_ROLES = (Role.ACTIVATION, Role.WEIGHT)


def assign(
    graph: Graph, target: Target, *, asked: Mapping[str, Precision] | None = None, method: str = "max"
) -> Plan:
    """The plan that quantizes everything *target* allows.

    *asked*: operator name -> precision wished for (default: int8 everywhere); that of a composite operator is for its parts.
    Inner parts are int16, or float like the whole. What is not granted is float, with the reason in `OpEntry.why`. *method*: threshold method of every activation, until a search decides otherwise.
    """
    quantizable = {op.name for op in graph.ops if _is_quantizable(graph, op)}
    inner = {v.name for v in graph.values.values() if _stays_in_accumulator(graph, target, v, quantizable)}
    groups = _groups(graph, inner)
    ops = {}
    for op in graph.ops:
        if op.name in quantizable:
            precision, why = _grant(graph, target, op, _wish(op, asked or {}))
        else:
            precision, why = "float", "computes no real numbers that could be quantized"
        ops[op.name] = OpEntry(op.kind, groups[op.name], precision, op.name in quantizable, why)
    ops = _agree_within_groups(ops, {name for name in ops if _has_weight(graph, name)})
    values = {}
    for v in graph.values.values():
        entry = (
            None if v.name in inner else _entry(graph, v, quantizable - _epilogues(graph, v, inner), method)
        )
        if entry is not None:
            values[v.name] = entry
    return Plan(target.name, values, ops)


def _is_quantizable(graph: Graph, op: Op) -> bool:
    """An operator with a real-valued output and a real-valued input that is not a mere parameter."""
    names = graph.op_inputs(op.name)
    reads = any(
        name is not None and op.role(i) in _QUANTIZED_ROLES and graph.value(name).info.is_float
        for i, name in enumerate(names)
    )
    return reads and any(o in graph.values and graph.value(o).info.is_float for o in op.outputs)


def _wish(op: Op, asked: Mapping[str, Precision]) -> Precision:
    whole = "" if op.composite is None else op.composite.name
    return asked.get(op.name) or asked.get(whole) or "int8"


def _grant(graph: Graph, target: Target, op: Op, wish: Precision) -> tuple[Precision, str]:
    precision, why = _granted_to_the_whole(graph, target, op, wish)
    if op.is_inner and precision != "float":
        assert op.composite is not None
        return "int16", f"inside the {op.composite.kind} {op.composite.name}, which is int16 on every target"
    return precision, why


def _granted_to_the_whole(graph: Graph, target: Target, op: Op, wish: Precision) -> tuple[Precision, str]:
    """What is granted to what the author wrote: the operator, or the composite one that it is a part of."""
    kind, allowed = op.author_kind, target.allowed(op.author_kind)
    if wish == "w4a8" and "int8" in allowed:
        if _takes_int4(graph, target, [op.name]):
            return "w4a8", ""
        return "int8", "" if not _has_weight(graph, op.name) else f"{target.name} has no int4 weights"
    if wish in allowed:
        return wish, ""
    if wish != "float" and "int16" in allowed and wish == "int8":
        return "int16", f"{target.name} has no int8 {kind}; int16 is the narrowest it allows"
    return "float", f"{target.name} does not allow {wish} {kind} (allowed: {', '.join(allowed)})"


# --- groups ----------------------------------------------------------------------------------------------------


def _stays_in_accumulator(graph: Graph, target: Target, value: Value, quantizable: set[str]) -> bool:
    """True if *value* goes from one operator to the only one that reads it, and the target joins the two."""
    if value.producer is None or value.is_output or len(value.readers) != 1 or not value.info.is_float:
        return False
    reader = value.readers[0]
    if not {value.producer, reader.op} <= quantizable or graph.op(reader.op).table_function() is not None:
        return False
    how = target.fusable.get((graph.op(value.producer).kind, graph.op(reader.op).kind))
    return how is not None and _operand_is(how, graph, reader)


def _operand_is(how: str, graph: Graph, reader: Reader) -> bool:
    if how == "always":
        return True
    others = [n for i, n in enumerate(graph.op_inputs(reader.op)) if i != reader.index and n is not None]
    if not all(graph.value(n).is_constant for n in others):
        return False
    return how == "constant" or all(graph.constant(n).numel() == 1 for n in others)


def _groups(graph: Graph, inner: set[str]) -> dict[str, str]:
    """Operator -> group name. A group is named after its first operator with weights, else its first."""
    leader: dict[str, str] = {}
    for op in graph.ops:
        producers = [graph.value(n).producer for n in graph.op_inputs(op.name) if n in inner]
        joined = {leader[p] for p in producers if p is not None}
        first = min(joined, key=list(leader).index, default=op.name)
        leader.update({name: first for name, held in leader.items() if held in joined})
        leader[op.name] = first
    members: dict[str, list[str]] = {}
    for name, first in leader.items():
        members.setdefault(first, []).append(name)
    named = {}
    for names in members.values():
        weighted = [n for n in names if _has_weight(graph, n)]
        title = (weighted or names)[0]
        named.update(dict.fromkeys(names, title))
    return named


def _has_weight(graph: Graph, name: str) -> bool:
    op = graph.op(name)
    return any(
        v is not None and op.role(i) is Role.WEIGHT and graph.value(v).is_constant
        for i, v in enumerate(graph.op_inputs(name))
    )


def _agree_within_groups(ops: dict[str, OpEntry], weighted: set[str]) -> dict[str, OpEntry]:
    """One precision for each group: the widest that a member was given, with that member's reason. Beside an operator with int4
    weights, int8 of one without weights means no more."""
    chosen: dict[str, OpEntry] = {}
    for name, entry in sorted(ops.items(), key=lambda item: item[0] not in weighted):
        held = chosen.get(entry.group)
        wider = held is None or PRECISIONS.index(entry.precision) > PRECISIONS.index(held.precision)
        if held is not None and held.precision == "w4a8" and name not in weighted:
            wider = wider and entry.precision != "int8"
        if entry.quantizable and wider:
            chosen[entry.group] = entry
    return {
        name: replace(e, precision=chosen[e.group].precision, why=chosen[e.group].why) if e.quantizable else e
        for name, e in ops.items()
    }


# --- values ----------------------------------------------------------------------------------------------------


def _entry(graph: Graph, value: Value, quantizable: set[str], method: str) -> ValueEntry | None:
    """The entry of *value*, or None if nothing would ever quantize it."""
    if not value.info.is_float:
        return None
    readers = [r for r in value.readers if r.op in quantizable]
    roles = {r.role for r in readers}
    if value.is_constant:
        role = _constant_role(roles)
        return None if role is None else ValueEntry(role, "max")
    made_by = value.producer if value.producer in quantizable else None
    if made_by is None and not roles & {*_QUANTIZED_ROLES}:
        return None
    return ValueEntry("activation", method, _shares_with(graph, value, made_by))


def _epilogues(graph: Graph, value: Value, inner: set[str]) -> set[str]:
    """Readers of a constant that work inside an accumulator (a bias added after a product): they read it unquantized."""
    if not value.is_constant:
        return set()
    return {r.op for r in value.readers if any(n in inner for n in graph.op_inputs(r.op))}


def _constant_role(roles: set[Role]) -> ValueRole | None:
    if Role.WEIGHT in roles:
        return "weight"
    if Role.BIAS in roles:
        return "bias"
    return "constant" if Role.ACTIVATION in roles else None


def _shares_with(graph: Graph, value: Value, producer: str | None) -> str | None:
    if producer is None or not graph.op(producer).passthrough:
        return None
    source = graph.op_inputs(producer)[0]
    return source if source is not None and graph.value(source).info.is_float else None


def allowed_precisions(graph: Graph, plan: Plan, target: Target, group: str) -> tuple[Precision, ...]:
    """The precisions that *target* grants *group* of *plan*: those of all its quantizable operators, narrow to wide."""
    members = plan.groups[group]
    ops = [graph.op(m) for m in members]
    granted = {p for p in PRECISIONS if all(p in _allowed(target, op) for op in ops)}
    if "int8" in granted and _takes_int4(graph, target, members):
        granted.add("w4a8")
    return tuple(p for p in PRECISIONS if p in granted)


def _allowed(target: Target, op: Op) -> tuple[Precision, ...]:
    allowed = target.allowed(op.author_kind)
    return ("int16", "float") if op.is_inner and allowed != ("float",) else allowed


def _takes_int4(graph: Graph, target: Target, members: Iterable[str]) -> bool:
    """Whether *target* knows int4 weights and an operator of a group has some. A shift alone leads to no int4 scale."""
    knows = target.weight.int4 and target.rescale.form != "shift"
    return knows and any(_has_weight(graph, m) for m in members)

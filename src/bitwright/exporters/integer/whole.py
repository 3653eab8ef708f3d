"""`write`: every operator of a graph, in integers where that is possible, in float where it is not."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch

from bitwright.errors import BitwrightError
from bitwright.exporters.integer.lowering import LOWERINGS, TABLE, Lowering, onnx_type
from bitwright.exporters.integer.number import codes_of
from bitwright.exporters.writer import to_numpy
from bitwright.graph.graph import OUTPUT, Value
from bitwright.graph.op import Op
from bitwright.numerics.affine import quantize
from bitwright.plan.reads import is_quantized


def write(low: Lowering) -> None:
    """Write everything."""
    for value in low.graph.values.values():
        if value.producer is None and not value.is_constant:
            low.writer.begin_edge(value.name)
            _quantize_for_readers(low, value, value.name)
    for op in low.graph.ops:
        low.writer.begin(op)
        why = _lower(low, op)
        if why is not None:
            _write_island(low, op, why)
    for name in dict.fromkeys(low.graph.info.outputs):
        low.writer.begin_edge(name)
        low.as_real(name)


def _lower(low: Lowering, op: Op) -> str | None:
    """Write *op* in integers; returns why not, if so."""
    entry = low.plan.ops[op.name]
    lower = LOWERINGS.find(TABLE) if op.name in low.tables else LOWERINGS.find(op.kind)
    if not is_quantized(low.plan, op.name):
        return entry.why or "float in the plan"
    if _is_constant(low, op):
        lower = _fold
    if lower is None:
        table = op.table_function() is not None
        return "no table was built" if table else f"{op.kind} has no integer form"
    count, known = len(low.accumulators), (dict(low.codes), dict(low.inner), set(low.real))
    try:
        lower(low, op)
    except BitwrightError as e:
        low.writer.take_back()
        del low.accumulators[count:]
        low.codes, low.inner, low.real = known
        return f"expected {e.expected}; found {e.found}"
    return None


# --- operators of constants --------------------------------------------------------------------------------------


def _is_constant(low: Lowering, op: Op) -> bool:
    names = low.graph.op_inputs(op.name)
    return bool(names) and all(n is None or low.graph.value(n).is_constant for n in names)


def _fold(low: Lowering, op: Op) -> None:
    """An operator of constants: its result is one."""
    node, q = low.graph.op_node(op.name), low.output_q(op)
    names = low.graph.op_inputs(op.name)
    read = [
        a
        if n is None
        else torch.from_numpy(low.real_constant(op, i).astype(np.float32))
        if low.is_real(n)
        else low.graph.constant(n)
        for i, (a, n) in enumerate(zip(node.args, names, strict=True))
    ]
    with torch.no_grad():
        codes = quantize(op(*read), q)
    stored = low.constant_codes(codes, q)
    low.finish(op, replace(stored, name=low.node("Identity", stored.name)))


# --- float islands -----------------------------------------------------------------------------------------------


def _write_island(low: Lowering, op: Op, why: str) -> None:
    outputs = [o for o in op.outputs if o in low.graph.values]
    if low.plan.ops[op.name].quantizable:
        low.islands[op.name] = why
    names = low.writer.call_inputs(op)
    sources = [_island_input(low, op, name) if name in low.graph.values else name for name in names]
    clone = copy.copy(op)
    raw = {o: low.writer.temporary("raw") if _is_rounded(low, o) else o for o in op.outputs if o}
    clone.outputs = tuple(raw.get(o, o) for o in op.outputs)
    low.writer.aliases.update({name: o for o, name in raw.items() if name != o})
    clone.to_onnx(low.writer, sources)
    for o in outputs:
        if raw[o] == o:
            low.real.add(o)
        _quantize_for_readers(low, low.graph.value(o), raw[o])


def _is_rounded(low: Lowering, value: str) -> bool:
    """Whether an island that makes *value* leaves only its codes: every reader sees them."""
    held = low.graph.values.get(value)
    return (
        held is not None
        and held.producer is not None
        and (is_quantized(low.plan, held.producer) and low.plan.qparams(value) is not None)
    )


def _island_input(low: Lowering, op: Op, name: str | None) -> str:
    """What an island reads: the real numbers, quantized where the plan says so."""
    assert name is not None
    q = low.reads.get((name, op.name))
    if q is None:
        return low.as_real(name)
    if low.graph.value(name).is_constant:
        codes = to_numpy(quantize(low.graph.constant(name).detach(), q))
        made = low.dequantized(low.constant(codes.astype(onnx_type(q))), q, codes.shape)
        low.writer.aliases[made] = name
        return made
    if name not in low.real:
        return low.as_real(name)
    if name not in low.copies:
        low.copies[name] = low.dequantized(low.stored(low.codes[name]), q)
        low.writer.aliases[low.copies[name]] = name
    return low.copies[name]


def _quantize_for_readers(low: Lowering, value: Value, source: str) -> None:
    """Codes of a value that is there as the real numbers *source*, if something reads it quantized."""
    readers = [*(r.op for r in value.readers), OUTPUT]
    q = next((low.reads[value.name, op] for op in readers if (value.name, op) in low.reads), None)
    if q is None:
        return
    made = low.writer.temporary("codes")
    scale, zero = np.array(q.scale[0], np.float32), np.array(q.zero_point[0]).astype(onnx_type(q))
    low.writer.node("QuantizeLinear", [source, low.constant(scale), low.constant(zero)], [made])
    codes = codes_of(low.writer.mark(made, value.name), q)
    if codes.carrier == "int32":
        codes = replace(codes, name=low.cast(codes.name, "int32"))
    low.writer.aliases[codes.name] = value.name
    low.codes[value.name] = codes

"""Operators that only move or choose codes: they write themselves, on integers instead of real numbers."""

from __future__ import annotations

from dataclasses import replace

from bitwright.exporters.integer.arithmetic import finish
from bitwright.exporters.integer.lowering import LOWERINGS, Lowering
from bitwright.exporters.integer.number import Carrier, same_parameters
from bitwright.graph.op import Op

#: Kinds for which ONNX Runtime lacks a kernel of some types -> the types it has.
_KERNELS: dict[str, tuple[Carrier, ...]] = {
    "DepthToSpace": ("int8", "uint8"),
    "SpaceToDepth": ("int8", "uint8"),
    "Trilu": ("int32", "int64"),
}


@LOWERINGS.register(
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "ExpandAs", "Tile", "Flip"),
    *("Slice", "Split", "Gather", "GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth", "Trilu"),
    *("Identity", "Dropout", "TopK", "Extremum", "ReduceMax", "ReduceMin"),
)
def move(low: Lowering, op: Op) -> None:
    """Write *op* itself; its results are codes of its first input."""
    x = low.integer(op, 0)
    if x.scale.size > 1 or x.zero.size > 1:
        raise low.refusal(op, "an input with one scale")
    name = x.name
    carriers = _KERNELS.get(op.kind, (x.carrier,))
    if x.carrier not in carriers:
        if x.carrier == "int32":
            raise low.refusal(op, f"a kernel of {op.kind} for 16-bit codes in ONNX Runtime")
        name = low.cast(name, carriers[0])
    made = low.write_itself(op, {0: name})
    for i, result in enumerate(made):
        held = low.graph.values.get(op.outputs[i])
        if held is None or not held.info.is_float:
            continue
        if x.carrier not in carriers:
            result = low.cast(result, x.carrier)
        moved, q = replace(x, name=result), low.plan.qparams(op.outputs[i])
        if q is not None and x.q is not None and same_parameters(x.q, q):
            low.finish(op, moved, i)
        else:
            finish(low, op, moved, i)

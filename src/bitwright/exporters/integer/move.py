"""Operators that only move or choose codes: they write themselves, on integers instead of real numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.exporters.integer.arithmetic import centred
from bitwright.exporters.integer.lowering import LOWERINGS, Lowering
from bitwright.exporters.integer.number import same_parameters
from bitwright.exporters.integer.rescale import finish
from bitwright.graph.op import Op
from bitwright.ops.depth import DepthToSpace, SpaceToDepth


@LOWERINGS.register(
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "ExpandAs", "Tile", "Flip"),
    *("Slice", "Split", "Gather", "GatherElements", "GatherND"),
    *("Identity", "Dropout", "TopK", "Extremum", "ReduceMax", "ReduceMin"),
)
def move(low: Lowering, op: Op) -> None:
    """Write *op* itself; its results are codes of its first input."""
    x = low.integer(op, 0)
    if x.scale.size > 1 or x.zero.size > 1:
        raise low.refusal(op, "an input with one scale")
    made = low.write_itself(op, {0: x.name})
    for i, result in enumerate(made):
        held = low.graph.values.get(op.outputs[i])
        if held is None or not held.info.is_float:
            continue
        moved, q = replace(x, name=result), low.plan.qparams(op.outputs[i])
        if q is not None and x.q is not None and same_parameters(x.q, q):
            low.finish(op, moved, i)
        else:
            finish(low, op, moved, i)


@LOWERINGS.register("DepthToSpace", "SpaceToDepth")
def _blocks(low: Lowering, op: Op) -> None:
    """As Reshape and Transpose, which know every type."""
    assert isinstance(op, DepthToSpace | SpaceToDepth)
    x, b = low.integer(op, 0), op.block
    c, h, w = low.fixed_lengths(op, [1, 2, 3])
    if isinstance(op, DepthToSpace):
        c //= b * b
        crd = op.mode == "CRD"
        split, perm = ([c, b, b, h, w], [0, 1, 4, 2, 5, 3]) if crd else ([b, b, c, h, w], [0, 3, 4, 1, 5, 2])
        shape = [c, h * b, w * b]
    else:
        split, shape = [c, h // b, b, w // b, b], [c * b * b, h // b, w // b]
        perm = [0, 1, 3, 5, 2, 4] if op.mode == "CRD" else [0, 3, 5, 1, 2, 4]
    name = low.node("Reshape", x.name, low.constant(np.array([-1, *split], np.int64)))
    name = low.node("Transpose", name, perm=perm)
    name = low.node("Reshape", name, low.constant(np.array([-1, *shape], np.int64)))
    finish(low, op, replace(x, name=name))


@LOWERINGS.register("Trilu")
def _triangle(low: Lowering, op: Op) -> None:
    """What falls away becomes 0, which is no code of an asymmetric value."""
    x = centred(low, low.integer(op, 0))
    (name,) = low.write_itself(op, {0: x.name})
    finish(low, op, replace(x, name=name))

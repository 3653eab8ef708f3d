"""Operators that no gradient passes though their results depend on real numbers: rounding, comparisons, places of a maximum."""

from __future__ import annotations

from collections.abc import Iterable

from bitwright.graph.graph import Graph
from bitwright.graph.op import Op

_STEPS = frozenset({"Round", "Floor", "Ceil", "Sign", "Trunc", "FloorDiv"})
#: Their integers do not depend on the numbers of what they read.
_OF_SHAPES = frozenset({"Shape", "Size", "ElementCount", "FillLike"})


def behind_steps(graph: Graph, outputs: Iterable[str]) -> dict[str, str]:
    """Operators of whose effect on the values *outputs* some goes through a step: name -> the step. A gradient tells the rest only."""
    live, behind, found = set(outputs), dict[str, str](), dict[str, str]()
    for op in reversed(list(graph.ops)):
        used = [o for o in op.outputs if o in live]
        if not used:
            continue
        inputs = [n for n in graph.op_inputs(op.name) if n is not None and not graph.value(n).is_constant]
        live.update(inputs)
        step = op.name if _is_step(graph, op, used) else next((behind[o] for o in used if o in behind), None)
        if step is not None:
            found[op.name] = step
            behind.update({n: step for n in inputs if graph.value(n).info.is_float})
    return found


def _is_step(graph: Graph, op: Op, used: Iterable[str]) -> bool:
    if op.kind in _OF_SHAPES:
        return False
    real = any(n is not None and graph.value(n).info.is_float for n in graph.op_inputs(op.name))
    return real and (op.kind in _STEPS or any(not graph.value(o).info.is_float for o in used))

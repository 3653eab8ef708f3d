"""Parameters of biases: they join the accumulator, so its scale is theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from bitwright.graph.graph import Graph
from bitwright.graph.op import Role
from bitwright.numerics.spec import QParams
from bitwright.plan.plan import Plan, ValueEntry
from bitwright.plan.reads import is_quantized
from bitwright.plan.target import Target


def bias_entry(
    graph: Graph, target: Target, plan: Plan, values: Mapping[str, ValueEntry], name: str
) -> ValueEntry:
    """The entry of bias *name*: scale = input scale x weight scale, zero point 0, or why there is none. *values*: the others, solved."""
    entry = values[name]
    readers = [r for r in graph.value(name).readers if r.role is Role.BIAS and is_quantized(plan, r.op)]
    if not readers:
        return replace(entry, qparams=None, why="only float operators read it")
    if len(readers) > 1:
        return replace(entry, qparams=None, why="shared by several operators with accumulators of their own")
    inputs = graph.op_inputs(readers[0].op)
    x, w = (values.get(n or "") for n in inputs[:2])
    if x is None or x.qparams is None or w is None or w.qparams is None:
        return replace(entry, qparams=None, why="its operator has no quantized input or weight")
    if w.qparams.spec.group:
        return replace(
            entry, qparams=None, why="groups of its operator's weights have accumulators of their own"
        )
    count = graph.constant(name).numel()
    scales = w.qparams.scale if len(w.qparams.scale) in (1, count) else (max(w.qparams.scale),)
    scale = tuple(float(torch.tensor(x.qparams.scale[0] * s, dtype=torch.float32)) for s in scales)
    if min(scale) <= 0:
        return replace(entry, qparams=None, why="the accumulator's step is below float32")
    spec = target.bias_spec(0 if len(scale) > 1 else None)
    peak = float(graph.constant(name).detach().abs().max()) if count else 0.0
    if spec.dtype.bits == 32 and peak / min(scale) >= spec.dtype.qmax:
        return replace(entry, qparams=None, why="does not fit into int32 at the accumulator's scale")
    steps = graph.constant(name).detach().flatten().abs().cpu() / torch.tensor(scale)
    beyond = int((steps.round() > spec.dtype.qmax).sum())
    why = f"{beyond} of {count} saturate in {spec.dtype.name}" if beyond else ""
    return replace(entry, qparams=QParams(spec, scale, (0,) * len(scale)), why=why)

"""The mixed-precision search: walk from the input, let the similarity of single layers point at suspects.

For each group in execution order whose own output is less similar to float than asked, the group and the groups that
read it go back to float; the network's similarity decides: worse than all-int8 undoes the step, the target ends the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.graph.replay import Environment, Reads
from bitwright.numerics.cosine import cosine
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.evaluator import Evaluator, as_read
from bitwright.search.state import SearchState


@dataclass(frozen=True)
class WalkStep:
    """One suspect. *layer_similarity*: of its own output; *similarity*: of the network with *groups* float."""

    group: str
    layer_similarity: float
    groups: tuple[str, ...]
    similarity: float
    kept: bool


@dataclass(frozen=True)
class Walk:
    """The result of the walk. *layers*: group -> similarity of its output to float, as last measured."""

    plan: Plan
    similarity: float
    initial: float
    steps: tuple[WalkStep, ...]
    layers: Mapping[str, float]

    @property
    def float_groups(self) -> list[str]:
        """The groups that were put back to float, in order."""
        return [g for s in self.steps if s.kept for g in s.groups]


def search_mixed_precision(
    evaluator: Evaluator,
    plan: Plan,
    solve: Callable[[Plan], Plan],
    *,
    target: float,
    min_layer_similarity: float = 0.99,
    limit: int,
    state: SearchState | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Walk:
    """Walk *plan* (solved, all int8). *limit*: at most so many groups become float."""
    state = state or SearchState(None, "")
    order = list(plan.groups)
    initial, layers = _measured(evaluator, plan, state)
    current, best, steps = plan, initial, list[WalkStep]()
    floats = 0
    try:
        for position, group in enumerate(order):
            if best >= target or floats >= limit:
                break
            if progress:
                progress(position, len(order), group)
            if layers.get(group, 1.0) >= min_layer_similarity or current.precision(group) == "float":
                continue
            chosen = [
                g
                for g in (group, *_next_groups(evaluator, current, group))
                if current.precision(g) != "float"
            ]
            chosen = chosen[: limit - floats]
            why = f"mixed-precision walk: its output is only {layers[group]:.4f} similar to float"
            trial = solve(current.with_precision(chosen, "float", why))
            similarity, trial_layers = _measured(evaluator, trial, state)
            kept = similarity >= initial
            steps.append(WalkStep(group, layers[group], tuple(chosen), similarity, kept))
            if kept:
                current, best, layers = trial, similarity, trial_layers
                floats += len(chosen)
    finally:
        state.save()
    return Walk(current, best, initial, tuple(steps), layers)


def _next_groups(evaluator: Evaluator, plan: Plan, group: str) -> list[str]:
    """The groups that read a value which *group* produces."""
    members = plan.groups[group]
    found: dict[str, None] = {}
    for member in members:
        for output in evaluator.graph.op(member).outputs:
            if output not in plan.values:
                continue
            for reader in evaluator.graph.value(output).readers:
                entry = plan.ops[reader.op]
                if entry.quantizable and entry.group != group:
                    found[entry.group] = None
    return list(found)


def _measured(evaluator: Evaluator, plan: Plan, state: SearchState) -> tuple[float, dict[str, float]]:
    """Network similarity and layer similarities of *plan*; looked up if an interrupted run measured it already."""
    key = "float:" + ",".join(plan.float_groups)
    held = state.get(key)
    if held is None:
        held = _measure(evaluator, plan)
        state.put(key, held)
    return float(held[0]), {str(k): float(v) for k, v in held[1].items()}


def _measure(evaluator: Evaluator, plan: Plan) -> tuple[float, dict[str, float]]:
    reads = quantized_reads(evaluator.graph, plan)
    results = {g: _result(evaluator, plan, members) for g, members in plan.groups.items()}
    wanted = [v for v in results.values() if v is not None]
    sums = dict.fromkeys(results, 0.0)
    network, samples = 0.0, 0
    evaluator.reference()
    for inputs, reference in evaluator.pairs():
        clean = evaluator.replay.run(inputs, keep=wanted)
        noisy = evaluator.replay.run(inputs, reads, keep=wanted)
        evaluator.count(inputs, 2.0)
        rows = evaluator.similarity(reference, evaluator.scored(noisy, evaluator.samples(inputs)))[0]
        network += float(rows.sum())
        samples += rows.numel()
        for group, value in results.items():
            if value is not None:
                sums[group] += _layer_similarity(evaluator, value, clean, noisy, reads) * rows.numel()
    return network / samples, {g: s / samples for g, s in sums.items() if results[g] is not None}


def _result(evaluator: Evaluator, plan: Plan, members: list[str]) -> str | None:
    """The first real-valued output of a group that has an entry."""
    outputs = [o for m in members for o in evaluator.graph.op(m).outputs if o in plan.values]
    return outputs[0] if outputs else None


def _layer_similarity(
    evaluator: Evaluator, name: str, clean: Environment, noisy: Environment, reads: Reads
) -> float:
    x = noisy[name]
    # Outputs of the graph come back as their readers see them; inner values as they were computed.
    if name not in evaluator.graph.info.outputs:
        x = as_read(evaluator.graph, name, x, reads)
    a, b = _rows(evaluator, name, clean[name]), _rows(evaluator, name, x)
    return float(cosine(a, b).mean())


def _rows(evaluator: Evaluator, name: str, x: Tensor) -> Tensor:
    axis = evaluator.graph.value(name).info.batch_axis
    return torch.flatten(x).unsqueeze(0) if axis is None else x.movedim(axis, 0).flatten(1)

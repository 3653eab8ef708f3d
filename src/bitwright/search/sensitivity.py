"""The exact sensitivity search: every operator group alone at int8, by every threshold method, the rest float.

The loss of a candidate is 1 - similarity of the network's outputs, averaged over samples. For each chunk of samples the
float activations are computed once; a candidate then executes its own group under quantized reads, and what lies
downstream of it, with all methods of the group stacked along the batch. Methods that lead to equal parameters are run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.graph.graph import Graph
from bitwright.graph.replay import Environment, Reads
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.evaluator import Evaluator, as_read
from bitwright.search.state import SearchState

#: The three methods of the procedure that this search implements, in its order; the first wins ties.
METHODS = ("max", "percentile", "kl")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sensitivity:
    """One group's result. *losses*: method -> mean loss; *errors*: its standard error over samples."""

    name: str
    kind: str
    members: tuple[str, ...]
    losses: Mapping[str, float]
    errors: Mapping[str, float]
    method: str

    @property
    def loss(self) -> float:
        """The loss under the best method."""
        return self.losses[self.method]


@dataclass(frozen=True)
class _Candidate:
    """One group at int8. *reads*: the reads of each distinct set of parameters; *of*: method -> index into *reads*.

    *results*: the values that the rest of the network may read; *below*: the operators that depend on them.
    """

    group: str
    members: tuple[str, ...]
    results: tuple[str, ...]
    below: frozenset[str]
    reads: tuple[Reads, ...]
    of: Mapping[str, int]


def measure_sensitivity(
    evaluator: Evaluator,
    plan: Plan,
    solve: Callable[[Plan], Plan],
    *,
    methods: Sequence[str] = METHODS,
    state: SearchState | None = None,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """The sensitivities of all quantized groups of *plan*, in descending order of loss.

    *solve*: gives a plan its parameters. *state*: measurements to resume from and add to.
    """
    state = state or SearchState(None, "")
    candidates = _candidates(evaluator, plan, solve, methods)
    chunks = evaluator.reference()
    total = len(candidates) * chunks
    done = 0
    try:
        for index, (inputs, reference) in enumerate(evaluator.pairs()):
            missing = [c for c in candidates if f"{index}:{c.group}" not in state]
            done += len(candidates) - len(missing)
            cached = _float_pass(evaluator, inputs) if missing else {}
            for candidate in missing:
                losses = _losses(evaluator, candidate, inputs, cached, reference)
                state.put(f"{index}:{candidate.group}", losses.tolist())
                done += 1
                if progress:
                    progress(done, total, candidate.group)
    finally:
        state.save()
    rows = [_row(plan, c, state, chunks, methods) for c in candidates]
    return sorted(rows, key=lambda r: -r.loss)


def _candidates(
    evaluator: Evaluator, plan: Plan, solve: Callable[[Plan], Plan], methods: Sequence[str]
) -> list[_Candidate]:
    activations = [n for n, e in plan.values.items() if e.role == "activation"]
    solved = {m: solve(plan.with_methods(dict.fromkeys(activations, m))) for m in methods}
    found = []
    for group, members in plan.groups.items():
        others = [g for g in plan.groups if g != group]
        distinct: list[Reads] = []
        of: dict[str, int] = {}
        for method, full in solved.items():
            if full.precision(group) == "float":
                continue
            reads = quantized_reads(evaluator.graph, full.with_precision(others, "float", ""))
            if reads not in distinct:
                distinct.append(reads)
            of[method] = distinct.index(reads)
        if of:
            results = tuple(_results(evaluator.graph, plan, members))
            below = frozenset(evaluator.replay.downstream(members) - {*members})
            found.append(_Candidate(group, tuple(members), results, below, tuple(distinct), of))
    return found


def _results(graph: Graph, plan: Plan, members: Sequence[str]) -> Iterator[str]:
    """What the rest of the network may read of a group: values with an entry, and integers (indices of a pool, top-k)."""
    for output in (o for m in members for o in graph.op(m).outputs):
        if output in plan.values or (output in graph.values and not graph.value(output).info.is_float):
            yield output


def _float_pass(evaluator: Evaluator, inputs: Mapping[str, Tensor]) -> Environment:
    evaluator.count(inputs, 1.0)
    return evaluator.replay.run(inputs, keep=None)


def _losses(
    evaluator: Evaluator,
    candidate: _Candidate,
    inputs: Mapping[str, Tensor],
    cached: Environment,
    reference: Mapping[str, Tensor],
) -> Tensor:
    """1 - similarity: `[variants, n]`."""
    replay, share = evaluator.replay, evaluator.replay.share(candidate.members)
    variants = [_group_results(evaluator, candidate, reads, cached) for reads in candidate.reads]
    for _ in variants:
        evaluator.count(inputs, share)
    if evaluator.graph.info.dynamic_batch and len(variants) > 1 and _stackable(evaluator, candidate):
        stacked = {o: torch.cat([v[o] for v in variants], _axis(evaluator, o)) for o in candidate.results}
        runs = [replay.rerun(cached, stacked, {}, repeat=len(variants))]
    else:
        runs = [replay.rerun(cached, v, {}) for v in variants]
    samples = evaluator.samples(inputs) * len(variants) // len(runs)
    return 1 - torch.cat([evaluator.similarity(reference, evaluator.scored(env, samples)) for env in runs])


def _group_results(
    evaluator: Evaluator, candidate: _Candidate, reads: Reads, cached: Environment
) -> dict[str, Tensor]:
    """What readers see of the group's outputs when the group alone is quantized."""
    env = evaluator.replay.rerun(cached, {}, reads, dirty=candidate.members, stop_at=candidate.results)
    return {o: as_read(evaluator.graph, o, env[o], reads) for o in candidate.results}


def _axis(evaluator: Evaluator, name: str) -> int:
    axis = evaluator.graph.value(name).info.batch_axis
    assert axis is not None
    return axis


def _stackable(evaluator: Evaluator, candidate: _Candidate) -> bool:
    """Whether all methods can share a batch from the group's results on: nothing mixes samples or changes their order."""
    if any(evaluator.graph.value(o).info.batch_axis is None for o in candidate.results):
        return False
    below = [s for s in evaluator.replay.steps if s.op.name in candidate.below]
    made = {o for step in below for o in step.outputs}
    met = {n for step in below for n in step.names if n is not None} - made
    joined = met.union(candidate.results, evaluator.outputs)
    return not (made & evaluator.stacking.mixing or joined & evaluator.stacking.interleaved)


def _row(
    plan: Plan, candidate: _Candidate, state: SearchState, chunks: int, methods: Sequence[str]
) -> Sensitivity:
    parts = [torch.tensor(state.get(f"{i}:{candidate.group}"), dtype=torch.float64) for i in range(chunks)]
    losses = torch.cat(parts, dim=1)  # [variants, samples]
    mean, n = losses.mean(1), losses.shape[1]
    error = losses.std(1) / n**0.5 if n > 1 else torch.zeros_like(mean)
    by_method = {m: float(mean[candidate.of[m]]) for m in methods if m in candidate.of}
    errors = {m: float(error[candidate.of[m]]) for m in by_method}
    best = min(by_method, key=by_method.__getitem__)
    kind = plan.ops[candidate.group].kind
    return Sensitivity(candidate.group, kind, candidate.members, by_method, errors, best)


def best_methods(graph: Graph, plan: Plan, rows: Sequence[Sensitivity]) -> dict[str, str]:
    """Activation -> the method its producer's group chose; a graph input takes that of the first group that reads it."""
    chosen = {member: row.method for row in rows for member in row.members}
    found = {}
    for name, entry in plan.values.items():
        if entry.role != "activation":
            continue
        value = graph.value(name)
        ops = [value.producer] if value.producer is not None else [r.op for r in value.readers]
        method = next((chosen[op] for op in ops if op in chosen), None)
        if method is not None:
            found[name] = method
    return found

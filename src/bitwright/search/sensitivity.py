"""The exact sensitivity search: every operator group alone at int8, by every threshold method, the rest float.

The loss of a candidate is 1 - similarity of the network's outputs, averaged over samples. For each chunk of samples the
float activations are computed once; a candidate then executes its own group under quantized reads, and what lies
downstream of it, with all methods of the group stacked along the batch. Methods that lead to equal parameters are run once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import UnknownName
from bitwright.graph.graph import Graph
from bitwright.graph.replay import Environment, Reads, Stacking
from bitwright.plan.plan import Plan
from bitwright.plan.reads import reads_of_group
from bitwright.search.evaluator import Evaluator, as_read
from bitwright.search.jobs import Runner, run_jobs
from bitwright.search.similarity import Similarity
from bitwright.search.state import SearchState

#: The three methods of the procedure that this search implements, in its order; the first wins ties.
METHODS = ("max", "percentile", "kl")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sensitivity:
    """One group's result. *losses*: method -> mean loss, the best that is known of it; *errors*: its standard error, over
    samples where it was measured, over probes where it was sketched. *sketched*: method -> loss by the error sketch, empty
    without one. *exact*: whether *losses* were measured.
    """

    name: str
    kind: str
    members: tuple[str, ...]
    losses: Mapping[str, float]
    errors: Mapping[str, float]
    method: str
    sketched: Mapping[str, float] = field(default_factory=dict)
    exact: bool = False

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
    groups: Collection[str] | None = None,
    runner: Runner | None = None,
    state: SearchState | None = None,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """The sensitivities of the quantized groups of *plan*, in descending order of loss.

    *solve*: gives a plan its parameters. *groups*: measure only these. *runner*: where to measure, None: here. *state*:
    measurements to resume from and add to, wherever they were made. *raises* `UnknownName` for a group that is not there;
    with a runner `DataError` for a post-processing function that cannot be sent to other processes.
    """
    state = state or SearchState(None, "")
    candidates = _candidates(evaluator, plan, solve, methods)
    if groups is not None:
        _check_known(plan, groups)
        candidates = [c for c in candidates if c.group in groups]
    chunks = evaluator.reference()
    if runner is None:
        _measure_here(evaluator, candidates, chunks, state, progress)
    else:
        _measure_there(evaluator, candidates, chunks, runner, state, progress)
    rows = [_row(plan, c, state, chunks, methods) for c in candidates]
    return sorted(rows, key=lambda r: -r.loss)


def _check_known(plan: Plan, groups: Collection[str]) -> None:
    unknown = [g for g in groups if g not in plan.groups]
    if unknown:
        raise UnknownName("sensitivity", kind="operator group", name=unknown[0], known=plan.groups)


def _measure_here(
    evaluator: Evaluator,
    candidates: Sequence[_Candidate],
    chunks: int,
    state: SearchState,
    progress: Progress | None,
) -> None:
    """Put the losses of every candidate on every chunk into *state*, chunk after chunk."""
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


def _measure_there(
    evaluator: Evaluator,
    candidates: Sequence[_Candidate],
    chunks: int,
    runner: Runner,
    state: SearchState,
    progress: Progress | None,
) -> None:
    """As `_measure_here`, by *runner*: a job is one candidate on one chunk, chunk after chunk."""
    jobs = {f"{i}:{c.group}": (i, c.group) for i in range(chunks) for c in candidates}
    missing = [job for name, job in jobs.items() if name not in state]
    needed = {i for i, _ in missing}
    inputs = {i: chunk for i, chunk in enumerate(evaluator.chunks()) if i in needed}
    by_group = {c.group: c for c in candidates}
    can_stack = evaluator.graph.info.dynamic_batch and any(len(c.reads) > 1 for c in candidates)
    task = _SensitivityTask(
        evaluator.graph.without_onnx_model(),
        evaluator.similarity,
        evaluator.stacking if can_stack and missing else None,
        by_group,
        # A copy: of a view on all samples, all samples would be sent.
        {i: {name: x.clone() for name, x in chunk.items()} for i, chunk in inputs.items()},
    )
    report = progress and (lambda done, total, name: progress(done, total, jobs[name][1]))
    run_jobs(task, jobs, runner, state=state, progress=report)
    for i, group in missing:
        for _ in by_group[group].reads:
            evaluator.count(inputs[i], evaluator.replay.share(by_group[group].members))
    for chunk in inputs.values():  # at least; every worker makes the float passes that it needs
        evaluator.count(chunk, 1.0)


@dataclass(frozen=True)
class _SensitivityTask:
    """Jobs are (chunk, group), results losses as lists: `[variants, n]`. *chunks*: number -> inputs."""

    graph: Graph
    similarity: Similarity
    stacking: Stacking | None
    candidates: Mapping[str, _Candidate]
    chunks: Mapping[int, Mapping[str, Tensor]]

    def open(self) -> Callable[[tuple[int, str]], Any]:
        evaluator = Evaluator(self.graph, lambda _: self.chunks.values(), self.similarity)
        if self.stacking is not None:
            evaluator.stacking = self.stacking
        held: dict[int, Environment] = {}

        def measure(job: tuple[int, str]) -> Any:
            index, group = job
            inputs = self.chunks[index]
            if index not in held:
                held.clear()  # first: two chunks' activations may not fit
                held[index] = _float_pass(evaluator, inputs)
            reference = evaluator.scored(held[index], evaluator.samples(inputs))
            return _losses(evaluator, self.candidates[group], inputs, held[index], reference).tolist()

        return measure


def candidate_reads(
    graph: Graph, plan: Plan, solve: Callable[[Plan], Plan], methods: Sequence[str]
) -> dict[str, dict[str, Reads]]:
    """Group -> method -> the reads of that group alone at its precision, all thresholds by that method; none where it is float."""
    activations = [n for n, e in plan.values.items() if e.role == "activation"]
    solved = {m: solve(plan.with_methods(dict.fromkeys(activations, m))) for m in methods}
    found: dict[str, dict[str, Reads]] = {}
    for group, members in plan.groups.items():
        for method, full in solved.items():
            if full.precision(group) != "float":
                found.setdefault(group, {})[method] = reads_of_group(graph, full, members)
    return found


def _candidates(
    evaluator: Evaluator, plan: Plan, solve: Callable[[Plan], Plan], methods: Sequence[str]
) -> list[_Candidate]:
    found = []
    for group, by_method in candidate_reads(evaluator.graph, plan, solve, methods).items():
        distinct: list[Reads] = []
        for reads in by_method.values():
            if reads not in distinct:
                distinct.append(reads)
        of = {m: distinct.index(reads) for m, reads in by_method.items()}
        members = plan.groups[group]
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
    """`[variants, n]`."""
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
    return torch.cat([evaluator.similarity.losses(reference, evaluator.scored(env, samples)) for env in runs])


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
    return Sensitivity(candidate.group, kind, candidate.members, by_method, errors, best, exact=True)


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

"""The main job: float -> int8 -> search -> mixed model -> export -> proof."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from bitwright.exporters.onnx_qdq import export_qdq
from bitwright.flow.accuracy import measure_accuracy
from bitwright.flow.bench import Bench, batches_of, open_bench, take
from bitwright.flow.outputs import check_writable, write_search, write_tune
from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.result import Stage, Tuned
from bitwright.flow.settings import Settings
from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.runtime.proof import Proof
from bitwright.runtime.verify import verify
from bitwright.search.choose import Choice, float_until
from bitwright.search.sensitivity import Sensitivity, best_methods, measure_sensitivity
from bitwright.search.state import SearchState, search_key

#: Samples of the proof: every operator is compared on each of them.
PROOF_SAMPLES = 16


class _Clock:
    """Seconds of each stage, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
        self.seconds["total"] = now - self._start


def tune(
    model: str | Path | nn.Module | Graph,
    data: object,
    *,
    output: str | Path,
    settings: Settings | None = None,
    watcher: Watcher | None = None,
    example_inputs: Any = None,
) -> Tuned:
    """Quantize *model*, find its sensitive operators, repair it, export it, prove it; write everything to *output*.

    *data*: samples to compare and measure on, and to calibrate on unless the settings name other `calibration_data`.

    A target that is missed is no error: the result says so (`reached`) and holds the best plan found. *raises* the
    errors of every stage; `ProofError` if ONNX Runtime computes something else than the simulation.
    """
    settings, watcher = settings or Settings(), watcher or Silence()
    folder = check_writable(Path(output))
    clock = _Clock()
    bench = open_bench(model, data, settings, watcher, example_inputs=example_inputs)
    clock.lap("prepare")
    watcher.stage("comparing int8 with float")
    int8 = Stage(bench.plan, bench.evaluator.evaluate(bench.plan))
    clock.lap("int8")
    if int8.cosine >= settings.expected_cos:
        search = _Search((), int8, False, Choice(bench.plan, int8.cosine, ()))
    else:
        search = _search(bench, int8, settings, folder, watcher, clock)
    stages = {
        "float": Stage(None, 1.0),
        "int8": int8,
        "tuned": search.tuned,
        "mixed": Stage(search.choice.plan, search.choice.similarity),
    }
    if bench.dataset.labels is not None:
        stages = _with_accuracy(bench, stages, watcher)
        clock.lap("accuracy")
    exported, proof = _proved(bench, search.choice.plan, settings, watcher, clock)
    result = Tuned(
        bench,
        stages,
        search.rows,
        search.choice,
        search.kept,
        proof,
        search.choice.similarity >= settings.expected_cos,
        clock.seconds,
        settings.expected_cos,
    )
    write_tune(folder, result, exported)
    if search.rows:
        state_path(settings, folder, "sensitivity").unlink(missing_ok=True)
    return result


@dataclass(frozen=True)
class _Search:
    """The ranking, the stage with new thresholds (*kept*, or int8 as it was), and the mixed plan."""

    rows: tuple[Sensitivity, ...]
    tuned: Stage
    kept: bool
    choice: Choice


def _search(
    bench: Bench, int8: Stage, settings: Settings, folder: Path, watcher: Watcher, clock: _Clock
) -> _Search:
    rows = sensitivities(bench, settings, folder, watcher)
    clock.lap("sensitivity")
    tuned, kept = tuned_thresholds(bench, rows, int8)
    assert tuned.plan is not None
    watcher.stage("choosing float operators")
    choice = float_until(
        bench.evaluator,
        tuned.plan,
        rows,
        bench.solver.solve,
        target=settings.expected_cos,
        limit=float_limit(settings.max_float_ops, len(bench.plan.groups) // 10),
        progress=lambda group, cos: watcher.advance(1, f"{group}: {cos:.6f}"),
    )
    clock.lap("choice")
    write_search(folder, bench, rows, choice, int8.cosine)
    return _Search(tuple(rows), tuned, kept, choice)


def _proved(
    bench: Bench, plan: Plan, settings: Settings, watcher: Watcher, clock: _Clock
) -> tuple[onnx.ModelProto, Proof]:
    exported = export_qdq(bench.graph, plan)
    clock.lap("export")
    samples = take(bench.graph, bench.dataset, PROOF_SAMPLES, settings.seed)
    watcher.stage("proving on ONNX Runtime", len(samples))
    proof = verify(bench.graph, plan, exported, batches_of(bench, samples, 4), progress=watcher.advance)
    clock.lap("proof")
    return exported, proof


def open_state(
    bench: Bench, settings: Settings, folder: Path, watcher: Watcher, *, search: str
) -> SearchState:
    """The search state in *folder* (or where the settings say): new, or of the interrupted run that it belongs to."""
    path = state_path(settings, folder, search)
    asked = {
        "search": search,
        "target": bench.target.model_dump(mode="json"),
        "method": settings.method,
        "methods": settings.methods,
        "input_num": settings.input_num,
        "seed": settings.seed,
        "calibration": bench.calibration_digest,
        "half": settings.cosine_scale,
        "weights": dict(settings.output_weights),
        "post_process": settings.post_process_source,
    }
    state = SearchState(path, search_key(bench.graph, bench.evaluator.chunks(), asked))
    if state.resumed:
        watcher.note(f"resuming: {state.resumed} measurements were already made ({path})")
    return state


def state_path(settings: Settings, folder: Path, search: str) -> Path:
    """Where a search keeps what it measured until the job is done."""
    return settings.save_state or folder / f"{search}_state.json"


def sensitivities(bench: Bench, settings: Settings, folder: Path, watcher: Watcher) -> list[Sensitivity]:
    """The ranking of all groups, resuming from an interrupted run if there was one. The state is kept: see `state_path`."""
    state = open_state(bench, settings, folder, watcher, search="sensitivity")
    watcher.stage("measuring sensitivity", len(bench.plan.groups) * bench.evaluator.reference())
    done = [0]

    def advance(now: int, total: int, group: str) -> None:
        watcher.advance(now - done[0], group)
        done[0] = now

    return measure_sensitivity(
        bench.evaluator,
        bench.plan,
        bench.solver.solve,
        methods=settings.methods,
        state=state,
        progress=advance,
    )


def tuned_thresholds(bench: Bench, rows: list[Sensitivity], int8: Stage) -> tuple[Stage, bool]:
    """All-int8 with every value's best single method; kept only if the network did not get worse by it."""
    plan = bench.solver.solve(bench.plan.with_methods(best_methods(bench.graph, bench.plan, rows)))
    cosine = bench.evaluator.evaluate(plan)
    return (Stage(plan, cosine), True) if cosine >= int8.cosine else (int8, False)


def float_limit(asked: int | None, usual: int) -> int:
    """How many groups may become float: as asked, else *usual*, at least one."""
    return max(1, usual) if asked is None else asked


def _with_accuracy(bench: Bench, stages: dict[str, Stage], watcher: Watcher) -> dict[str, Stage]:
    distinct: dict[int, Plan | None] = {id(s.plan): s.plan for s in stages.values()}
    measured = measure_accuracy(bench, {str(k): p for k, p in distinct.items()}, watcher)
    return {name: replace(s, accuracy=measured[str(id(s.plan))]) for name, s in stages.items()}

"""The sensitivity of operators as a part of jobs: sketched, verified, or measured exactly."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from bitwright.errors import DataError
from bitwright.flow.bench import Bench
from bitwright.flow.model_source import source_text
from bitwright.flow.progress import Watcher, counting
from bitwright.flow.settings import Settings
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.jobs import Processes, Runner
from bitwright.search.ray_runner import RayRunner
from bitwright.search.sensitivity import Sensitivity, candidate_reads, measure_sensitivity
from bitwright.search.sketch_file import FORMAT, SketchFile
from bitwright.search.sketched import sketch_sensitivity, verify_top
from bitwright.search.state import SearchState, search_key

#: The search whose measurements are a user's metric of whole plans.
METRIC_SEARCH = "metric"
#: The one whose measurements are scores of plans with some tables in fixed point.
TABLE_SEARCH = "luts"


@dataclass(frozen=True)
class Ranking:
    """*rows*: in descending order of loss. *sketch*: what they came from, None where all was measured. *unreachable*: group -> why
    no gradient told its loss (it was measured instead)."""

    rows: tuple[Sensitivity, ...]
    sketch: ErrorSketch | None
    unreachable: Mapping[str, str]

    @property
    def apart(self) -> dict[str, float]:
        """Losses that the sketch does not know, by group."""
        return {r.name: r.loss for r in self.rows if r.name in self.unreachable}


def rank(bench: Bench, settings: Settings, state: SearchState, folder: Path, watcher: Watcher) -> Ranking:
    """The ranking of the operators that the settings name, by the method that they ask for.

    What the sketch cannot tell is measured exactly, and the watcher is told why. Interrupted runs are resumed: see `sketch_path` and
    *state*. *raises* `DataError` if a name or pattern is no operator's.
    """
    groups = chosen_groups(bench, settings)

    def exact(names: Collection[str]) -> list[Sensitivity]:
        return _exact(bench, settings, watcher, state, names)

    sketch = None if settings.search_method == "exact" else open_sketch(bench, settings, folder, watcher)
    if sketch is None:
        return Ranking(tuple(exact(groups)), None, {})
    rows, unreachable = _sketched(bench, sketch, settings, watcher, groups)
    if len(unreachable) == len(rows):
        why = next(iter(unreachable.values()), "no operator to rank")
        watcher.note(f"no operator can be sketched ({why}); everything is measured exactly")
        return Ranking(tuple(exact(groups)), None, {})
    note_unsketched(watcher, unreachable)
    verified = settings.verify if settings.search_method == "sketch+verify" else 0
    if verified or unreachable:
        rows = verify_top(rows, exact, count=verified, early=groups, always=list(unreachable))
    return Ranking(tuple(rows), sketch, unreachable)


def note_unsketched(watcher: Watcher, found: Mapping[str, str]) -> None:
    """Say what no sketch tells, by name, and why."""
    for name, why in found.items():
        watcher.note(f"not sketchable, measured exactly: {name} ({why})")


def chosen_groups(bench: Bench, settings: Settings) -> list[str]:
    """The groups with a member that one of the settings' patterns matches; all, without patterns. *raises* `DataError` for patterns
    that match nothing."""
    groups = bench.plan.groups
    if not settings.operators:
        return list(groups)
    matched = {
        p: {g for g, members in groups.items() if any(fnmatchcase(m, p) for m in [g, *members])}
        for p in settings.operators
    }
    idle = [p for p, of in matched.items() if not of]
    if idle:
        raise DataError(
            "--operators",
            expected="names or patterns of quantizable operators",
            found=f"{', '.join(idle)}, which match none of {len(groups)}",
            remedy=f"Names look like {next(iter(groups), 'conv1')!r}; * and ? are wildcards.",
        )
    return [g for g in groups if any(g in of for of in matched.values())]


def obstacle_to_sketch(bench: Bench, settings: Settings) -> str | None:
    """Why no sketch of the network can be made, None if one can."""
    if settings.post_process is not None:
        return "--post-process has no gradient to sketch with"
    if bench.evaluator.stacking.mixing:
        return "samples of a batch influence each other, which a sketch of single samples cannot tell"
    return None


def open_sketch(bench: Bench, settings: Settings, folder: Path, watcher: Watcher) -> ErrorSketch | None:
    """A sketch around the float network, with what *folder* holds of it; None, said to the watcher, where no gradient can tell."""
    obstacle = obstacle_to_sketch(bench, settings)
    if obstacle is not None:
        watcher.note(f"{obstacle}; everything is measured exactly")
        return None
    similarity = bench.evaluator.similarity
    depends = {
        "format": FORMAT,
        "probes": settings.probes,
        "seed": settings.seed,
        "loss": _loss_key(settings),
        "weights": dict(similarity.weights),
        "half": similarity.half,
    }
    file = SketchFile(sketch_path(folder), search_key(bench.graph, bench.evaluator.chunks(), depends))
    sketch = ErrorSketch(bench.evaluator, probes=settings.probes, seed=settings.seed, file=file)
    if sketch.c:
        watcher.note(f"{len(sketch.c)} units of error were sketched before ({file.path})")
    if all(b.probes < settings.probes for b in sketch.blocks):
        most = max(b.probes for b in sketch.blocks)
        watcher.note(
            f"{most} probe(s) span an output of {most} element(s): more than those of --probes have no use"
        )
    return sketch


def sketch_path(folder: Path) -> Path:
    """Where a folder keeps its sketch; later searches on the same network and data begin with it."""
    return folder / "sketch.npz"


def _sketched(
    bench: Bench, sketch: ErrorSketch, settings: Settings, watcher: Watcher, groups: Collection[str]
) -> tuple[list[Sensitivity], dict[str, str]]:
    candidates = candidate_reads(bench.graph, bench.plan, bench.solver.solve, settings.methods)
    watcher.stage("sketching errors", bench.inference_samples)
    return sketch_sensitivity(
        sketch,
        bench.plan,
        {g: c for g, c in candidates.items() if g in groups},
        progress=lambda _, count: watcher.advance(count),
    )


def _exact(
    bench: Bench, settings: Settings, watcher: Watcher, state: SearchState, groups: Collection[str]
) -> list[Sensitivity]:
    watcher.stage("measuring sensitivity", len(groups) * bench.evaluator.reference())
    return measure_sensitivity(
        bench.evaluator,
        bench.plan,
        bench.solver.solve,
        methods=settings.methods,
        groups=groups,
        runner=open_runner(settings),
        state=state,
        progress=counting(watcher),
    )


def open_runner(settings: Settings) -> Runner | None:
    """Where exact measurements run: None means in this process."""
    if settings.ray is not None:
        return RayRunner(settings.ray)
    return Processes(settings.workers) if settings.workers > 1 else None


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
        "loss": _loss_key(settings),
        "half": settings.cosine_scale,
        "weights": dict(settings.output_weights),
        "post_process": settings.post_process_source,
    }
    if search in (METRIC_SEARCH, TABLE_SEARCH) and settings.evaluate is not None:
        asked["evaluate"] = source_text(settings.evaluate)
    state = SearchState(path, search_key(bench.graph, bench.evaluator.chunks(), asked))
    if state.resumed:
        watcher.note(f"resuming: {state.resumed} measurements were already made ({path})")
    return state


def _loss_key(settings: Settings) -> str:
    """The loss, in words that are the same in every process."""
    if isinstance(settings.loss, str):
        return settings.loss
    function = settings.loss
    name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    return f"{name}\n{settings.loss_source}"


def state_path(settings: Settings, folder: Path, search: str) -> Path:
    """Where a search keeps what it measured until the job is done; a metric's measurements have a file of their own."""
    if settings.save_state is None:
        return folder / f"{search}_state.json"
    path = settings.save_state
    return path.with_name(f"{path.stem}_{search}{path.suffix}") if search == METRIC_SEARCH else path

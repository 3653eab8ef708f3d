"""What `tune` and `quantize` found."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from bitwright.flow.accuracy import Accuracy, accuracy_of, measure_accuracy
from bitwright.flow.bench import Bench
from bitwright.flow.exports import INTEGER, Exports
from bitwright.flow.progress import Watcher
from bitwright.plan.cost import Costs
from bitwright.plan.plan import Plan
from bitwright.runtime.session import Session
from bitwright.search.choose import Choice
from bitwright.search.sensitivity import Sensitivity


@dataclass(frozen=True)
class Stage:
    """One line of the final table: a plan (None: float), its similarity, and its accuracy if labels are known.

    *islands*: of an integer file, the operators that are float in it.
    """

    plan: Plan | None
    cosine: float
    accuracy: Accuracy | None = None
    islands: Collection[str] = ()

    @property
    def float_ops(self) -> int | None:
        """How many operators (groups) are float; None: all."""
        if self.plan is None:
            return None
        return len({*self.plan.float_groups, *(self.plan.ops[name].group for name in self.islands)})

    def to_json(self) -> dict[str, float]:
        """`cosine`, and `top1`, `top5` if known."""
        found = {"cosine": self.cosine}
        if self.accuracy is not None:
            found |= {"top1": self.accuracy.top1, "top5": self.accuracy.top5}
        return found


@dataclass(frozen=True)
class Chosen:
    """*tuned*: all at the base precision with new thresholds, or (not *kept*) int8 as it was. *parted*: by which factors
    truth and prediction differed where the network was linearised anew. *costs*: of the joint search, None without one.
    """

    tuned: Stage
    kept: bool
    choice: Choice
    reached: bool
    parted: tuple[float, ...] = ()
    costs: Costs | None = None


@dataclass(frozen=True)
class Tuned:
    """What `tune` found."""

    bench: Bench
    stages: dict[str, Stage]
    rows: tuple[Sensitivity, ...]
    chosen: Chosen
    exports: Exports
    seconds: dict[str, float]
    expected_cos: float

    @property
    def choice(self) -> Choice:
        """The mixed plan, and what else was tried."""
        return self.chosen.choice

    @property
    def reached(self) -> bool:
        """Whether the mixed model meets the target similarity."""
        return self.chosen.reached

    @property
    def plan(self) -> Plan:
        """The plan of the mixed model, as its files hold it."""
        return self.exports.plan


def with_accuracy(bench: Bench, stages: Mapping[str, Stage], watcher: Watcher) -> dict[str, Stage]:
    """*stages* with their accuracy on all labelled samples; as they are if no labels are known."""
    if bench.dataset.labels is None:
        return dict(stages)
    distinct: dict[int, Plan | None] = {id(s.plan): s.plan for s in stages.values()}
    measured = measure_accuracy(bench, {str(k): p for k, p in distinct.items()}, watcher)
    return {name: replace(s, accuracy=measured[str(id(s.plan))]) for name, s in stages.items()}


def integer_stage(bench: Bench, exports: Exports, watcher: Watcher) -> dict[str, Stage]:
    """The line `integer`: the file itself, run by ONNX Runtime on the samples that the other lines were measured on.

    Nothing where there is no such file.
    """
    if exports.integer is None:
        return {}
    labels, failed = bench.dataset.labels, exports.proofs[INTEGER].default.failure
    # A file that ONNX Runtime cannot optimise is run node by node.
    run = Session(exports.integer.model, optimisation="disabled" if failed else "default").tensors
    watcher.stage("running the integer file", None if labels is None else len(bench.dataset))
    cosine = bench.evaluator.evaluate_run(run)
    accuracy = None if labels is None else accuracy_of(bench, {"integer": run}, watcher)["integer"]
    return {"integer": Stage(exports.plan, cosine, accuracy, tuple(exports.integer.islands))}

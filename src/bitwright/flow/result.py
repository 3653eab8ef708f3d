"""What `tune` found."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.flow.accuracy import Accuracy
from bitwright.flow.bench import Bench
from bitwright.plan.plan import Plan
from bitwright.runtime.proof import Proof
from bitwright.search.choose import Choice
from bitwright.search.sensitivity import Sensitivity


@dataclass(frozen=True)
class Stage:
    """One line of the final table: a plan (None: float), its similarity, and its accuracy if labels are known."""

    plan: Plan | None
    cosine: float
    accuracy: Accuracy | None = None

    def to_json(self) -> dict[str, float]:
        """`cosine`, and `top1`, `top5` if known."""
        found = {"cosine": self.cosine}
        if self.accuracy is not None:
            found |= {"top1": self.accuracy.top1, "top5": self.accuracy.top5}
        return found


@dataclass(frozen=True)
class Tuned:
    """What `tune` found. *reached*: whether the mixed model meets the target similarity."""

    bench: Bench
    stages: dict[str, Stage]
    rows: tuple[Sensitivity, ...]
    choice: Choice
    kept_thresholds: bool
    proof: Proof
    reached: bool
    seconds: dict[str, float]
    expected_cos: float

    @property
    def plan(self) -> Plan:
        """The plan of the mixed model."""
        return self.choice.plan

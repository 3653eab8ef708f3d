"""`Proof`: how far ONNX Runtime and the simulation differ, and the rule that decides (docs/numerics.md §7)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitwright.errors import ProofError
from bitwright.numerics.dtype import DType
from bitwright.table import Column, Table

#: 8-bit codes: at most one step, on at most this share of an operator's elements.
MAX_STEPS, MAX_FRACTION = 1, 0.001
#: 16-bit codes of a Q/DQ file: float32 accumulation itself is worth a fraction of a step, so that only the distance is bounded.
MAX_STEPS_16 = 2
#: A result this near the middle between two codes (in steps) may be rounded either way: float32 sums in another order
#: differ by as much. On targets that rescale by a shift alone, results lie on such middles exactly, and often.
TIE = 2.0**-12
#: Engines approximate bounded functions (sigmoid, softmax, …) to this share of their range, whatever the result's size.
BOUNDED_ACCURACY = 2.0**-22
#: Cosines of float32 outputs are not known better than this.
COSINE_SLACK = 1e-7


@dataclass(frozen=True)
class OpDifference:
    """One operator (group) of the plan, fed with the same input codes on both sides.

    *steps*: the largest difference of two output codes. *differing*: how many of *elements* output codes differ; *ties* of
    these by one step, where the simulation's unrounded result was as near to the middle between the two codes as `tie_width` says.
    *slack*: whole steps by which a bounded function may be off, because the value's steps are finer than its accuracy.
    *integers*: the engine made the codes by integer operators, which sum exactly; *table*: by looking them up, as the simulation did.
    """

    name: str
    kind: str
    dtype: DType
    steps: int
    differing: int
    elements: int
    ties: int = 0
    slack: int = 0
    integers: bool = False
    table: bool = False

    @property
    def fraction(self) -> float:
        """The share of elements that differ, ties apart, 0 … 1: what the rule is about."""
        return (self.differing - self.ties) / self.elements if self.elements else 0.0

    @property
    def tie_fraction(self) -> float:
        """The share of elements that differ and are ties, 0 … 1."""
        return self.ties / self.elements if self.elements else 0.0

    @property
    def max_steps(self) -> int:
        """The largest difference that the rule allows: none in a table, one step where only the simulation sums in float32."""
        if self.integers:
            return 0 if self.table else MAX_STEPS
        return self.slack + (MAX_STEPS if self.dtype.bits <= 8 else MAX_STEPS_16)

    @property
    def allowed(self) -> int:
        """How many elements besides ties may differ. One always may: a share of 0.1 % shows from a thousand on."""
        return max(1, int(MAX_FRACTION * self.elements)) if self.dtype.bits <= 8 else self.elements

    @property
    def holds(self) -> bool:
        """True if the rule is kept."""
        return self.steps <= self.max_steps and self.differing - self.ties <= self.allowed


def tie_width(scale: float, bounds: tuple[float, float] | None) -> float:
    """How far from the middle between two codes a result may be rounded either way, in steps of *scale*.

    *bounds*: the range that the operator's results cannot leave, real units, or None.
    """
    if bounds is None or not all(map(math.isfinite, bounds)):
        return TIE
    return TIE + BOUNDED_ACCURACY * (bounds[1] - bounds[0]) / scale


@dataclass(frozen=True)
class Agreement:
    """Whole networks, simulation against engine, over all samples.

    *cosine*: mean over samples and outputs. *float_cosine*: the same for the float network against the simulation.
    *top1_agreement*: share of samples whose largest output is at the same place. *max_steps*: largest difference of codes at
    the quantized outputs, None if every output is float. *failure*: why the engine could not run, else empty. *spread*: the smallest
    cosine of a sample, the 10th percentile, the median.
    """

    optimisation: str
    samples: int
    cosine: float
    float_cosine: float
    top1_agreement: float
    max_steps: int | None
    failure: str = ""
    spread: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `summary.json` holds of a whole network."""
        if self.failure:
            absent = dict.fromkeys(("cosine", "max_steps", "top1_agreement"))
            return {**absent, "optimisation": self.optimisation, "failure": self.failure}
        return {
            "cosine": self.cosine,
            "cosine_spread": dict(self.spread),
            "max_steps": self.max_steps,
            "top1_agreement": self.top1_agreement,
            "optimisation": self.optimisation,
        }


@dataclass(frozen=True)
class Proof:
    """Everything that was compared. *literal*: the nodes of the file one by one; *default*: as an engine would run it.

    *target_rounding*: the target's own rounding. *rounding*: that of the comparison, on both sides: half-even where QuantizeLinear makes
    codes, the target's in an integer model.
    """

    per_op: tuple[OpDifference, ...]
    literal: Agreement
    default: Agreement
    target_rounding: str = "half_even"
    rounding: str = "half_even"

    @property
    def worst(self) -> OpDifference | None:
        """The operator that comes nearest to breaking the rule, or breaks it most."""
        if not self.per_op:
            return None
        return max(
            self.per_op,
            key=lambda d: (not d.holds, d.steps / max(1, d.max_steps), (d.differing - d.ties) / d.allowed),
        )

    @property
    def holds(self) -> bool:
        """True if every operator keeps the rule, and the network does."""
        return all(d.holds for d in self.per_op) and self._network_holds

    @property
    def _network_holds(self) -> bool:
        return 1 - self.literal.cosine <= 1 - self.literal.float_cosine + COSINE_SLACK

    @property
    def first_apart(self) -> OpDifference | None:
        """The first operator, in execution order, of which a code differs."""
        return next((d for d in self.per_op if d.steps), None)

    def check(self) -> None:
        """*raises* `ProofError` naming the operator that breaks the rule, or the network if only that does."""
        broken = [d for d in self.per_op if not d.holds]
        if broken:
            first = broken[0]  # what comes after it may only read what the first got wrong
            others = f" (the first of {len(broken)} operators)" if len(broken) > 1 else ""
            raise ProofError(
                f"operator {first.name} ({first.kind}){others}",
                expected=f"{first.dtype.name} codes within {first.max_steps} step(s) of the simulation's, "
                f"{first.allowed} of {first.elements} elements differing at most",
                found=f"{first.steps} step(s), {first.differing} elements, {first.ties} of them ties",
                remedy="The exported model does not compute what was simulated; please report it with the model.",
            )
        whole = self.literal
        if not self._network_holds:
            raise ProofError(
                "the exported network",
                expected=f"a cosine to the simulation of at least {whole.float_cosine:.6f}, the float network's",
                found=f"{whole.cosine:.6f}",
                remedy="The exported model does not compute what was simulated; please report it with the model.",
            )

    def to_json(self) -> dict[str, Any]:
        """`runtime_check` of summary.json: the whole network, and the extremes over operators.

        `per_op_…` are those of 8-bit operators (16-bit ones have a rule of their own, and keys if there are any).
        """
        found = self.literal.to_json()
        optimisation = found.pop("optimisation")
        narrow = [d for d in self.per_op if d.dtype.bits <= 8]
        wide = [d for d in self.per_op if d.dtype.bits > 8]
        found |= {
            "per_op_max_steps": max((d.steps for d in narrow), default=0),
            "per_op_fraction": max((d.fraction for d in narrow), default=0.0),
            "per_op_ties": max((d.tie_fraction for d in narrow), default=0.0),
            "first_op_apart": None if self.first_apart is None else self.first_apart.name,
            "worst_op": None if self.worst is None else self.worst.name,
            "optimisation": optimisation,
            "samples": self.literal.samples,
            "operators": len(self.per_op),
            "rounding": self.rounding,
            "target_rounding": self.target_rounding,
        }
        if wide:
            found["per_op_max_steps_int16"] = max(d.steps for d in wide)
            found["per_op_fraction_int16"] = max(d.fraction for d in wide)
        return found

    def table(self, *, worst_first: bool = False) -> Table:
        """One row for each operator that was compared, in execution order; *worst_first*: those that break the rule lead."""
        compared = self.per_op
        if worst_first:
            compared = tuple(sorted(compared, key=lambda d: (d.holds, -d.steps, -d.fraction)))
        columns = (
            Column("name", "operator"),
            Column("kind", "kind"),
            Column("dtype", "codes"),
            Column("steps", "steps"),
            Column("fraction", "share", "", 6),
            Column("ties", "ties", "", 6),
            Column("elements", "elements"),
        )
        rows = tuple(
            {
                "name": d.name,
                "kind": d.kind,
                "dtype": d.dtype.name,
                "steps": d.steps,
                "fraction": d.fraction,
                "ties": d.tie_fraction,
                "elements": d.elements,
            }
            for d in compared
        )
        title = "Proof, same input codes: steps by which output codes differ, share that does, share in ties"
        return Table(title, columns, rows)

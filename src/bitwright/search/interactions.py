"""Which operators amplify or cancel each other: the off-diagonal terms of the sketch's quadratic form."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.sketch_file import Unit
from bitwright.search.thresholds import scaled


@dataclass(frozen=True)
class Interaction:
    """Two groups. *alone*: the loss of each by its own units; *effect*: what the loss of both exceeds the sum by, negative where
    they cancel; *error*: its standard error, from the probes; *correlation*: of their effects on the outputs, -1 to 1.
    """

    first: str
    second: str
    alone: tuple[float, float]
    effect: float
    error: float
    correlation: float

    @property
    def together(self) -> float:
        """The loss of both."""
        return sum(self.alone) + self.effect


@dataclass(frozen=True)
class Explanation:
    """How the loss of a plan comes about. *parts*: group (or graph input) -> the loss of its own units alone, descending; *total*:
    the predicted loss of all; *pairs*: interactions in descending order of size."""

    parts: dict[str, float]
    total: float
    pairs: tuple[Interaction, ...]

    @property
    def interaction(self) -> float:
        """What all interactions add to the sum of the parts."""
        return self.total - sum(self.parts.values())


def explain(sketch: ErrorSketch, plan: Plan, *, most: int = 40) -> Explanation:
    """Take the loss of *plan* (solved) apart. Each unit belongs to one group: a weight to its operator's, a value to its
    producer's, a graph input to itself. *sketch*: around the float network.
    """
    reads = quantized_reads(sketch.evaluator.graph, plan)
    sketch.measure(sketch.missing([reads]))
    sums: dict[str, npt.NDArray[np.float64]] = {}
    for unit in sketch.units_of(reads):
        if unit in sketch.c:
            owner = _owner(sketch, plan, unit)
            sums[owner] = sums.get(owner, 0.0) + sketch.c[unit].numpy()
    names = list(sums)
    c = np.stack([sums[n] for n in names]) if names else np.zeros((0, sketch.rows, sketch.images))
    vectors = scaled(sketch, c)
    gram = vectors @ vectors.T
    pairs = [_interaction(sketch, names, c, gram, i, j) for i, j in _largest(gram, most)]
    order = np.argsort(-np.diagonal(gram))
    parts = {names[i]: float(gram[i, i]) for i in order}
    return Explanation(parts, float(gram.sum()), tuple(pairs))


def _owner(sketch: ErrorSketch, plan: Plan, unit: Unit) -> str:
    value = sketch.evaluator.graph.value(unit.value)
    op = unit.reader if value.is_constant else value.producer
    return value.name if op is None else plan.ops[op].group


def _largest(gram: npt.NDArray[np.float64], most: int) -> list[tuple[int, int]]:
    pairs = combinations(range(len(gram)), 2)
    return sorted(pairs, key=lambda p: -abs(gram[p]))[:most]


def _interaction(
    sketch: ErrorSketch,
    names: list[str],
    c: npt.NDArray[np.float64],
    gram: npt.NDArray[np.float64],
    i: int,
    j: int,
) -> Interaction:
    products = 2 * c[i] * c[j] * sketch.row_weights.numpy()[:, None]  # [rows, images]
    variance = 0.0
    for block in sketch.blocks:
        rows = products[block.start : block.stop]
        spread = rows.var(0, ddof=1) if len(rows) > 1 else rows[0] ** 2
        left = 1 - block.probes / max(block.directions, block.probes)
        variance += float(spread.sum()) * block.probes / max(1, sketch.images) ** 2 * left
    norm = (gram[i, i] * gram[j, j]) ** 0.5
    return Interaction(
        names[i],
        names[j],
        (float(gram[i, i]), float(gram[j, j])),
        2 * float(gram[i, j]),
        variance**0.5,
        float(gram[i, j] / norm) if norm > 0 else 0.0,
    )

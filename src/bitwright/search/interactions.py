"""Which operators amplify or cancel each other: the off-diagonal terms of the sketch's quadratic form."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from bitwright.numerics.spec import QParams
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.error_sketch import ErrorSketch, effective_reads
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
    """Take the loss of *plan* (solved) apart. Each read belongs to one group: of a weight to its operator's, of a value to its
    producer's, of a graph input to itself. Interactions are those of weights and biases: the errors of roundings are independent.
    *sketch*: around the float network.
    """
    graph = sketch.evaluator.graph
    reads = effective_reads(graph, quantized_reads(graph, plan))
    sketch.measure(sketch.missing([reads]))
    owned: dict[str, dict[tuple[str, str], QParams]] = {}
    for edge, q in reads.items():
        owned.setdefault(_owner(sketch, plan, edge), {})[edge] = q
    names = list(owned)
    parts = {n: sketch.predict(r).loss for n, r in owned.items()}
    none = np.zeros((0, sketch.rows, sketch.images))
    c = np.stack([sketch.constants(r).numpy() for r in owned.values()]) if names else none
    vectors = scaled(sketch, c)
    gram = vectors @ vectors.T
    alone = list(parts.values())
    pairs = [_interaction(sketch, names, c, gram, alone, (i, j)) for i, j in _largest(gram, most)]
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1]))
    return Explanation(ordered, sketch.predict(reads).loss, tuple(pairs))


def _owner(sketch: ErrorSketch, plan: Plan, edge: tuple[str, str]) -> str:
    value = sketch.evaluator.graph.value(edge[0])
    op = edge[1] if value.is_constant else value.producer
    return value.name if op is None else plan.ops[op].group


def _largest(gram: npt.NDArray[np.float64], most: int) -> list[tuple[int, int]]:
    pairs = combinations(range(len(gram)), 2)
    return sorted(pairs, key=lambda p: -abs(gram[p]))[:most]


def _interaction(
    sketch: ErrorSketch,
    names: list[str],
    c: npt.NDArray[np.float64],
    gram: npt.NDArray[np.float64],
    alone: list[float],
    pair: tuple[int, int],
) -> Interaction:
    i, j = pair
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
        (alone[i], alone[j]),
        2 * float(gram[i, j]),
        variance**0.5,
        float(gram[i, j] / norm) if norm > 0 else 0.0,
    )

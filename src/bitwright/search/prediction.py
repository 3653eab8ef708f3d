"""From probes to a loss: which rows of a sketch belong to which output, and what their squares predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.graph.graph import Graph
from bitwright.search.evaluator import Evaluator, samples_first


@dataclass(frozen=True)
class Prediction:
    """*loss*: predicted mean loss over the images; *error*: its standard error, from the probes alone."""

    loss: float
    error: float


@dataclass(frozen=True)
class Block:
    """The probes of one output: rows *start* to *stop* of every `c`; *directions*: that an error of it can have."""

    output: str
    weight: float
    start: int
    stop: int
    directions: int

    @property
    def probes(self) -> int:
        """How many probes."""
        return self.stop - self.start


def blocks_of(evaluator: Evaluator, probes: int) -> tuple[Block, ...]:
    """*probes* for each output that is scored, fewer where it has fewer elements."""
    weights = evaluator.similarity.normalised(evaluator.outputs)
    blocks, start = [], 0
    first = next(iter(evaluator.pairs()))[1]
    for output, weight in weights.items():
        if evaluator.replay.is_constant(output):  # nothing changes it
            continue
        directions = max(1, first[output][0].numel())
        count = min(probes, directions)
        blocks.append(Block(output, weight, start, start + count, directions))
        start += count
    return tuple(blocks)


def prediction_of(blocks: Sequence[Block], squares: Tensor, *, beside: float = 0.0) -> Prediction:
    """The loss of *squares* `[rows, images]`: half the weighted mean, and what is lost *beside*."""
    loss = variance = 0.0
    for block in blocks:
        term = 0.5 * squares[block.start : block.stop]
        loss += block.weight * float(term.mean(0).mean())
        variance += block.weight**2 * _probe_variance(term, block.directions)
    return Prediction(max(0.0, loss + beside), variance**0.5)


def _probe_variance(terms: Tensor, directions: int) -> float:
    """Variance of the mean over probes and images of *terms* `[probes, images]`, by the draw of probes alone.

    With one probe it is that of a normal error: var(c^2) = 2/3 E[c^4]. Probes are orthogonal, which leaves the share of
    directions that were not drawn (sampling without replacement).
    """
    count, images = terms.shape
    if count > 1:
        spread = terms.var(0)
    else:
        spread = terms[0] ** 2 * 2 / 3
    return float(spread.sum()) / count / images**2 * (1 - count / max(directions, count))


def laid_out_as(graph: Graph, name: str, y: Tensor, v: Tensor, n: int) -> Tensor:
    """*v*, which lies as the scored output does, laid out as *y*, the output itself."""
    with torch.enable_grad():
        leaf = torch.zeros_like(y, requires_grad=True)
        (found,) = torch.autograd.grad(samples_first(graph, name, leaf, n), leaf, v.to(y.dtype))
    return found

"""How far two tensors are apart: the five metrics of `QuantAnalysis` (docs/analysis.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.registry import Registry

#: Two tensors of one shape, the baseline's first -> a number.
Measure = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Metric:
    """*measure*, under a *name*. *larger_is_worse*: whether a large number means far apart."""

    name: str
    measure: Measure
    larger_is_worse: bool = True

    def badness(self, value: float) -> float:
        """*value*, so that more is worse, whichever way the metric counts; NaN is the worst."""
        if math.isnan(value):
            return math.inf
        return value if self.larger_is_worse else -value


def l1(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference, real units."""
    return float((a.double() - b.double()).abs().mean())


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared difference, real units squared."""
    return float((a.double() - b.double()).square().mean())


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the tensors as two long vectors; 0 as soon as one of them is all zeros, also if both are."""
    x, y = a.double().flatten(), b.double().flatten()
    norms = float(x.norm() * y.norm())
    return 0.0 if norms == 0.0 else float(x @ y) / norms


def sqnr(a: Tensor, b: Tensor) -> float:
    """Signal *a* to noise *a - b*, dB; infinite for identical tensors."""
    signal = float(a.double().square().sum())
    noise = float((a.double() - b.double()).square().sum())
    if noise == 0.0:
        return math.inf
    return -math.inf if signal == 0.0 else 10.0 * math.log10(signal / noise)


def kl(a: Tensor, b: Tensor) -> float:
    """Kullback-Leibler divergence of softmax(*b*) from softmax(*a*), both over the last axis, mean over the rest; nats."""
    p, q = (torch.log_softmax(x.double().reshape(-1, x.shape[-1] if x.dim() else 1), 1) for x in (a, b))
    return float((p.exp() * (p - q)).sum(1).mean())


METRICS: Registry[Metric] = Registry("metric")

for _metric in (
    Metric("Cosine", cosine, larger_is_worse=False),
    Metric("MSE", mse),
    Metric("L1", l1),
    Metric("KL", kl),
    Metric("SQNR", sqnr, larger_is_worse=False),
):
    METRICS.add(_metric.name, _metric)

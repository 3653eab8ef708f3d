"""Clipping thresholds: how far from zero a value is worth representing (docs/numerics.md §4).

Each method is written once, on what it needs of the data (bin counts, tail sums, moments). The functions
named `…_of_samples` feed it with raw samples and are the definition; `calibrate.observers` feeds the same with streaming
histograms.
Thresholds are in real units, in (0, max |x|], or 0 when every sample is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from bitwright.errors import NumericsError
from bitwright.numerics.histogram import Array, Magnitudes

Samples = npt.NDArray[Any]

#: Bins of the histogram that the KL method looks at.
KL_BINS = 2048

#: Expected |x - mean| / standard deviation: 1/√2 for a Laplace, √(2/π) for a normal distribution. Half way
#: between the two (geometric mean) data are taken for one or the other.
LAPLACE_OR_GAUSS = math.sqrt(math.sqrt(0.5) * math.sqrt(2.0 / math.pi))


# KL divergence


def histogram_of_magnitudes(x: Samples, bins: int = KL_BINS) -> tuple[Array, float]:
    """Counts of the nonzero |x| in *bins* bins centred on the multiples of a width A / (bins - 1), and that width.

    *x*: any shape, real units; A = max |x|. *returns*: counts `[bins]`, width in real units (0 if A is 0).
    """
    magnitude = np.abs(np.asarray(x, dtype=np.float64).ravel())
    width = float(magnitude.max()) / (bins - 1)
    if width == 0.0:
        return np.zeros(bins), 0.0
    codes = np.floor(magnitude[magnitude > 0.0] / width + 0.5).astype(np.int64)
    return np.bincount(codes, minlength=bins).astype(np.float64), width


def kl_threshold(counts: Array, width: float, *, levels: int = 128) -> float:
    """The threshold `i · width` at which clipped data and their *levels*-level form diverge least.

    *counts*: `[n]`, padded with zeros to a multiple of *levels*. *levels*: magnitudes of the format, 128 for int8.
    Candidates i = levels, 2·levels, …, n; the first of several equal minima wins. Not limited to max |x|: the last
    candidate lies one width beyond it.
    """
    counts = np.pad(np.asarray(counts, dtype=np.float64), (0, -len(counts) % levels))
    candidates = range(levels, len(counts) + 1, levels)
    divergences = [_divergence(counts, i, levels) for i in candidates]
    best = int(np.argmin(divergences))
    # Where nothing can be compared (no data) the full range is kept.
    return width * (candidates[best] if math.isfinite(divergences[best]) else len(counts))


def _divergence(counts: Array, i: int, levels: int) -> float:
    """KL divergence, base 10, of the first *i* bins (tail added to the last) from their *levels*-level form."""
    head = counts[:i]
    inside = head.sum()
    if inside == 0.0:
        return math.inf
    p = head.copy()
    p[-1] += counts[i:].sum()
    p /= p.sum()
    groups = head.reshape(levels, -1)
    filled = groups > 0.0
    spread = groups.sum(1) / np.maximum(filled.sum(1), 1)
    q = np.where(filled, spread[:, None], 0.0).ravel() / inside
    return float(np.sum(p * (np.log10(p + 1e-30) - np.log10(q + 1e-30))))


def kl_of_samples(x: Samples, bins: int = KL_BINS, levels: int = 128) -> float:
    """The KL threshold of the samples *x* (any shape), at most max |x|."""
    counts, width = histogram_of_magnitudes(x, bins)
    return min(kl_threshold(counts, width, levels=levels), _magnitude(x))


# Mean squared error


class Effort(TypedDict):
    """How long to iterate: at most *steps* times, until the relative change is below *tolerance*."""

    steps: int
    tolerance: float


@dataclass(frozen=True)
class Tail:
    """How data part at a threshold: the weight of the elements at or below it, and weight and sum of those above."""

    below: float
    above: float
    sum_above: float


def fixed_point(
    tail: Callable[[float], Tail], start: float, *, bits: int, unsigned: bool, steps: int, tolerance: float
) -> float:
    """The threshold s that minimises `s² · 4^-bits / (3u) · below(s) + Σ_{|x|>s} (|x| - s)²`, by Newton's iteration.

    s ← Σ_{|x|>s} |x| / (4^-bits / (3u) · below + above), u = 4 if all codes serve one sign, else 1 (OCTAV, Sakr et al.
    2022, arXiv:2206.06501). *start*: real, > 0. Stops after *steps*, or when s changes by less than *tolerance* · s.
    """
    noise = 4.0**-bits / (12.0 if unsigned else 3.0)
    s = start
    for _ in range(steps):
        t = tail(s)
        following = t.sum_above / (noise * t.below + t.above)
        # Nothing above s: the iteration cannot go on, and s (close to the maximum) is the answer.
        if t.above == 0.0 or abs(following - s) < tolerance * s:
            return s if t.above == 0.0 else following
        s = following
    return s


def mse_of_samples(x: Samples, bits: int = 8, *, unsigned: bool | None = None) -> float:
    """The threshold of least mean squared error, as vendor tools compute it: exact zeros count as clippable elements.

    *x*: any shape. *unsigned*: all codes serve one sign; None: if no sample is negative.
    """
    return _fixed_point_of_samples(x, bits, unsigned, octav=False)


def octav_of_samples(x: Samples, bits: int = 8, *, unsigned: bool | None = None) -> float:
    """The threshold of least mean squared error (OCTAV): zeros, which cost nothing, do not count; until convergence."""
    return _fixed_point_of_samples(x, bits, unsigned, octav=True)


def mse_of_magnitudes(m: Magnitudes, *, bits: int, unsigned: bool, octav: bool = False) -> float:
    """`mse_of_samples`, or `octav_of_samples`, of binned magnitudes: elements are spread evenly within their bin."""
    n, weight = len(m.counts), float(m.counts.sum())
    if weight == 0.0:
        return 0.0
    sums = m.counts * m.centres()
    below = np.concatenate([[0.0], np.cumsum(m.counts)])
    sums_above = np.append(np.cumsum(sums[::-1])[::-1], 0.0)
    zeros = 0.0 if octav else m.zeros

    def tail(s: float) -> Tail:
        j = min(int(s / m.width), n - 1)
        upper = min(max(j + 1 - s / m.width, 0.0), 1.0) * m.counts[j]
        middle = min(0.5 * (s + (j + 1) * m.width), m.largest)
        at_most_s = float(below[j + 1] - upper)
        return Tail(at_most_s + zeros, weight - at_most_s, float(sums_above[j + 1] + upper * middle))

    s = fixed_point(tail, float(sums_above[0]) / weight, bits=bits, unsigned=unsigned, **_EFFORT[octav])
    return min(s, m.largest)


#: Steps and tolerance of the iteration: as vendor tools run it (False), and until it stands still (True: OCTAV).
_EFFORT: dict[bool, Effort] = {
    False: {"steps": 20, "tolerance": 1e-8},
    True: {"steps": 100, "tolerance": 1e-12},
}


def _fixed_point_of_samples(x: Samples, bits: int, unsigned: bool | None, *, octav: bool) -> float:
    flat = np.asarray(x, dtype=np.float64).ravel()
    if unsigned is None:
        unsigned = bool(flat.min() >= 0.0)
    ordered = np.sort(np.abs(flat[flat != 0.0]))
    if len(ordered) == 0:
        return 0.0
    total = np.append(np.cumsum(ordered[::-1])[::-1], 0.0)
    zeros = 0 if octav else len(flat) - len(ordered)

    def tail(s: float) -> Tail:
        below = int(np.searchsorted(ordered, s, side="right"))
        return Tail(below + zeros, len(ordered) - below, float(total[below]))

    s = fixed_point(tail, float(ordered.mean()), bits=bits, unsigned=unsigned, **_EFFORT[octav])
    return min(s, float(ordered[-1]))


def mse_range(x: Array, counts: Array, *, lo: float, hi: float, bits: int) -> tuple[float, float]:
    """The range within [*lo*, *hi*] and around 0 of least mean squared error for asymmetric codes of so many *bits*.

    *x*: `[n]` ascending, real units, with weights *counts* `[n]`, exact zeros left out. The error is `step² / 12` for
    every number inside, step = (hi - lo) / (2^bits - 1), plus the squared distance of those outside; a grid of ends is
    searched, then refined twice.
    """
    sides = [(-x[x < 0.0][::-1], counts[x < 0.0][::-1]), (x[x > 0.0], counts[x > 0.0])]
    total, levels = float(counts.sum()), 2.0**bits - 1.0
    least, most = [0.0, 0.0], [max(-lo, 0.0), max(hi, 0.0)]
    for _ in range(3):
        below, above = (np.linspace(a, b, 65) for a, b in zip(least, most, strict=True))
        (cost_below, n_below), (cost_above, n_above) = (
            _clipping(*sides[0], below),
            _clipping(*sides[1], above),
        )
        step = (below[:, None] + above) / levels
        error = step**2 / 12.0 * (total - n_below[:, None] - n_above) + cost_below[:, None] + cost_above
        best = np.unravel_index(int(np.argmin(error)), error.shape)
        ends = [(below, int(best[0])), (above, int(best[1]))]
        least = [float(e[max(k - 1, 0)]) for e, k in ends]
        most = [float(e[min(k + 1, 64)]) for e, k in ends]
    return 0.0 - float(ends[0][0][ends[0][1]]), float(ends[1][0][ends[1][1]])


def _clipping(x: Array, counts: Array, ends: Array) -> tuple[Array, Array]:
    """Squared distance and weight of the magnitudes *x* `[n]` (ascending) beyond each of *ends* `[k]`."""
    first = np.searchsorted(x, ends, side="right")
    n, sum_x, sum_xx = (np.append(np.cumsum((counts * x**p)[::-1])[::-1], 0.0)[first] for p in (0, 1, 2))
    return sum_xx - 2.0 * ends * sum_x + ends**2 * n, n


# Percentiles


def percentile_of_samples(x: Samples, percent: float) -> float:
    """The *percent* percentile of |x| (0..100), linear between the nearest samples."""
    return float(np.percentile(np.abs(np.asarray(x, dtype=np.float64)), percent))


def signed_percentile_of_samples(x: Samples, percent: float) -> float:
    """The larger magnitude of the *percent* and the (100 - *percent*) percentile of the signed samples *x*."""
    lo, hi = np.percentile(np.asarray(x, dtype=np.float64), [100.0 - percent, percent])
    return float(max(abs(lo), abs(hi)))


# Analytical clipping (ACIQ: Banner et al. 2019, arXiv:1810.05723)


def aciq_gauss(*, lo: float, hi: float, elements: float, bits: int) -> float:
    """The best threshold for normal data whose deviation is estimated from the range of *elements* samples.

    The expected maximum of n normal numbers gives std ≈ (hi - lo)/2 · 0.35 · (1 + √(π ln 4)) / √(2 ln n). One outlier
    scales it.
    """
    largest = max(abs(lo), abs(hi))
    if elements < 2:
        return largest
    expected = 0.35 * (1.0 + math.sqrt(math.pi * math.log(4.0))) / math.sqrt(2.0 * math.log(elements))
    return _clipped(aciq_gauss_ratio(bits) * (hi - lo) * 0.5 * expected, largest)


def aciq_laplace(*, deviation: float, largest: float, bits: int) -> float:
    """The best threshold for Laplace data. *deviation*: mean |x - mean x|. *largest*: max |x|; both real units."""
    return _clipped(aciq_laplace_ratio(bits) * deviation, largest)


def aciq(*, deviation: float, std: float, largest: float, bits: int) -> float:
    """The best threshold for Laplace or normal data, whichever the ratio *deviation* / *std* is closer to.

    *deviation*: mean |x - mean x|. *std*: standard deviation. *largest*: max |x|; all in real units.
    """
    if deviation < LAPLACE_OR_GAUSS * std:
        return aciq_laplace(deviation=deviation, largest=largest, bits=bits)
    return _clipped(aciq_gauss_ratio(bits) * std, largest)


def _clipped(threshold: float, largest: float) -> float:
    # Data without spread say nothing about their distribution: nothing is clipped.
    return min(threshold, largest) if threshold > 0.0 else largest


def aciq_laplace_ratio(bits: int) -> float:
    """Threshold / mean absolute deviation: the root of a·exp(a) = 3·4^bits (9.8967598 at 8 bits)."""
    return _root(lambda a: a + math.log(a) - math.log(3.0) - bits * math.log(4.0))


def aciq_gauss_ratio(bits: int) -> float:
    """Threshold / standard deviation: the root of a / (6·4^bits) = φ(a) - a·(1 - Φ(a)) (3.9240355 at 8 bits)."""

    def slope(a: float) -> float:
        density = math.exp(-0.5 * a * a) / math.sqrt(2.0 * math.pi)
        return a / (6.0 * 4.0**bits) - density + a * 0.5 * math.erfc(a / math.sqrt(2.0))

    return _root(slope)


def _root(f: Callable[[float], float]) -> float:
    """The zero of an increasing *f* between 0 and 64, by bisection."""
    lo, hi = 1e-6, 64.0
    for _ in range(64):
        middle = 0.5 * (lo + hi)
        lo, hi = (middle, hi) if f(middle) < 0.0 else (lo, middle)
    return hi


def aciq_gauss_of_samples(x: Samples, bits: int = 8) -> float:
    """`aciq_gauss` of the samples *x* (any shape)."""
    return aciq_gauss(lo=float(np.min(x)), hi=float(np.max(x)), elements=np.size(x), bits=bits)


def aciq_laplace_of_samples(x: Samples, bits: int = 8) -> float:
    """`aciq_laplace` of the samples *x* (any shape)."""
    values = np.asarray(x, dtype=np.float64)
    deviation = float(np.abs(values - values.mean()).mean())
    return aciq_laplace(deviation=deviation, largest=_magnitude(x), bits=bits)


def aciq_of_samples(x: Samples, bits: int = 8) -> float:
    """`aciq` of the samples *x* (any shape).

    Data on one side of zero (the output of a ReLU) are taken for one half of a distribution around zero; exact
    zeros then do not count.
    """
    values = np.asarray(x, dtype=np.float64).ravel()
    if values.min() >= 0.0 or values.max() <= 0.0:
        values = values[values != 0.0]
        values = np.concatenate([values, -values]) if len(values) else np.zeros(1)
    deviation = float(np.abs(values - values.mean()).mean())
    return aciq(deviation=deviation, std=float(values.std()), largest=_magnitude(x), bits=bits)


def _magnitude(x: Samples) -> float:
    return float(np.max(np.abs(x)))


def check_percent(percent: float) -> None:
    """*raises* `NumericsError` unless 0 < percent <= 100."""
    if not 0.0 < percent <= 100.0:
        raise NumericsError(
            "percentile",
            expected="a percentage with 0 < p <= 100",
            found=f"{percent}",
            remedy="Write for example percentile(99.99).",
        )

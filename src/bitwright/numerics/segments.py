"""Dividing the input codes of a table into segments, on a grid of 1024 cells of 64 codes (docs/numerics.md §9.5).

Everything here counts in cells. A division into s segments is its s + 1 boundaries, ascending.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Boundaries = tuple[int, ...]

#: log2 of the codes of a cell, and of the intervals that a segment may have.
CELL_BITS = 6
INTERVAL_BITS = 6
INTERVALS = 1 << INTERVAL_BITS
#: Cells of a 16-bit input.
CELLS = 1 << (16 - CELL_BITS)
#: Widest entry spacing, as a power of two: one segment over all codes.
WIDEST = 16 - INTERVAL_BITS

#: A division of the least squared error may have this much more of it, if its largest error is smaller.
SLACK = 0.01
#: Halvings of the interval in which the least possible largest error lies: few, each costs a whole search.
_HALVINGS = 4
#: A largest error, in output steps, below which no smaller one is looked for: half of it is the output's own rounding.
_GOOD = 1.0


def spacing(a: int, b: int) -> int:
    """log2 of the entry spacing, in codes, of a segment of the cells [a, b): the least with at most 64 intervals on the global grid."""
    return int(_spacings()[a, b])


@lru_cache(maxsize=1)
def _spacings() -> npt.NDArray[np.int8]:
    """`spacing` of every pair: `[CELLS + 1, CELLS + 1]`; meaningless where a >= b."""
    first = np.arange(CELLS + 1)[:, None] << CELL_BITS
    last = (np.arange(CELLS + 1)[None, :] << CELL_BITS) - 1
    found = np.full((CELLS + 1, CELLS + 1), WIDEST, dtype=np.int8)
    for k in range(WIDEST - 1, -1, -1):
        found[(last >> k) - (first >> k) + 1 <= INTERVALS] = k
    return found


def by_density(density: Array, start: int, count: int) -> Boundaries:
    """Boundaries between which *density* has equal integrals, each moved to the nearest cell boundary, every segment one cell at least.

    *density*: `[cells]`, >= 0, of the cells from *start* on. *count*: segments, at most as many as cells.
    """
    cells = len(density)
    if not density.sum() > 0:
        density = np.ones(cells)
    integral = np.concatenate([[0.0], np.cumsum(density)])
    shares = np.arange(count + 1) / count * integral[-1]
    ideal = np.rint(np.interp(shares, integral, np.arange(cells + 1))).astype(int)
    ideal[0], ideal[-1] = 0, cells
    steps = np.arange(count + 1)
    rising = np.maximum.accumulate(ideal - steps) + steps
    rising = np.minimum(rising, cells - count + steps)
    return tuple(int(start + b) for b in rising)


def curvature(values: Array) -> Array:
    """sqrt(|second difference|) of every cell: with equal integrals of it, linear interpolation errs equally in all segments (de Boor 1973).

    *values*: `[cells + 1]`, the function at the cell boundaries.
    """
    if len(values) < 3:
        return np.ones(len(values) - 1)
    bend = np.sqrt(np.abs(np.diff(values, n=2)))
    # A cell's share is the mean of what its two boundaries bend by; the ends bend as their neighbours.
    bend = np.concatenate([bend[:1], bend, bend[-1:]])
    return (bend[1:] + bend[:-1]) / 2


def mixture(values: Array) -> Array:
    """Half of the segments by `curvature`, half evenly: the mean of the two densities, each of integral 1."""
    bend = curvature(values)
    even = np.full(len(bend), 1 / len(bend))
    return (bend / bend.sum() + even) / 2 if bend.sum() > 0 else even


class CellErrors:
    """What every segment would cost. The cells from *start* on; entries lie on a global grid, so a cell's error depends on the spacing alone.

    *squared*: `[WIDEST + 1, cells]`, weighted sum of squared errors of every cell at each spacing. *largest*: same shape, its largest error.
    """

    def __init__(self, squared: Array, largest: Array, start: int) -> None:
        self.start, self.cells = start, squared.shape[1]
        pairs = _spacings()[start : start + self.cells + 1, start : start + self.cells + 1].astype(np.intp)
        prefix = np.concatenate([np.zeros((WIDEST + 1, 1)), np.cumsum(squared, axis=1)], axis=1)
        b = np.arange(self.cells + 1)
        #: `[a, b]`: squared error of the segment [a, b); infinite where a >= b.
        self.squared = prefix[pairs, b[None, :]] - prefix[pairs, b[:, None]]
        self.squared[b[:, None] >= b[None, :]] = np.inf
        self.largest = _largest_of_segments(largest, pairs)

    def of(self, boundaries: Boundaries) -> tuple[float, float]:
        """Weighted squared error and largest error of a division."""
        b = np.asarray(boundaries) - self.start
        return float(self.squared[b[:-1], b[1:]].sum()), float(self.largest[b[:-1], b[1:]].max())


def _largest_of_segments(largest: Array, pairs: npt.NDArray[np.intp]) -> Array:
    """`[a, b]`: the largest error of the segment [a, b), by doubling windows of maxima (a sparse table)."""
    cells = largest.shape[1]
    levels = [largest]
    while 2 << (len(levels) - 1) <= cells:
        half = 1 << (len(levels) - 1)
        below = levels[-1]
        levels.append(np.maximum(below[:, :-half], below[:, half:]))
    found = np.zeros((cells + 1, cells + 1))
    lengths = np.arange(cells + 1)[None, :] - np.arange(cells + 1)[:, None]
    for level, maxima in enumerate(levels):
        width = 1 << level
        a, b = np.nonzero((lengths >= width) & (lengths < 2 * width))
        k = pairs[a, b]
        found[a, b] = np.maximum(maxima[k, a], maxima[k, b - width])
    return found


def optimal(errors: CellErrors, count: int, rivals: tuple[Boundaries, ...] = ()) -> Boundaries:
    """The division into at most *count* segments of the least weighted squared error; of those within `SLACK` of it, one of a smaller largest error.

    Never of a larger squared error than any of *rivals*. Exact dynamic programming: best[s, b] = min over a of best[s - 1, a] + squared[a, b].
    """
    best = _least(errors.squared, count)
    assert best is not None, "one segment is always possible"
    squared, largest = errors.of(_shifted(best, errors.start))
    allowed = min([squared * (1 + SLACK), *(errors.of(r)[0] for r in rivals)])
    # The least possible largest error lies between the output's rounding and what was just found.
    low, high = _GOOD / 2, largest
    for _ in range(_HALVINGS if count <= 24 else _HALVINGS // 2):
        if high <= _GOOD:
            break
        middle = float(np.sqrt(low * high))
        tried = _least(np.where(errors.largest <= middle, errors.squared, np.inf), count)
        if tried is not None and errors.of(_shifted(tried, errors.start))[0] <= allowed:
            best, high = tried, errors.of(_shifted(tried, errors.start))[1]
        else:
            low = middle
    return _shifted(best, errors.start)


def _least(cost: Array, count: int) -> Boundaries | None:
    """Boundaries, from 0, of the division into at most *count* segments of the least total *cost* `[a, b]`; None if all are infinite."""
    cells = cost.shape[0] - 1
    columns = np.ascontiguousarray(cost.T)
    best = cost[0].copy()
    choices = []
    for _ in range(1, count):
        sums = columns + best
        # No segment at all is also a choice: fewer segments may be enough.
        sums[np.arange(cells + 1), np.arange(cells + 1)] = best
        choice = sums.argmin(axis=1)
        choices.append(choice)
        best = sums[np.arange(cells + 1), choice]
    if not np.isfinite(best[-1]):
        return None
    boundaries = [cells]
    for choice in reversed(choices):
        boundaries.append(int(choice[boundaries[-1]]))
    return tuple(sorted({0, *boundaries}))


def _shifted(boundaries: Boundaries, start: int) -> Boundaries:
    return tuple(b + start for b in boundaries)

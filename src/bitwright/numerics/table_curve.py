"""The function that a table stands for, sampled at every input code (docs/numerics.md §9.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.spec import QParams

#: A float64 tensor to a float64 tensor, element by element.
RealFunction = Callable[[Tensor], Tensor]
Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: An end slope is taken over so many codes (one cell of §9.4).
_END = 64

#: Output steps from 0 at which a value counts as this far; so that all that is done to it stays finite.
_FAR = 2.0**100
#: Share of the calibrated inputs that may lie where the function is not finite.
_TOLERATED = 0.01


@dataclass(frozen=True)
class TableCurve:
    """*values*: `[n + 1]` float64, output codes minus the zero point, unclamped, at offset codes u = code - qmin, with u = n beyond the last.

    *known*: `[n]`, where the function itself is finite. *first*, *last*: offset codes of the covered range, both inside.
    Outside, values go on as the function ends there. *slopes*: of the straight lines left and right, output codes per input code.
    """

    values: Array
    known: Mask
    first: int
    last: int
    slopes: tuple[float, float]

    def with_lines(self) -> Array:
        """*values*, with the straight lines outside the range."""
        # One past the last code belongs to the function where the range reaches the end.
        last = self.last + (self.last == len(self.known) - 1)
        u = np.arange(len(self.values))
        below, above = np.minimum(u - self.first, 0), np.maximum(u - last, 0)
        return self.values[np.clip(u, self.first, last)] + below * self.slopes[0] + above * self.slopes[1]


def sample(
    function: RealFunction,
    q_in: QParams,
    q_out: QParams,
    *,
    input_range: tuple[float, float] | None = None,
    gradients: tuple[float, float] | None = None,
    where: str,
) -> TableCurve:
    """Sample *function* at every input code, in float64.

    *input_range*: real units; None: from the first code to the last at which the function is finite. Outside, straight lines with the
    *gradients* (real output per real input); by default they hold the last value, or go on as the function ends where a range is given.
    *raises* `NumericsError`: the function is not finite inside a given range, or nowhere; the range holds fewer than two codes; more
    than one scale.
    """
    require_one_scale(q_in, q_out, where)
    values = in_steps(evaluate(function, q_in, where), q_out)
    known = np.isfinite(values)
    if input_range is None:
        finite = np.flatnonzero(known[:-1])
        if len(finite) < 2:
            raise _not_finite(q_in, 0, where)
        first, last = int(finite[0]), int(finite[-1])
    else:
        first, last = covered_codes(q_in, input_range, where)
        if not known[first : last + 1].all():
            raise _not_finite(q_in, int(first + np.argmin(known[first : last + 1])), where)
    values, slopes = _hold(values), (0.0, 0.0)
    if input_range is not None:
        slopes = _end_slopes(values, first, last)
        # The last entry inside and the first outside share an interval: the latter goes on as the function ends, whatever the gradients.
        values = TableCurve(values, known[:-1], first, last, slopes).with_lines()
    if gradients is not None:
        left, right = in_steps(np.array(gradients) * q_in.scale[0], q_out)
        slopes = float(left), float(right)
    return TableCurve(values, known[:-1], first, last, slopes)


def require_one_scale(q_in: QParams, q_out: QParams, where: str) -> None:
    """*raises* `NumericsError` if input or output has more than one scale: a table serves the whole value."""
    for q in (q_in, q_out):
        if len(q.scale) != 1:
            raise NumericsError(
                where or "look-up table",
                expected="one scale for the whole input and one for the whole output",
                found=f"{len(q.scale)} scales",
                remedy="Quantize what a table reads and writes per tensor.",
            )


def evaluate(function: RealFunction, q_in: QParams, where: str) -> Array:
    """*function* at the real value of every input code and of one code beyond the largest: `[n + 1]` float64, NaN and infinity as they come."""
    d = q_in.spec.dtype
    codes = torch.arange(d.qmin, d.qmax + 2, dtype=torch.float64)
    x = (codes - q_in.zero_point[0]) * q_in.scale[0]
    y = function(x)
    if y.shape != x.shape:
        raise NumericsError(
            where or "look-up table",
            expected="a function of one number, applied to each element",
            found=f"shape {list(y.shape)} for an input of shape {list(x.shape)}",
            remedy="A table can only hold a function that works element by element.",
        )
    return np.asarray(y.detach().double().cpu().numpy(), dtype=np.float64)


def in_steps(values: Array, q_out: QParams) -> Array:
    """Real *values* in output steps, those that are finite held within ± 2^100; NaN and infinity as they come."""
    with np.errstate(over="ignore"):
        return np.where(np.isfinite(values), np.clip(values / q_out.scale[0], -_FAR, _FAR), values)


def covered_codes(q_in: QParams, input_range: tuple[float, float] | None, where: str) -> tuple[int, int]:
    """First and last offset code (code - qmin) inside *input_range*, real units; None: all codes."""
    d = q_in.spec.dtype
    if input_range is None:
        return 0, d.qmax - d.qmin
    # A millionth of a code, so that a range spelled in decimals holds the codes at its ends.
    lo = np.ceil(input_range[0] / q_in.scale[0] + q_in.zero_point[0] - 1e-6)
    hi = np.floor(input_range[1] / q_in.scale[0] + q_in.zero_point[0] + 1e-6)
    first, last = int(max(lo, d.qmin)) - d.qmin, int(min(hi, d.qmax)) - d.qmin
    if last <= first:
        low, high = q_in.limits
        raise NumericsError(
            where or "look-up table",
            expected="an input_range that holds at least two input codes",
            found=f"[{input_range[0]:g}, {input_range[1]:g}] with codes from {low:g} to {high:g} in steps of {q_in.scale[0]:g}",
            remedy="Widen input_range, or leave it out to cover all codes.",
        )
    return first, last


def require_known_inputs(curve: TableCurve, weights: Array | None, q_in: QParams, where: str) -> None:
    """*raises* `NumericsError` if calibrated inputs lie where the function is not finite, but for rounding to the code next to where it is.

    *weights*: `[n]`, how often each input code was seen.
    """
    if weights is None or curve.known.all():
        return
    near = curve.known.copy()
    near[1:] |= curve.known[:-1]
    near[:-1] |= curve.known[1:]
    if weights[~near].sum() > _TOLERATED * weights.sum():
        raise _not_finite(q_in, int(np.argmax(np.where(near, 0.0, weights))), where)


def usable_range(
    function: RealFunction,
    inverse: RealFunction,
    q_in: QParams,
    q_out: QParams,
    *,
    input_range: tuple[float, float] | None = None,
    where: str = "",
) -> tuple[float, float]:
    """The inputs, in real units, at which a monotonically decreasing *function* does not saturate the output, by its *inverse*.

    *raises* `NumericsError`: the function rises somewhere, or the inverse is not finite and decreasing on the function's values.
    """
    first, last = covered_codes(q_in, input_range, where)
    values = evaluate(function, q_in, where)[first : last + 1]
    values = values[np.isfinite(values)]
    if len(values) < 2 or (np.diff(values) > 0).any() or values[0] == values[-1]:
        raise NumericsError(
            where or "look-up table",
            expected="a function that falls over the whole input range, as inverse_func is for such",
            found="one that rises or is constant",
            remedy="Leave inverse_func out, or narrow input_range to where the function falls (1/x: to one sign).",
        )
    low, high = q_out.limits
    ends = np.clip(values[[-1, 0]], low, high)
    back = inverse(torch.linspace(float(ends[0]), float(ends[1]), 257, dtype=torch.float64)).double().numpy()
    inner = back[1:-1]
    if not np.isfinite(inner).all() or (np.diff(inner) > 0).any() or ends[0] == ends[1]:
        raise NumericsError(
            where or "look-up table",
            expected="an inverse_func that is finite and falls over the function's values",
            found=f"a rise or a value that is not finite between {ends[0]:g} and {ends[1]:g}",
            remedy="inverse_func must undo the function: x = inverse_func(function(x)).",
        )
    d = q_in.spec.dtype
    reals = [(u + d.qmin - q_in.zero_point[0]) * q_in.scale[0] for u in (first, last)]
    # The inverse may have a pole at an end (1/y at 0): the input range ends it.
    lo, hi = (x if np.isfinite(x) else end for x, end in zip((back[-1], back[0]), reals, strict=True))
    return max(float(lo), reals[0]), min(float(hi), reals[1])


def _hold(values: Array) -> Array:
    """Where *values* are not finite, the nearest finite one; of two as near, the one at the larger code."""
    known = np.flatnonzero(np.isfinite(values))
    u = np.arange(len(values))
    after = np.clip(np.searchsorted(known, u), 0, len(known) - 1)
    before = np.clip(np.searchsorted(known, u, side="right") - 1, 0, len(known) - 1)
    nearest = np.where(np.abs(known[after] - u) <= np.abs(u - known[before]), known[after], known[before])
    return values[nearest]


def _end_slopes(values: Array, first: int, last: int) -> tuple[float, float]:
    """Output codes per input code at both ends of the range."""
    span = min(_END, last - first)
    left, right = values[first + span] - values[first], values[last] - values[last - span]
    return float(left / span), float(right / span)


def _not_finite(q_in: QParams, u: int, where: str) -> NumericsError:
    x = (u + q_in.spec.dtype.qmin - q_in.zero_point[0]) * q_in.scale[0]
    return NumericsError(
        where or "look-up table",
        expected="a function that is finite on the inputs of its table",
        found=f"NaN or infinity at {x:g}",
        remedy="Narrow input_range to where the function is finite, or keep its input there (clip, epsilon).",
    )

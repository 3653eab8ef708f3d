"""A scale that the user knows."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.spec import QuantSpec
from bitwright.train.observers import OBSERVERS, Ends, Observer


@OBSERVERS.register("fixed_scale")
class FixedScale(Observer):
    """A constant *scale* (real units per code; one number, or one for each channel) and *zero_point*.

    Or a *threshold*: the largest magnitude that the codes must reach, scale = threshold / 2^(bits - 1).
    """

    copes_with_nan = True
    is_given = True

    def __init__(
        self,
        spec: QuantSpec,
        groups: int,
        *,
        scale: float | Tensor | None = None,
        zero_point: int = 0,
        threshold: float | None = None,
        averaging_constant: float = 0.0,
    ) -> None:
        super().__init__(spec, groups, averaging_constant=0.0)
        d = spec.dtype
        if (scale is None) == (threshold is None):
            raise NumericsError(
                "observer 'fixed_scale'",
                expected="either a scale or a threshold",
                found="both" if scale is not None else "neither",
                remedy='Give for example {"scale": 1 / 128}.',
            )
        if threshold is not None:
            scale = _numbers(threshold) / ((d.qmax + 1) if d.signed else d.qmax)
        given = _numbers(scale)
        if given.numel() not in (1, groups):
            raise NumericsError(
                "observer 'fixed_scale'",
                expected=f"one scale, or {groups}",
                found=str(given.numel()),
                remedy="Give one number, or one for each channel.",
            )
        self.fixed = given.expand(groups).clone()
        if not bool((self.fixed > 0).all()) or not bool(self.fixed.isfinite().all()):
            raise NumericsError(
                "observer 'fixed_scale'", expected="a finite scale > 0", found=str(scale), remedy="Mend it."
            )
        if not d.qmin <= zero_point <= d.qmax or (spec.symmetric and zero_point):
            raise NumericsError(
                "observer 'fixed_scale'",
                expected="zero point 0" if spec.symmetric else f"a zero point in [{d.qmin}, {d.qmax}]",
                found=str(zero_point),
                remedy="Leave it out.",
            )
        self.zero_point = zero_point
        self.set_range(*self.batch_range(torch.empty(0)))

    def scales(self) -> Ends:
        if self.spec.power_of_two:
            return super().scales()
        return self.fixed.to(self.lo.device), torch.full_like(self.lo, self.zero_point)

    def forget(self) -> None:
        """Nothing: the scale was given, not seen."""

    def batch_range(self, x: Tensor) -> Ends:
        d = self.spec.dtype
        low = -d.qmax if self.spec.symmetric else d.qmin - self.zero_point
        return self.fixed * low, self.fixed * (d.qmax - self.zero_point)


def _numbers(x: object) -> Tensor:
    """*x*, a number, a list or a tensor: `[n]` float32. *raises* `NumericsError`."""
    try:
        return torch.as_tensor(x, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as e:
        raise NumericsError(
            "observer 'fixed_scale'", expected="numbers", found=repr(x), remedy="Give for example 1 / 128."
        ) from e

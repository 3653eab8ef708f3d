"""Analytical clipping (ACIQ, Banner et al. 2019): the best threshold for data of an assumed distribution."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.calibrate.observers import METHODS
from bitwright.calibrate.statistics import ValueStatistics
from bitwright.errors import NumericsError
from bitwright.numerics.spec import QuantSpec
from bitwright.numerics.thresholds import aciq, aciq_gauss, aciq_laplace


@METHODS.register("aciq")
@dataclass(frozen=True)
class Aciq:
    """*distribution* `auto`: Laplace or normal, whichever fits the moments (`numerics.thresholds.aciq_of_samples`).

    `gauss` and `laplace`: the forms of vendor tools, the first of which estimates the deviation from the range.
    """

    distribution: str = "auto"

    def __post_init__(self) -> None:
        if self.distribution not in ("auto", "gauss", "laplace"):
            raise NumericsError(
                "threshold method 'aciq'",
                expected="aciq, aciq(gauss) or aciq(laplace)",
                found=f"the distribution {self.distribution!r}",
                remedy="Choose one of them.",
            )

    def range(self, statistics: ValueStatistics, spec: QuantSpec) -> tuple[float, float]:
        return statistics.clipped_range(self._threshold(statistics, spec.dtype.bits), spec)

    def _threshold(self, seen: ValueStatistics, bits: int) -> float:
        if self.distribution == "gauss":
            return aciq_gauss(lo=seen.lo, hi=seen.hi, elements=seen.elements, bits=bits)
        if self.distribution == "laplace":
            return aciq_laplace(deviation=seen.moments().deviation, largest=seen.largest, bits=bits)
        moments = seen.magnitudes().mirrored_moments() if seen.is_one_sided else seen.moments()
        return aciq(deviation=moments.deviation, std=moments.std, largest=seen.largest, bits=bits)

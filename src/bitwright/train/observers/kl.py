"""Least KL divergence between the values and their quantized form."""

from __future__ import annotations

from typing import Any

from bitwright.numerics.spec import QuantSpec
from bitwright.train.observers import OBSERVERS
from bitwright.train.observers.histogram import Histogram


@OBSERVERS.register("kl")
class Kl(Histogram):
    """The `histogram` observer with method `kl`. *bins*: of the magnitudes; the search looks at all data seen so far.

    *update_interval*: steps between two searches, at most the number of steps; equal to it is fastest.
    """

    def __init__(
        self, spec: QuantSpec, groups: int, *, bins: int = 512, update_interval: int = 1, **options: Any
    ) -> None:
        super().__init__(spec, groups, method="kl", bins=bins, update_interval=update_interval, **options)

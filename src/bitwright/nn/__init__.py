"""Modules for a user's own network that hardware computes in a way of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from bitwright.errors import ModelError
from bitwright.numerics.lut import TableSettings
from bitwright.ops.segment_lut import CAPTURED, TableDefinition, segment_lut

__all__ = ["SegmentLUT"]


class SegmentLUT(nn.Module):
    """Any function of one number as one operator, which the chip looks up in a table of segments.

    *simulated_func*: tensor to tensor of the same shape, element by element; what the float model computes.
    *dividing_points*: the largest input of each segment, real units, ascending; None: by *auto_divide_strategy* (`evenly`,
    `curvature`, `mix` or `optimal`) into *num_tables* segments. *input_range*: inputs that the table covers; None: all codes.
    *inverse_func*: of a falling function; the table then covers only inputs whose result fits the output.
    *gradients*: slopes left and right of the range. *symmetric_mode*: `none`, `odd` or `even`. *is_centrosymmetric*: the older way
    to say `odd`. *raises* `NumericsError`, `UnknownName`, `ModelError`.
    """

    def __init__(
        self,
        simulated_func: Callable[[Tensor], Tensor],
        dividing_points: Sequence[float] | None = None,
        input_range: tuple[float, float] | None = None,
        auto_divide_strategy: str = "evenly",
        inverse_func: Callable[[Tensor], Tensor] | None = None,
        gradients: tuple[float, float] | None = None,
        symmetric_mode: str = "none",
        num_tables: int = 6,
        *,
        is_centrosymmetric: bool = False,
    ) -> None:
        super().__init__()
        if not callable(simulated_func):
            raise ModelError(
                "SegmentLUT",
                expected="a function of one tensor",
                found=type(simulated_func).__name__,
                remedy="Write SegmentLUT(torch.exp), or give a function of your own.",
            )
        if is_centrosymmetric:
            warnings.warn(
                'SegmentLUT: is_centrosymmetric is symmetric_mode="odd"', FutureWarning, stacklevel=2
            )
            symmetric_mode = "odd"
        settings = TableSettings(
            form="auto",
            strategy=auto_divide_strategy if dividing_points is None else "manual",
            num_tables=num_tables,
            dividing_points=None if dividing_points is None else tuple(map(float, dividing_points)),
            input_range=_pair(input_range),
            gradients=_pair(gradients),
            symmetric_mode=symmetric_mode,
        )
        self.definition = TableDefinition(simulated_func, settings, inverse_func)
        self._key = uuid4().hex

    @property
    def simulated_func(self) -> Callable[[Tensor], Tensor]:
        """The function itself."""
        return self.definition.function

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            CAPTURED[self._key] = self.definition
            y: Tensor = segment_lut(x, self._key)
        else:
            y = self.definition.function(x)
        return y

    def extra_repr(self) -> str:
        s = self.definition.settings
        return f"strategy={s.strategy}, num_tables={s.num_tables}, input_range={s.input_range}"


def _pair(given: Any) -> Any:
    """A list counts as a tuple."""
    return tuple(given) if isinstance(given, list) else given

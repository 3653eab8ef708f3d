"""What the quantizers of a prepared model do: the four states, and setting them."""

from __future__ import annotations

import warnings
from enum import Enum


class FakeQuantState(Enum):
    """What every quantizer of a model (or of one submodule) does when a value passes.

    QAT: observe the range, and fake-quantize. CALIBRATION: observe only. VALIDATION: fake-quantize only. FLOAT: neither.
    """

    QAT = "qat"
    CALIBRATION = "calibration"
    VALIDATION = "validation"
    FLOAT = "float"

    @property
    def observes(self) -> bool:
        """Whether ranges are followed."""
        return self in (FakeQuantState.QAT, FakeQuantState.CALIBRATION)

    @property
    def quantizes(self) -> bool:
        """Whether values are rounded to codes."""
        return self in (FakeQuantState.QAT, FakeQuantState.VALIDATION)

    @property
    def wants_eval(self) -> bool:
        """Whether dropout and batch statistics of training mode would falsify the result."""
        return self in (FakeQuantState.CALIBRATION, FakeQuantState.VALIDATION)


class ModeNotice:
    """Warns once that a model is in training mode in a state that wants evaluation mode."""

    def __init__(self) -> None:
        self._given = False

    def give(self, state: FakeQuantState) -> None:
        """Warn, unless that was done."""
        if not self._given:
            self._given = True
            warnings.warn(
                f"fake quantization is in state {state.name} while the model is in training mode: dropout and batch"
                " statistics are active. Call model.eval() first.",
                stacklevel=2,
            )

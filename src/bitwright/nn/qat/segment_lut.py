"""Fixed-point tables of a prepared model, under the name that users of vendor toolchains know."""

from __future__ import annotations

from torch import nn

from bitwright.train.tables import convert_segment_lut

__all__ = ["QuantizedQATSegmentLUT"]


class QuantizedQATSegmentLUT:
    """`QuantizedQATSegmentLUT.convert_segment_lut(model)`; see `bitwright.train.tables`."""

    @staticmethod
    def convert_segment_lut(model: nn.Module) -> list[str]:
        """Compute every table operator of the prepared *model* in fixed point, in place. *returns*: their module paths."""
        return convert_segment_lut(model)

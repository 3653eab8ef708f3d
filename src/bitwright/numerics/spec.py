"""What is wished for one value (`QuantSpec`) and the numbers that answer it (`QParams`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.dtype import DType
from bitwright.numerics.rounding import Rounding


@dataclass(frozen=True)
class QuantSpec:
    """The wish for one value. *axis* None: one scale for the whole value; else one per index of that axis."""

    dtype: DType
    symmetric: bool
    axis: int | None = None
    rounding: Rounding = Rounding.HALF_EVEN
    power_of_two: bool = False

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; `from_json` reads it back."""
        return {
            "dtype": self.dtype.name,
            "symmetric": self.symmetric,
            "axis": self.axis,
            "rounding": self.rounding.value,
            "power_of_two": self.power_of_two,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> QuantSpec:
        """Inverse of `to_json`."""
        return cls(
            DType.parse(data["dtype"]),
            bool(data["symmetric"]),
            data["axis"],
            Rounding(data["rounding"]),
            bool(data["power_of_two"]),
        )


@dataclass(frozen=True)
class QParams:
    """Quantization parameters: real = (code - zero_point) * scale.

    *scale*: real units per code, > 0; a tuple of one number, or of one per channel of `spec.axis`.
    *zero_point*: codes, same length. *raises* `NumericsError` if a scale is not finite and positive.
    """

    spec: QuantSpec
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]

    def __post_init__(self) -> None:
        bad = [s for s in self.scale if not (0.0 < s < float("inf"))]
        if bad or len(self.scale) != len(self.zero_point):
            raise NumericsError(
                "quantization parameters",
                expected="finite scales > 0 and one zero point for each",
                found=f"scale {bad[:3] or self.scale}, {len(self.zero_point)} zero points",
                remedy="Check the calibration data and weights for NaN, infinity and all-equal values.",
            )

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest representable real value (of the widest channel)."""
        low = min((self.spec.dtype.qmin - z) * s for s, z in zip(self.scale, self.zero_point, strict=True))
        high = max((self.spec.dtype.qmax - z) * s for s, z in zip(self.scale, self.zero_point, strict=True))
        return low, high

    def scale_tensor(self, x: Tensor) -> Tensor:
        """The scale, float32 on *x*'s device, shaped to broadcast against *x*."""
        return self._broadcast(torch.tensor(self.scale, dtype=torch.float32, device=x.device), x)

    def zero_point_tensor(self, x: Tensor) -> Tensor:
        """The zero point, float32 on *x*'s device, shaped to broadcast against *x*."""
        return self._broadcast(torch.tensor(self.zero_point, dtype=torch.float32, device=x.device), x)

    def _broadcast(self, t: Tensor, x: Tensor) -> Tensor:
        if self.spec.axis is None:
            return t.reshape(())
        shape = [1] * x.dim()
        shape[self.spec.axis] = -1
        return t.reshape(shape)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; `from_json` reads it back."""
        return {"spec": self.spec.to_json(), "scale": list(self.scale), "zero_point": list(self.zero_point)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> QParams:
        """Inverse of `to_json`."""
        return cls(QuantSpec.from_json(data["spec"]), tuple(data["scale"]), tuple(data["zero_point"]))

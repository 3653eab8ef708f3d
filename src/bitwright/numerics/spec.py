"""What is wished for one value (`QuantSpec`) and the numbers that answer it (`QParams`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.dtype import DType
from bitwright.numerics.rounding import Rounding


@dataclass(frozen=True)
class QuantSpec:
    """The wish for one value. *axis* None: one scale for the whole value; else one per index of that axis (channel).

    *group*: of a matrix, one scale per channel and so many neighbours along the other axis, whose length it divides.
    """

    dtype: DType
    symmetric: bool
    axis: int | None = None
    rounding: Rounding = Rounding.HALF_EVEN
    power_of_two: bool = False
    group: int | None = None

    def scales(self, shape: Sequence[int]) -> int:
        """How many scales a value of *shape* has."""
        if self.axis is None:
            return 1
        return shape[self.axis] * (shape[1 - self.axis] // self.group if self.group else 1)

    def rows(self, x: Tensor) -> Tensor:
        """*x* as `[scales, n]`: what shares a scale in one row."""
        if self.axis is None:
            return x.reshape(1, -1)
        channels = x.movedim(self.axis, 0)
        return channels.reshape(-1, self.group) if self.group else channels.flatten(1)

    def broadcast(self, t: Tensor, x: Tensor) -> Tensor:
        """*t* `[scales]`, shaped to broadcast against *x*."""
        if self.axis is None:
            return t.reshape(())
        if self.group:
            spread = t.reshape(x.shape[self.axis], -1).repeat_interleave(self.group, 1)
            return spread if self.axis == 0 else spread.T
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return t.reshape(shape)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; `from_json` reads it back."""
        return {
            "dtype": self.dtype.name,
            "symmetric": self.symmetric,
            "axis": self.axis,
            "rounding": self.rounding.value,
            "power_of_two": self.power_of_two,
            "group": self.group,
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
            data.get("group"),
        )


@dataclass(frozen=True)
class QParams:
    """Quantization parameters: real = (code - zero_point) * scale.

    *scale*: real units per code, > 0; a tuple of one number, or of one per channel of `spec.axis` (per group of each channel).
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
        return self.spec.broadcast(torch.tensor(self.scale, dtype=torch.float32, device=x.device), x)

    def zero_point_tensor(self, x: Tensor) -> Tensor:
        """The zero point, float32 on *x*'s device, shaped to broadcast against *x*."""
        return self.spec.broadcast(torch.tensor(self.zero_point, dtype=torch.float32, device=x.device), x)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; `from_json` reads it back."""
        return {"spec": self.spec.to_json(), "scale": list(self.scale), "zero_point": list(self.zero_point)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> QParams:
        """Inverse of `to_json`."""
        return cls(QuantSpec.from_json(data["spec"]), tuple(data["scale"]), tuple(data["zero_point"]))

"""Integer formats: a name, a width, a signedness, and the limits that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitwright.errors import UnknownName


@dataclass(frozen=True)
class DType:
    """An integer format of quantized codes."""

    bits: int
    signed: bool

    @property
    def name(self) -> str:
        """`int8`, `uint8`, `int16`, …"""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code; also the divisor of a symmetric scale (threshold / qmax)."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype that holds codes of this format."""
        return _STORAGE[self.name]

    @classmethod
    def parse(cls, name: str) -> DType:
        """The format called *name*. *raises* `UnknownName`."""
        if name not in _BY_NAME:
            raise UnknownName("dtype", kind="integer format", name=name, known=_BY_NAME)
        return _BY_NAME[name]


INT4, UINT4 = DType(4, True), DType(4, False)
INT8, UINT8 = DType(8, True), DType(8, False)
INT16, UINT16 = DType(16, True), DType(16, False)
INT32 = DType(32, True)
_BY_NAME = {d.name: d for d in (INT4, UINT4, INT8, UINT8, INT16, UINT16, INT32)}
_STORAGE = {
    "int4": torch.int8,
    "uint4": torch.uint8,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.uint16,
    "int32": torch.int32,
}

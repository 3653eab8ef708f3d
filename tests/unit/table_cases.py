"""Functions that chips look up in tables, with inputs that networks give them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.numerics.affine import qparams_from_range
from bitwright.numerics.dtype import DType
from bitwright.numerics.rounding import Rounding
from bitwright.numerics.spec import QParams, QuantSpec


def decode(x: Tensor) -> Tensor:
    """A user's own: a 12-bit code 0 … 4095 to -1 … 1."""
    return torch.clamp(x, 0, 4095) / 2047.5 - 1


#: Name -> function, and the range of real inputs.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "exp": (torch.exp, -12.0, 0.0),
    "log": (torch.log, 0.01, 20.0),
    "sigmoid": (torch.sigmoid, -9.0, 9.0),
    "tanh": (torch.tanh, -5.0, 5.0),
    "erf": (torch.erf, -3.0, 3.0),
    "gelu": (F.gelu, -8.0, 8.0),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), -8.0, 8.0),
    "silu": (F.silu, -8.0, 12.0),
    "mish": (F.mish, -8.0, 8.0),
    "softplus": (F.softplus, -10.0, 10.0),
    "elu": (F.elu, -6.0, 6.0),
    "selu": (F.selu, -6.0, 6.0),
    "celu": (lambda x: F.celu(x, 0.7), -6.0, 6.0),
    "hardswish": (F.hardswish, -6.0, 6.0),
    "hardsigmoid": (F.hardsigmoid, -6.0, 6.0),
    "sqrt": (torch.sqrt, 0.0, 30.0),
    "rsqrt": (torch.rsqrt, 0.02, 10.0),
    "reciprocal": (torch.reciprocal, 0.1, 40.0),
    "sin": (torch.sin, -10.0, 10.0),
    "cos": (torch.cos, -10.0, 10.0),
    "tan": (torch.tan, -1.4, 1.4),
    "asin": (torch.asin, -1.0, 1.0),
    "acos": (torch.acos, -1.0, 1.0),
    "atan": (torch.atan, -20.0, 20.0),
    "sinh": (torch.sinh, -4.0, 4.0),
    "cosh": (torch.cosh, -4.0, 4.0),
    "asinh": (torch.asinh, -20.0, 20.0),
    "acosh": (torch.acosh, 1.0, 20.0),
    "atanh": (torch.atanh, -0.99, 0.99),
    "pow_1.5": (lambda x: torch.pow(x, 1.5), 0.0, 8.0),
    "pow_-2": (lambda x: torch.pow(x, -2.0), 0.2, 8.0),
    "decode": (decode, 0.0, 4095.0),
}


def qparams(
    dtype: DType, lo: float, hi: float, *, symmetric: bool = True, rounding: Rounding = Rounding.HALF_EVEN
) -> QParams:
    return qparams_from_range(QuantSpec(dtype, symmetric, rounding=rounding), [lo], [hi])


def output_range(name: str) -> tuple[float, float]:
    """What the function makes of its inputs."""
    function, lo, hi = FUNCTIONS[name]
    y = function(torch.linspace(lo, hi, 4001, dtype=torch.float64))
    y = y[y.isfinite()]
    return float(y.min()), float(y.max())


#: Sine and cosine repeat.
TURN = 2 * math.pi

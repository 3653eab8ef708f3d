"""Observers: what training and step-wise calibration take a value's range from. One file per observer.

An observer sees `x: [groups, n]` and keeps `lo`, `hi`: `[groups]`. It never hears of axes, channels or group sizes.
(`calibrate/observers` holds the threshold methods of `tune`, which see a whole data set at once.)
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from numbers import Real
from pkgutil import iter_modules
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitwright.errors import NumericsError, UnknownName
from bitwright.numerics.affine import scales_from_range
from bitwright.numerics.spec import QuantSpec
from bitwright.registry import Registry
from bitwright.train.thresholds import Ends

__all__ = ["OBSERVERS", "Ends", "Observer", "make_observer", "observer_options", "over_processes"]


class Observer(nn.Module, ABC):
    """Follows the range of one value over the steps: lo ← lo + c · (lo of this batch - lo), and hi likewise.

    c = max(*averaging_constant*, 1 / steps): the mean of the first steps, then an exponential average. A constant of 0 keeps
    the first range, or the one that was loaded. In training mode the processes of a distributed job see the same range.
    """

    #: How the processes of a distributed job agree: on the widest range, or on the mean.
    agreement: Literal["widest", "mean"] = "mean"
    #: Whether `batch_range` copes with NaN and infinity; if not, such batches are kept from it.
    copes_with_nan = False
    #: Whether the range is one that the user fixed: nothing that is loaded changes it.
    is_given = False
    lo: Tensor
    hi: Tensor
    steps: Tensor

    def __init__(self, spec: QuantSpec, groups: int, *, averaging_constant: float = 0.01) -> None:
        super().__init__()
        if not 0.0 <= averaging_constant <= 1.0:
            raise NumericsError(
                "averaging_constant",
                expected="a number from 0 (keep the range) to 1 (the last batch alone)",
                found=str(averaging_constant),
                remedy="Use 0.01 for more than a hundred steps, up to 0.5 for two.",
            )
        self.spec, self.averaging_constant = spec, averaging_constant
        self.register_buffer("lo", torch.zeros(groups))
        self.register_buffer("hi", torch.zeros(groups))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        #: Whether `steps` > 0: asking a tensor would wait for the GPU. (A number here would have torch.compile begin
        #: again with every step.)
        self._has_range = False

    @abstractmethod
    def batch_range(self, x: Tensor) -> Ends:
        """The range worth representing of *x* `[groups, n]`, float32, n > 0: lo, hi `[groups]`, lo <= hi."""

    @torch.no_grad()
    def forward(self, x: Tensor, rectified: bool = False) -> None:
        """See one batch, *x* `[groups, n]`. *rectified*: of relu(x), only for observers that `sees_extremes`."""
        if self.has_range and self.averaging_constant == 0.0:
            return
        if x.numel() == 0 and not (
            self.training and _are_processes()
        ):  # the others wait for what this one saw
            return
        x = x.float()
        known = x.numel() > 0 and (self.copes_with_nan or bool(x.isfinite().all()))
        lo, hi = self.batch_range(x) if known else x.new_full((2, len(x)), torch.nan)
        if rectified:
            lo, hi = lo.clamp(min=0.0), hi.clamp(min=0.0)
        lo, hi = self._agreed(lo, hi)
        if self.has_range:
            c = (1.0 / (self.steps + 1)).clamp(min=self.averaging_constant)
            lo, hi = _towards(self.lo, lo, c), _towards(self.hi, hi, c)
        self.set_range(lo, hi)

    @property
    def sees_extremes(self) -> bool:
        """Whether the range follows from the extremes alone."""
        return self.agreement == "widest"

    @property
    def has_range(self) -> bool:
        """Whether there is a range."""
        if not self._has_range:  # buffers may be written from outside, as averaged models do it
            self._has_range = bool(self.steps > 0)
        return self._has_range

    def scales(self) -> Ends:
        """Scale and zero point that the range asks for, `[groups]`."""
        return scales_from_range(self.spec, self.lo, self.hi)

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Take *lo*, *hi* `[groups]` for the range, as one more step."""
        self.lo.copy_(lo)
        self.hi.copy_(hi)
        self._has_range = True
        self.steps += 1

    def forget(self) -> None:
        """Have seen nothing."""
        self._has_range = False
        self.steps.zero_()

    def count_as(self, calibrated: Observer) -> None:
        """Weigh the range as that of *calibrated*: it is no guess from a few batches, so the averaging constant alone decides from now on."""
        settled = math.ceil(1.0 / self.averaging_constant) if self.averaging_constant else 0
        self.steps.copy_(calibrated.steps.clamp(min=settled))

    def is_same(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether *state_dict* has this very range under *prefix*."""
        ends = [(state_dict.get(f"{prefix}{name}"), own) for name, own in (("lo", self.lo), ("hi", self.hi))]
        return all(isinstance(x, Tensor) and torch.equal(x.to(own), own) for x, own in ends)

    def _agreed(self, lo: Tensor, hi: Tensor) -> Ends:
        """The range that all processes see, in training."""
        if not self.training:
            return lo, hi
        ends = over_processes(torch.stack([-lo, hi]), self.agreement)
        return -ends[0], ends[1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._has_range = bool(self.steps > 0)

    def extra_repr(self) -> str:
        return f"averaging_constant={self.averaging_constant}"


def over_processes(x: Tensor, agreement: Literal["widest", "mean"]) -> Tensor:
    """The largest, or the mean, of *x* over the processes of a distributed job in which it is finite; *x* where there is no job."""
    if not _are_processes():
        return x
    known = x.isfinite()
    if agreement == "widest":
        largest = torch.where(known, x, -torch.inf)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest
    sums = torch.stack([torch.where(known, x, 0.0), known.to(x.dtype)])
    dist.all_reduce(sums, dist.ReduceOp.SUM)
    return sums[0] / sums[1]


def _are_processes() -> bool:
    return dist.is_available() and dist.is_initialized()


def _towards(old: Tensor, new: Tensor, c: Tensor) -> Tensor:
    """*old* + *c* · (*new* - *old*), where both are finite: a batch of NaN says nothing."""
    return torch.where(new.isfinite(), torch.where(old.isfinite(), old + c * (new - old), new), old)


OBSERVERS: Registry[type[Observer]] = Registry("observer")


def make_observer(name: str, spec: QuantSpec, groups: int, options: Mapping[str, Any]) -> Observer:
    """The observer called *name*.

    *raises* `UnknownName` for a name or an option that it does not have, `NumericsError` for an option that is out of range or no number.
    """
    make, known = OBSERVERS.get(name, where="observer"), _options(name)
    for option, value in options.items():
        if option not in known:
            raise UnknownName(f"observer {name!r}", kind="option", name=option, known=sorted(known))
        if _is_number(known[option]) and not _is_number(value):
            raise NumericsError(
                f"observer {name!r}, option {option}",
                expected="a number",
                found=repr(value),
                remedy="Write a number; in YAML 1.0e-2, not 1e-2, which YAML reads as text.",
            )
    return make(spec, groups, **options)


def observer_options(name: str) -> list[str]:
    """The options of the observer called *name*. *raises* `UnknownName`."""
    return sorted(_options(name))


def _options(name: str) -> dict[str, Any]:
    """Option -> its default."""
    own = inspect.signature(OBSERVERS.get(name, where="observer")).parameters.values()
    shared = (
        inspect.signature(Observer).parameters.values() if any(p.kind is p.VAR_KEYWORD for p in own) else ()
    )
    return {p.name: p.default for p in (*own, *shared) if p.kind is p.KEYWORD_ONLY}


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

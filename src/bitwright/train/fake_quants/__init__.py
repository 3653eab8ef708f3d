"""Fake quantizers: a module per quantized value that observes it and rounds it to codes. One file per kind.

`Quantizer` holds what all kinds share: states, shapes, the observer. A kind says where the scale comes from and how the
gradient passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import DataError, ModelError, PlanError
from bitwright.numerics.affine import Limits
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.plan.reads import GIVE_MASKS
from bitwright.registry import Registry
from bitwright.train.checkpoint import EXTRA, as_tensor, check_format, format_of
from bitwright.train.observers import Observer
from bitwright.train.states import FakeQuantState, ModeNotice

__all__ = ["FAKE_QUANTS", "QUANTIZER_NAMES", "Quantizer", "inner"]

#: What a quantizer is called at its place in the model, by what it quantizes.
QUANTIZER_NAMES = {"activation": "activation_post_process", "weight": "weight_fake_quant"}


class Quantizer(nn.Module, ABC):
    """Observes and fake-quantizes one value, according to its `state`.

    *value*: its name, for messages. *shape*: of a weight; of an activation only the rank matters, and only if the spec
    has an axis. Scale and zero point are `[1]` or `[c]`, float32; weights use the codes -qmax … qmax, so that a batch
    normalisation may turn their sign.
    """

    #: Whether `adopt` looks at the data.
    adopts_data = False
    state: FakeQuantState
    zero_point: Tensor

    def __init__(
        self, value: str, spec: QuantSpec, shape: tuple[int, ...], observer: Observer, *, is_weight: bool
    ) -> None:
        super().__init__()
        self.value, self.spec, self.is_weight = value, spec, is_weight
        self.observer = observer
        self.groups = spec.scales(shape)
        d = spec.dtype
        self.qmin, self.qmax = (-d.qmax if is_weight else d.qmin), d.qmax
        #: Whether the weight that passes is multiplied by what batch normalisation would do to it.
        self.is_folded = False
        self.state = FakeQuantState.QAT
        self.notice = ModeNotice()
        self.register_buffer("zero_point", torch.zeros(self.groups))

    # --- what a kind decides ---------------------------------------------------------------------------------

    @abstractmethod
    def step(self) -> Tensor:
        """The scale in use, `[1]` or `[c]`, > 0."""

    @abstractmethod
    def adopt(self, x: Tensor) -> None:
        """Take the observer's range over after it saw *x* `[groups, n]`."""

    @abstractmethod
    def rounded(self, x: Tensor, rectified: bool) -> Tensor:
        """Fake-quantized *x* (of relu(x) if *rectified*), same shape, float32, with the gradient of this kind."""

    @abstractmethod
    def set_scale(self, scale: Tensor) -> None:
        """Use *scale* (as `step` gave it) with the zero point that is set from now on, as far as this kind decides its own."""

    # --- what all share --------------------------------------------------------------------------------------

    def forward(self, x: Tensor, rectified: bool = False) -> Tensor:
        """*x* as `state` says. *rectified*: relu(x) instead, in one with the rounding, which keeps one byte per element."""
        state = self.state
        if self.training and state.wants_eval:
            self.notice.give(state)
        if state is not FakeQuantState.FLOAT and self.observer.lo.dtype.itemsize < 4:
            raise ModelError(
                f"quantizer of {self.value}",
                expected="a range in float32",
                found=f"{self.observer.lo.dtype}, in which no scale is exact",
                remedy="Prepare and calibrate in float32 again, and use torch.autocast instead of .half() or .bfloat16().",
            )
        if state.observes:
            self.observe(x, rectified)
        if not state.quantizes or (x.numel() == 0 and not self.has_range):
            return x.relu() if rectified else x
        if not self.has_range:
            raise PlanError(
                f"quantizer of {self.value}",
                expected="a range before fake quantization",
                found="no calibration",
                remedy="Set FakeQuantState.CALIBRATION, run some batches, then VALIDATION; or load_observer_params.",
            )
        return self.rounded(x.float(), rectified).to(x.dtype)

    @property
    def has_range(self) -> bool:
        """Whether the quantizer knows what to represent."""
        return self.observer.has_range

    @property
    def settled(self) -> bool:
        """Whether training no longer depends on what is observed."""
        return self.has_range and self.observer.averaging_constant == 0.0

    @torch.no_grad()
    def observe(self, x: Tensor, rectified: bool = False) -> None:
        """Follow the range of *x*, or of relu(x). *raises* `DataError` for NaN or infinity while calibrating."""
        if (self.settled and self.state is FakeQuantState.QAT) or _is_recomputed():
            return
        grouped = self.spec.rows(x.detach())
        if self.state is FakeQuantState.CALIBRATION and not _is_finite(grouped):
            raise DataError(
                f"value {self.value}",
                expected="finite numbers to calibrate on",
                found="NaN or infinity",
                remedy=f"Check the calibration data; {GIVE_MASKS}; or set qconfig = None there.",
            )
        if rectified and (self.adopts_data or not self.observer.sees_extremes):
            grouped, rectified = grouped.relu(), False
        self.observer(grouped, rectified)
        self.adopt(grouped)

    def shaped(self, t: Tensor, x: Tensor) -> Tensor:
        """*t* `[groups]`, shaped to broadcast against *x*."""
        return self.spec.broadcast(t, x)

    def code_limits(self, x: Tensor) -> Limits:
        """Smallest and largest code minus the zero point, to clamp steps of *x* with."""
        if self.spec.symmetric:
            return self.qmin, self.qmax
        zero = self.shaped(self.zero_point.round(), x)  # an averaged model has fractions
        return self.qmin - zero, self.qmax - zero

    def range_scales(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point that the observer's range asks for."""
        return self.observer.scales()

    @torch.no_grad()
    def take_range(self) -> None:
        """Use the scale and zero point that the observer's range asks for."""
        scale, zero = self.range_scales()
        self.zero_point.copy_(zero)
        self.set_scale(scale)

    def forget(self) -> None:
        """Have no range, unless it is one that the user fixed."""
        self.observer.forget()

    def qparams(self) -> QParams:
        """The parameters in use. *raises* `PlanError` without a range."""
        if not self.has_range:
            raise PlanError(
                f"quantizer of {self.value}",
                expected="a calibrated model",
                found="an observer that never ran",
                remedy="Run some batches in state CALIBRATION or QAT, or load_observer_params, before converting.",
            )
        scale = tuple(self.step().detach().float().cpu().tolist())
        return QParams(self.spec, scale, tuple(round(z) for z in self.zero_point.cpu().tolist()))

    def get_extra_state(self) -> Tensor:
        """The format, in words: in a checkpoint a scale alone says nothing of it."""
        return as_tensor(format_of(self.spec))

    def set_extra_state(self, state: Any) -> None:
        """*raises* `ModelError` for another format than that of this quantizer."""
        check_format(f"checkpoint, quantizer of {self.value}", self.spec, state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_format(f"checkpoint, quantizer of {self.value}", self.spec, state_dict.get(prefix + EXTRA))
        if self.observer.is_given and not self.observer.is_same(state_dict, f"{prefix}observer."):
            own = self.state_dict(prefix=prefix)
            state_dict.update({key: own[key] for key in own.keys() & state_dict.keys()})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        d = self.spec.dtype
        where = "per tensor" if self.spec.axis is None else f"axis {self.spec.axis}"
        where += f", groups of {self.spec.group}" if self.spec.group else ""
        return f"{d.name}, {where}, state={self.state.name}"


def _is_recomputed() -> bool:
    """Whether a backward pass computes this forward pass again (gradient checkpointing): its values were observed before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _is_finite(x: Tensor) -> bool:
    return x.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(x))


def inner(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """The sum of *a* · *b* over all axes along which *like* has length 1, in the shape of *like*."""
    if like.dim() == 0:
        return torch.dot(a.reshape(-1), b.reshape(-1))
    axes = [i for i in range(a.dim()) if like.shape[i] == 1]
    return (a * b).sum(axes, keepdim=True) if axes else a * b


FAKE_QUANTS: Registry[type[Quantizer]] = Registry("fake quantizer")

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

"""`QConfig`: what a user wishes for an operator, and the setters that spread wishes over a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from bitwright.errors import PlanError
from bitwright.plan.target import Precision

#: Observers whose options are true of one value only.
_OF_ONE_VALUE = ("fixed_scale", "clip")
#: Spellings of integer formats; the field writes both.
_WIDTHS = {f"{prefix}int{bits}": bits for prefix in ("", "q") for bits in (4, 8, 16)}


@dataclass(frozen=True)
class FakeQuantConfig:
    """How a value is fake-quantized.

    *fake_quant*: `fake_quant`, `lsq` or `pact`. *observer*: its name. *dtype*: `int4`, `int8` or `int16` (also `qint8`, …).
    *power_of_two*: whether the scale must be one. *group_size*: weights of a matrix row that share a scale (None: the row).
    *options*: of the observer.
    """

    fake_quant: str = "fake_quant"
    observer: str = "min_max"
    dtype: str = "int8"
    power_of_two: bool = False
    group_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """The width. *raises* `PlanError` for another dtype."""
        if self.dtype not in _WIDTHS:
            raise PlanError(
                "qconfig",
                expected=f"a dtype among {', '.join(_WIDTHS)}",
                found=repr(self.dtype),
                remedy='Write for example activation_qkwargs={"dtype": "int16"}.',
            )
        return _WIDTHS[self.dtype]


@dataclass(frozen=True)
class QConfig:
    """A wish for one operator: for its output (*activation*) and its weights.

    *input*: for what it reads from where nothing is quantized (graph inputs, float operators); None: as the output, but with
    plain min_max where the output's range is one that the user knows.
    """

    activation: FakeQuantConfig = FakeQuantConfig()
    weight: FakeQuantConfig = FakeQuantConfig(options={"averaging_constant": 1.0})
    input: FakeQuantConfig | None = None

    @property
    def of_inputs(self) -> FakeQuantConfig:
        """How what is read from float operators is fake-quantized."""
        if self.input is not None:
            return self.input
        if self.activation.observer not in _OF_ONE_VALUE:
            return self.activation
        return FakeQuantConfig(dtype=self.activation.dtype, power_of_two=self.activation.power_of_two)

    @property
    def precision(self) -> Precision:
        """The precision that is wished for. *raises* `PlanError` for a pair of widths that no target has."""
        widths = (self.activation.bits, self.weight.bits)
        found = _PRECISIONS.get(widths)
        if found is None:
            raise PlanError(
                "qconfig",
                expected="activations of int8 with weights of int4 or int8, or activations of int16 with int8",
                found=f"activations of int{widths[0]} with weights of int{widths[1]}",
                remedy="Choose one of these pairs.",
            )
        return found


_PRECISIONS: dict[tuple[int, int], Precision] = {(8, 8): "int8", (8, 4): "w4a8", (16, 8): "int16"}


def get_default_qconfig(
    activation_fake_quant: str | None = "fake_quant",
    weight_fake_quant: str | None = "fake_quant",
    activation_observer: str | None = "min_max",
    weight_observer: str | None = "min_max",
    activation_qkwargs: Mapping[str, Any] | None = None,
    weight_qkwargs: Mapping[str, Any] | None = None,
) -> QConfig:
    """A wish by the names of fake quantizers and observers.

    The `…_qkwargs` hold `dtype`, `power_of_two`, `group_size` (weights), and options of the observer (`averaging_constant`, `percentile`, …).
    Weights follow their tensor at once (averaging constant 1) unless told otherwise.
    """
    if "group_size" in (activation_qkwargs or {}):
        raise PlanError(
            "activation_qkwargs",
            expected="group_size for weights only",
            found="one for activations",
            remedy="Move it to weight_qkwargs.",
        )
    return QConfig(
        _config(activation_fake_quant, activation_observer, activation_qkwargs or {}),
        _config(weight_fake_quant, weight_observer, {"averaging_constant": 1.0, **(weight_qkwargs or {})}),
    )


def _config(fake_quant: str | None, observer: str | None, options: Mapping[str, Any]) -> FakeQuantConfig:
    rest = dict(options)
    dtype, power_of_two = rest.pop("dtype", "int8"), bool(rest.pop("power_of_two", False))
    group_size = rest.pop("group_size", None)
    return FakeQuantConfig(
        fake_quant or "fake_quant", observer or "min_max", str(dtype), power_of_two, group_size, rest
    )


# --- setters ---------------------------------------------------------------------------------------------------


class Unset:
    """The answer of a setter that has no opinion on an operator."""


UNSET = Unset()


class QconfigSetter(Protocol):
    """Says what an operator should get: a wish, None for float, or `UNSET` to leave it to the next setter."""

    def __call__(self, name: str, kind: str) -> QConfig | Unset | None:
        """The wish for operator *name* of *kind*."""
        ...


@dataclass(frozen=True)
class UniformQconfigSetter:
    """The same wish for every operator."""

    qconfig: QConfig | None
    title: str = "uniform"

    def __call__(self, name: str, kind: str) -> QConfig | None:
        return self.qconfig

    def __str__(self) -> str:
        return self.title


class ModuleNameQconfigSetter:
    """Wishes by name: an operator, or a module and everything in it; the longest name that fits counts, `""` fits all."""

    def __init__(self, qconfigs: Mapping[str, QConfig | None]) -> None:
        self.qconfigs = dict(qconfigs)

    def __call__(self, name: str, kind: str) -> QConfig | Unset | None:
        fitting = [key for key in self.qconfigs if is_inside(name, key)]
        return self.qconfigs[max(fitting, key=len)] if fitting else UNSET

    def closeness(self, name: str) -> int:
        """How closely this setter names operator *name*: the length of what fits."""
        return max((1 + len(key) for key in self.qconfigs if is_inside(name, key)), default=0)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The names of this setter that fit none of the operators *names*."""
        known = list(names)
        return [key for key in self.qconfigs if not any(is_inside(name, key) for name in known)]

    def __str__(self) -> str:
        return "by module name"


def is_inside(name: str, module: str) -> bool:
    """Whether operator *name* is *module* or in it."""
    return not module or name == module or name.startswith(f"{module}.")


@dataclass(frozen=True)
class SensitiveOpsQconfigSetter:
    """*high* for the operators listed, *low* for all others."""

    names: frozenset[str]
    high: QConfig
    low: QConfig
    title: str = "sensitive operators"

    def __call__(self, name: str, kind: str) -> QConfig:
        return self.high if name in self.names else self.low

    def closeness(self, name: str) -> int:
        """How closely this setter names operator *name*: the length of what fits."""
        return 1 + len(name) if name in self.names else 0

    def __str__(self) -> str:
        return self.title


def with_dtype(qconfig: QConfig, *, activation: str = "int8", weight: str = "int8") -> QConfig:
    """*qconfig* with other widths."""
    return replace(
        qconfig,
        activation=replace(qconfig.activation, dtype=activation),
        weight=replace(qconfig.weight, dtype=weight),
    )


def as_setters(setter: QconfigSetter | Sequence[QconfigSetter] | None) -> tuple[QconfigSetter, ...]:
    """One setter, several (highest priority first) or none, as a tuple. *raises* `PlanError` for something else."""
    if setter is None:
        return ()
    setters = tuple(setter) if isinstance(setter, Sequence) else (setter,)
    for one in setters:
        if not callable(one):
            raise PlanError(
                "qconfig_setter",
                expected="a setter, or a list of setters",
                found=type(one).__name__,
                remedy='For one qconfig everywhere write ModuleNameQconfigSetter({"": qconfig}).',
            )
    return setters

"""`Target`: what a chip or engine allows, read from YAML. Data, not code."""

from __future__ import annotations

from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from bitwright.errors import TargetError, UnknownName
from bitwright.numerics.dtype import INT4, INT8, INT16, INT32, UINT8, UINT16, DType
from bitwright.numerics.rounding import Rounding
from bitwright.numerics.spec import QuantSpec

#: `w4a8`: int4 weights, int8 activations.
Precision = Literal["w4a8", "int8", "int16", "float"]
#: Narrow to wide.
PRECISIONS: tuple[Precision, ...] = ("w4a8", "int8", "int16", "float")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ActivationRule(_Strict):
    """How activations are quantized. *dtype*: `signed`, `unsigned`, or `auto` = unsigned where the minimum is >= 0."""

    dtype: Literal["signed", "unsigned", "auto"] = "signed"
    symmetric: bool = True
    power_of_two: bool = False


class WeightRule(_Strict):
    """How weights are quantized (always signed and symmetric). *int4*: also with 4 bits, at the same granularity. *grouped*: matrices
    may have a scale for each group of weights within a channel.
    """

    granularity: Literal["tensor", "channel"] = "channel"
    int4: bool = False
    grouped: bool = False


class RescaleRule(_Strict):
    """How an accumulator becomes an output code: exact (float), multiplier and shift, or a shift alone."""

    form: Literal["float", "multiplier_shift", "shift"] = "float"
    multiplier_bits: int = 31


class FuseRule(_Strict):
    """Values that stay in the accumulator: those of *producers* read only by one of *consumers*.

    *consumers*: operator kind -> `always`, `constant` (its other operand is constant) or `scalar` (… one number).
    """

    producers: tuple[str, ...]
    consumers: dict[str, Literal["always", "constant", "scalar"]]


class Estimate(_Strict):
    """Figures for estimates of time. *tops*: precision -> 10^12 operations a second, a multiply-accumulate being two; int8 and float
    are required, int16 counts as half of int8, w4a8 as int8, where not given. *bandwidth_gb_s*: 10^9 bytes a second to memory,
    None if not known. An operator takes the longer of computing and moving what it reads and writes.
    """

    tops: dict[Precision, PositiveFloat]
    bandwidth_gb_s: PositiveFloat | None = None

    @model_validator(mode="after")
    def _has_rates(self) -> Estimate:
        if not {"int8", "float"} <= self.tops.keys():
            raise ValueError("rates for int8 and float")
        return self


class Target(_Strict):
    """A chip or engine. *operators*: precisions of the kinds that differ from *default*; the first is preferred. *tables*: functions are
    looked up in tables, and composite operators (softmax, norms, …) computed part by part, with int16 inside.
    """

    name: str
    description: str = ""
    #: Where the facts come from; required where the target only approximates a chip.
    sources: tuple[str, ...] = ()
    approximate: bool = False
    rounding: Rounding = Rounding.HALF_EVEN
    activation: ActivationRule = ActivationRule()
    weight: WeightRule = WeightRule()
    bias_bits: Literal[16, 32] = 32
    rescale: RescaleRule = RescaleRule()
    default: tuple[Precision, ...] = ("int8", "float")
    operators: dict[str, tuple[Precision, ...]] = Field(default_factory=dict)
    fuse: tuple[FuseRule, ...] = ()
    tables: bool = False
    estimate: Estimate | None = None

    def allowed(self, kind: str) -> tuple[Precision, ...]:
        """The precisions that operators of *kind* may have."""
        return self.operators.get(kind, self.default)

    @cached_property
    def fusable(self) -> dict[tuple[str, str], str]:
        """(producer kind, consumer kind) -> condition on the consumer's other operand."""
        return {
            (p, c): how for rule in self.fuse for p in rule.producers for c, how in rule.consumers.items()
        }

    def activation_spec(self, precision: Precision, *, nonnegative: bool) -> QuantSpec:
        """The spec of an activation of an operator at *precision* (`int8` or `int16`)."""
        rule = self.activation
        unsigned = rule.dtype == "unsigned" or (rule.dtype == "auto" and nonnegative)
        dtype: DType = {
            ("int8", False): INT8,
            ("int8", True): UINT8,
            ("int16", False): INT16,
            ("int16", True): UINT16,
        }["int16" if precision == "int16" else "int8", unsigned]
        return QuantSpec(dtype, rule.symmetric, None, self.rounding, rule.power_of_two)

    def weight_spec(self, axis: int | None, precision: Precision = "int8") -> QuantSpec:
        """The spec of a weight whose output channels lie on *axis*, of operators at *precision*. Rounding is half-even: weights are
        rounded offline."""
        dtype = INT4 if precision == "w4a8" else INT8
        return QuantSpec(dtype, True, axis if self.weight.granularity == "channel" else None)

    def bias_spec(self, axis: int | None) -> QuantSpec:
        """The spec of a bias that joins an accumulator."""
        return QuantSpec(INT16 if self.bias_bits == 16 else INT32, True, axis)


def target_names() -> list[str]:
    """Names of the targets that come with Bitwright."""
    folder = files("bitwright.plan") / "targets"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def is_target_file(name: str | Path) -> bool:
    """Whether *name* stands for a YAML file, not for a target that comes with Bitwright."""
    return Path(name).suffix in (".yaml", ".yml")


def load_target(name: str | Path) -> Target:
    """The target called *name*, or read from the YAML file *name*.

    *raises* `UnknownName` for an unknown name, `TargetError` for a file that is missing or wrong (saying which field).
    """
    path = Path(name)
    if is_target_file(name):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise TargetError(
                str(path), expected="a readable target file", found=str(e), remedy="Check the path."
            ) from e
        return _parse(text, str(path))
    if str(name) not in target_names():
        raise UnknownName("--target", kind="target", name=str(name), known=target_names())
    text = (files("bitwright.plan") / "targets" / f"{name}.yaml").read_text(encoding="utf-8")
    return _parse(text, f"{name}.yaml")


def _parse(text: str, where: str) -> Target:
    try:
        data = yaml.safe_load(text)
        return Target.model_validate(data)
    except yaml.YAMLError as e:
        found = " ".join(str(e).split())
        raise TargetError(where, expected="valid YAML", found=found, remedy="Mend the file.") from e
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(str(p) for p in first["loc"]) or "the file"
        raise TargetError(
            f"{where}, {field}",
            expected=first["msg"],
            found=repr(first.get("input")),
            remedy="See docs/targets.md for every field.",
        ) from e

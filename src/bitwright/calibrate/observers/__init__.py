"""Threshold methods: from what was seen of a value to the range worth representing. One file per method."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, Protocol

import numpy as np

from bitwright.calibrate.statistics import ValueStatistics
from bitwright.errors import NumericsError
from bitwright.numerics.spec import QuantSpec
from bitwright.registry import Registry

# Without it, `import *` would replace the built-in `max` by the file of that name.
__all__ = ["METHODS", "Method", "Scaled", "method_name", "parse_method"]


class Method(Protocol):
    """A frozen dataclass with at most one field (its parameter), registered under the name of its file."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def range(self, statistics: ValueStatistics, spec: QuantSpec) -> tuple[float, float]:
        """The range (lo, hi) of *statistics* that *spec* should represent, real units, lo <= hi.

        *statistics*: of a value of which at least one element was seen. Of a symmetric *spec* the range is (-T, T), or
        (0, T) for unsigned codes, with T <= max |x|; of an asymmetric one it lies within the exact extremes, widened
        to 0. All zeros give (0, 0).
        """
        ...


METHODS: Registry[type[Method]] = Registry("threshold method")


@dataclass(frozen=True)
class Scaled:
    """The range of *method* times *factor* (> 0), within the exact extremes: what a joint search of thresholds tries."""

    method: Method
    factor: float

    def range(self, statistics: ValueStatistics, spec: QuantSpec) -> tuple[float, float]:
        low, high = self.method.range(statistics, spec)
        lowest, highest = np.clip([statistics.lo, statistics.hi], [-np.inf, 0.0], [0.0, np.inf])
        if spec.symmetric:
            lowest, highest = np.array([-1.0, 1.0]) * np.maximum(-lowest, highest)
        return float(np.maximum(low * self.factor, lowest)), float(np.minimum(high * self.factor, highest))


_FACTOR = re.compile(r"(.+?)\s*\*\s*([0-9.]+)")
_SPELLING = re.compile(r"\s*([a-z_]+?)\s*(?:\(\s*([^()]*?)\s*\)|(\d{2,}))?\s*")


def parse_method(text: str) -> Method:
    """The method spelled *text*: `kl`, `percentile(99.9)`, `aciq(gauss)`, `kl*0.9`; `percentile9999` means percentile(99.99).

    *raises* `UnknownName` for an unknown method, `NumericsError` for a parameter that it does not take.
    """
    scaled = _FACTOR.fullmatch(text.strip())
    if scaled:
        return Scaled(parse_method(scaled[1]), _factor(text, scaled[2]))
    match = _SPELLING.fullmatch(text)
    name, argument, digits = match.groups() if match else (text, None, None)
    method = METHODS.get(name, where="threshold method")
    if digits is not None:
        argument = f"{digits[:2]}.{digits[2:]}"
    if argument is None:
        return method()
    parameters = fields(method)
    try:
        (parameter,) = parameters
        return method(float(argument) if isinstance(parameter.default, float) else argument)  # type: ignore[call-arg]
    except ValueError as error:
        raise NumericsError(
            f"threshold method {text!r}",
            expected=f"{name}({parameters[0].name})" if parameters else f"{name}, which has no parameter",
            found=f"the parameter {argument!r}",
            remedy="Correct the parameter, or leave it out.",
        ) from error


def _factor(text: str, number: str) -> float:
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if factor <= 0:
        raise NumericsError(
            f"threshold method {text!r}",
            expected="a factor above 0 behind the *",
            found=repr(number),
            remedy="Example: kl*0.9.",
        )
    return factor


def method_name(method: Method) -> str:
    """How *method* is spelled: the inverse of `parse_method`."""
    if isinstance(method, Scaled):
        return f"{method_name(method.method)}*{method.factor:g}"
    name = next(name for name in METHODS if METHODS.find(name) is type(method))
    return name + "".join(f"({getattr(method, parameter.name)})" for parameter in fields(method))


# A file in this folder registers itself: nothing else has to name it.
for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

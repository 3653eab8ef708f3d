"""How operators are recognised: one registry of ATen spellings, one of ONNX spellings.

A *builder* looks at one call and returns the operator with the inputs it reads, or None (ATen: the call stays opaque), or
raises `Unsupported` (ONNX: the call is listed with this reason).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright.graph.op import Op
from bitwright.registry import Registry


class Unsupported(Exception):
    """Raised by an ONNX builder for a form of the operator that cannot be executed; the text is the reason."""


@dataclass(frozen=True)
class Built:
    """An operator and what it reads: nodes (ATen) or value names (ONNX), None for absent inputs, or Python numbers."""

    op: Op
    inputs: tuple[Any, ...]


@dataclass(frozen=True)
class AtenCall:
    """One ATen call of an exported program. *args*: by schema name, defaults filled in, tensors as fx nodes."""

    target: str
    args: Mapping[str, Any]
    #: Shapes with None for dynamic dimensions; keys are fx nodes.
    shape: Callable[[Any], tuple[int | None, ...]]
    #: Output shape, None for dynamic dimensions; for several outputs, that of the first.
    output_shape: tuple[int | None, ...]
    #: The innermost author module if this call is all that the module does (its leaf), else None.
    leaf: Any = None

    def __getitem__(self, name: str) -> Any:
        return self.args[name]


@dataclass(frozen=True)
class OnnxCall:
    """One ONNX node. *inputs*: value names, "" where absent; *attributes*: decoded to Python values."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int
    #: The contents of a constant value, or None.
    array: Callable[[str], npt.NDArray[Any] | None]
    #: The shape of a value, None for dynamic dimensions; None if unknown.
    shape: Callable[[str], tuple[int | None, ...] | None]

    def input(self, index: int) -> str | None:
        """The name of input *index*, None if absent."""
        return self.inputs[index] or None if index < len(self.inputs) else None

    def constant(self, index: int) -> npt.NDArray[Any] | None:
        """The contents of input *index* if it is present and constant, else None."""
        name = self.input(index)
        return None if name is None else self.array(name)

    def required_constant(self, index: int, what: str) -> npt.NDArray[Any]:
        """As `constant`. *raises* `Unsupported` if it is not constant."""
        found = self.constant(index)
        if found is None:
            raise Unsupported(f"{what} must be constant")
        return found

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute or its default."""
        return self.attributes.get(name, default)


AtenBuilder = Callable[[AtenCall], "Built | None"]
OnnxBuilder = Callable[[OnnxCall], Built]

#: Keys are overload-packet names without the namespace: `conv2d`, `add`, `relu_`.
ATEN: Registry[AtenBuilder] = Registry("ATen operator")
#: Keys are op types of the default domain.
ONNX: Registry[OnnxBuilder] = Registry("ONNX operator")


def ints(values: npt.NDArray[Any] | Sequence[int]) -> tuple[int, ...]:
    """A tuple of Python integers."""
    return tuple(int(v) for v in np.asarray(values).reshape(-1))

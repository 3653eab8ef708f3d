"""`Op`: everything the rest of Bitwright asks an operator.

An operator is an `nn.Module` called from exactly one node of a `Graph`. Its tensors (activations, weights, biases,
constants) all arrive as arguments of `forward`, because all of them are *values* that a plan may quantize; the module
that stands at the author's path only stores the parameters under their original names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Protocol

import numpy.typing as npt
from torch import Tensor, nn

from bitwright.numerics.table_settings import TableSettings

Shape = tuple[int, ...]


class Role(StrEnum):
    """What an input of an operator is to quantization."""

    ACTIVATION = "activation"  # quantized when the operator is quantized
    WEIGHT = "weight"  # quantized with the weight spec if it is a constant, else like an activation
    BIAS = "bias"  # kept in the accumulator's format (input scale x weight scale)
    PARAMETER = "parameter"  # stays float (batch-norm statistics, norm gains, …)
    INDEX = "index"  # not a real number: shapes, indices, masks


class Emitter(Protocol):
    """What an operator may ask of the ONNX writer while it writes itself (opset 21 or later)."""

    opset: int

    def node(
        self, op_type: str, inputs: Sequence[str | None], outputs: Sequence[str], **attributes: Any
    ) -> None:
        """Append a node. *inputs*: value names, None or "" for an absent optional one."""

    def constant(self, array: npt.NDArray[Any], hint: str) -> str:
        """Register a constant and return its name, derived from the operator's name and *hint*."""

    def temporary(self, hint: str) -> str:
        """A fresh inner value name, derived from the operator's name and *hint*."""

    def shape(self, value: str) -> Shape | None:
        """The shape seen at capture, or None."""

    def array(self, value: str) -> npt.NDArray[Any] | None:
        """The contents of a constant value (weight, bias), or None if *value* is not constant."""


#: A float function of tensors: what most operators are.
TensorFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Composite:
    """The operator that a part was taken from, by name and kind. *is_inner*: the part makes one of its inner values."""

    name: str
    kind: str
    is_inner: bool


class Op(nn.Module):
    """One operator. Subclasses set `kind`, implement `forward`, and override what differs from the defaults."""

    kind: ClassVar[str] = "Op"
    #: Roles of the inputs in order; the last one repeats for further inputs.
    roles: ClassVar[tuple[Role, ...]] = (Role.ACTIVATION,)
    #: True if output codes are input codes (reshape, transpose, max pool, …): the output shares input 0's parameters.
    passthrough: ClassVar[bool] = False
    #: Axis of the output along which the bias is added, if the operator does nothing else with its bias.
    bias_axis: ClassVar[int | None] = None
    #: What the operator is a part of, if a rewrite took one apart.
    composite: Composite | None = None
    #: How the operator's look-up table is made, if it has one and not the default.
    table_settings: TableSettings | None = None

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.outputs: tuple[str, ...] = ()

    def role(self, index: int) -> Role:
        """The role of input *index*."""
        return self.roles[min(index, len(self.roles) - 1)]

    def weight_axis(self, index: int, rank: int) -> int | None:
        """Output-channel axis of the weight at input *index* of a given *rank*; None if it has none."""
        return None

    def macs(self, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int:
        """Multiply-accumulates for these shapes; 0 for operators that do none."""
        return 0

    @property
    def author_kind(self) -> str:
        """What the author wrote: the kind of the operator that this is a part of, else its own."""
        return self.kind if self.composite is None else self.composite.kind

    @property
    def is_inner(self) -> bool:
        """Whether the operator makes an inner value of a composite one: int16 on every target."""
        return self.composite is not None and self.composite.is_inner

    def table_function(self) -> TensorFunction | None:
        """The function, float64 to float64 element by element, that integer hardware looks up in a table; None where it computes."""
        return None

    def output_range(self) -> tuple[float, float] | None:
        """Bounds that the output can never leave (sigmoid: 0, 1), or None."""
        return None

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        """Write the operator as standard ONNX nodes whose results are `self.outputs`."""
        raise NotImplementedError(self.kind)

    def describe(self) -> str:
        """Attributes for `print(graph)`, e.g. `stride=2`."""
        return ""

    def extra_repr(self) -> str:
        return self.describe()

    def _get_name(self) -> str:
        return self.kind

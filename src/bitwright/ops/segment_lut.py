"""A function of the user's that the chip looks up in a table: `bitwright.nn.SegmentLUT` as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bitwright.graph.op import Emitter, Op, TensorFunction
from bitwright.numerics.lut import TableSettings, usable_range
from bitwright.numerics.spec import QParams
from bitwright.ops.elementwise import seen
from bitwright.ops.opaque import Opaque, Seen, Slot, what_was_seen
from bitwright.ops.spelling import ATEN, AtenCall, Built


@dataclass(frozen=True, eq=False)
class TableDefinition:
    """A *function* of one number, element by element, and the *settings* of its table. *inverse*: of a falling function, or None."""

    function: TensorFunction
    settings: TableSettings
    inverse: TensorFunction | None = None

    def settings_for(self, q_in: QParams, q_out: QParams, where: str) -> TableSettings:
        """The settings, with the range narrowed to where the output does not saturate, if there is an inverse."""
        if self.inverse is None:
            return self.settings
        reach = usable_range(
            self.function, self.inverse, q_in, q_out, input_range=self.settings.input_range, where=where
        )
        return replace(self.settings, input_range=reach)


#: Definitions of modules that are being captured, by the key that stands in the exported graph.
CAPTURED: WeakValueDictionary[str, TableDefinition] = WeakValueDictionary()


@torch.library.custom_op("bitwright::segment_lut", mutates_args=())
def segment_lut(x: Tensor, key: str) -> Tensor:
    """The function of the definition *key*: one operator in the graph that torch exports."""
    return CAPTURED[key].function(x).clone()


@segment_lut.register_fake
def _shape(x: Tensor, key: str) -> Tensor:
    return torch.empty_like(x)


class SegmentLUT(Op):
    """The function of *definition*. *given*: what export saw of the input."""

    kind = "SegmentLUT"

    def __init__(self, definition: TableDefinition, given: Seen) -> None:
        super().__init__()
        self.definition, self.given = definition, given

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.definition.function(x)
        return result

    def table_function(self) -> TensorFunction | None:
        return self.definition.function

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        call = Opaque(self.definition.function, (Slot(0),), {}, seen=[self.given])
        call.name, call.outputs = self.name, self.outputs
        call.to_onnx(emit, inputs)

    def describe(self) -> str:
        return getattr(self.definition.function, "__name__", type(self.definition.function).__name__)


@ATEN.register("segment_lut")
def _segment_lut_from_aten(call: AtenCall) -> Built:
    return Built(SegmentLUT(CAPTURED[call["key"]], what_was_seen(seen(call["x"]))), (call["x"],))

"""Dropout: alive in training, nothing in evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from bitwright.graph.op import Emitter, Op
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported

_FUNCTIONS = {
    "dropout": F.dropout,
    "feature_dropout": F.dropout2d,  # whole channels, any rank: torch maps dropout1d/2d/3d to one function
    "alpha_dropout": F.alpha_dropout,
}


class Dropout(Op):
    """Zeroes elements (or channels, see *form*) with probability *p* and scales the rest by 1 / (1 - p), in training."""

    kind = "Dropout"
    passthrough = True

    def __init__(self, p: float, *, form: str = "dropout") -> None:
        super().__init__()
        self.p, self.form = p, form

    def forward(self, x: Tensor) -> Tensor:
        return _FUNCTIONS[self.form](x, self.p, self.training) if self.training else x

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("Identity", inputs, self.outputs)

    def describe(self) -> str:
        return f"p={self.p}"


@ATEN.register("dropout", "feature_dropout", "alpha_dropout")
def _dropout_from_aten(call: AtenCall) -> Built | None:
    if call["train"]:  # dropout that the author wants in evaluation too
        return None
    return Built(Dropout(call["p"], form=call.target), (call["input"],))


@ONNX.register("Dropout")
def _dropout_from_onnx(call: OnnxCall) -> Built:
    if len(call.outputs) > 1 and call.outputs[1]:
        raise Unsupported("the mask output is not computed")
    training = call.constant(2)
    if training is not None and bool(training):
        raise Unsupported("dropout in inference (training_mode = true) is random")
    ratio = call.constant(1)
    return Built(
        Dropout(float(ratio) if ratio is not None else call.attribute("ratio", 0.5)), (call.inputs[0],)
    )

"""PReLU: a rectifier with learned slopes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall


class PRelu(Op):
    """x where x >= 0, else slope * x. *channelwise*: the slope is `[c]` or `[1]` along axis 1 (torch), else broadcast (ONNX)."""

    kind = "PRelu"
    roles = (Role.ACTIVATION, Role.PARAMETER)

    def __init__(self, *, channelwise: bool) -> None:
        super().__init__()
        self.channelwise = channelwise

    def forward(self, x: Tensor, slope: Tensor) -> Tensor:
        return F.prelu(x, slope) if self.channelwise else torch.where(x >= 0, x, slope * x)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        x, slope = inputs
        assert x is not None
        assert slope is not None
        shape, count = emit.shape(x), emit.shape(slope)
        if self.channelwise and shape is not None and len(shape) > 2 and count != (1,):
            spread = emit.temporary("slope")
            axes = emit.constant(np.arange(1, len(shape) - 1, dtype=np.int64), "axes")
            emit.node("Unsqueeze", [slope, axes], [spread])
            slope = spread
        emit.node("PRelu", [x, slope], self.outputs)


@ATEN.register("prelu")
def _prelu_from_aten(call: AtenCall) -> Built:
    return Built(PRelu(channelwise=True), (call["self"], call["weight"]))


@ONNX.register("PRelu")
def _prelu_from_onnx(call: OnnxCall) -> Built:
    return Built(PRelu(channelwise=False), call.inputs[:2])

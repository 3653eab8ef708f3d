"""Embedding: rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.spelling import ATEN, AtenCall, Built


class Embedding(Op):
    """Inputs: table `[rows, width]`, integer indices `[...]`; output `[..., width]`.

    The table is a weight without output channels: one scale serves all rows, because any row may be read.
    """

    kind = "Embedding"
    roles = (Role.WEIGHT, Role.INDEX)

    def forward(self, table: Tensor, indices: Tensor) -> Tensor:
        return F.embedding(indices, table)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("Gather", inputs, self.outputs, axis=0)


@ATEN.register("embedding")
def _embedding_from_aten(call: AtenCall) -> Built:
    return Built(Embedding(), (call["weight"], call["indices"]))

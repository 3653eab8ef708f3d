"""Attention as one operator: what capture sees before `rewrite.decompose_attention` takes it apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from bitwright.graph.op import Emitter, Op, Role, Shape
from bitwright.ops.elementwise import seen
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported


class Attention(Op):
    """softmax(q k' * scale + mask) v. Inputs: q `[..., l, e]`, k `[..., s, e]`, v `[..., s, d]`, mask or None.

    *scale*: None means 1 / sqrt(e). *is_boolean*: the mask says which keys may be seen, instead of being added.
    *dropout*: the probability with which a softmax weight is zeroed in training.
    """

    kind = "Attention"
    roles = (Role.ACTIVATION, Role.ACTIVATION, Role.ACTIVATION, Role.INDEX)

    def __init__(
        self, *, scale: float | None, is_causal: bool, is_boolean: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.scale, self.is_causal, self.is_boolean = scale, is_causal, is_boolean
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=self.is_causal, scale=self.scale)

    def factor(self, width: int) -> float:
        """The scale for heads of *width* elements."""
        return 1.0 / math.sqrt(width) if self.scale is None else self.scale

    def macs(self, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int:
        q, k, v = inputs[:3]
        if q is None or k is None or v is None:
            return 0
        return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        q, k, v, mask = (*inputs, None)[:4]
        assert q is not None
        assert k is not None
        shape, keys = emit.shape(q), emit.shape(k)
        assert shape is not None
        assert keys is not None
        turned, product, x = (emit.temporary(h) for h in ("k_transposed", "product", "scaled"))
        rank = len(keys)
        emit.node("Transpose", [k], [turned], perm=[*range(rank - 2), rank - 1, rank - 2])
        emit.node("MatMul", [q, turned], [product])
        scale = emit.constant(np.asarray(self.factor(shape[-1]), dtype=np.float32), "scale")
        emit.node("Mul", [product, scale], [x])
        if self.is_causal:
            mask = emit.constant(np.tril(np.ones((shape[-2], keys[-2]), dtype=np.bool_)), "causal")
        if mask is not None:
            masked = emit.temporary("masked")
            if self.is_causal or self.is_boolean:
                lowest = emit.constant(np.asarray(-np.inf, dtype=np.float32), "lowest")
                emit.node("Where", [mask, x, lowest], [masked])
            else:
                emit.node("Add", [x, mask], [masked])
            x = masked
        weights = emit.temporary("weights")
        emit.node("Softmax", [x], [weights], axis=-1)
        emit.node("MatMul", [weights, v], self.outputs)

    def describe(self) -> str:
        return f"scale={self.scale}, causal={self.is_causal}"


@ATEN.register("scaled_dot_product_attention")
def _attention_from_aten(call: AtenCall) -> Built | None:
    if call["enable_gqa"]:
        return None
    mask = call["attn_mask"]
    op = Attention(
        scale=call["scale"],
        is_causal=call["is_causal"],
        is_boolean=mask is not None and not seen(mask).dtype.is_floating_point,
        dropout=call["dropout_p"],
    )
    return Built(op, (call["query"], call["key"], call["value"], mask))


@ONNX.register("Attention")
def _attention_from_onnx(call: OnnxCall) -> Built:
    shapes = [call.shape(call.inputs[i]) for i in range(3)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        raise Unsupported("only the form with inputs [batch, heads, tokens, width] is executed")
    if any(call.inputs[4:]) or any(call.outputs[1:]) or call.attribute("softcap", 0.0):
        raise Unsupported("past keys, further outputs and softcap are not executed")
    if shapes[0][1] != shapes[1][1]:  # type: ignore[index]
        raise Unsupported("query and key must have the same number of heads")
    mask = call.constant(3)
    if call.input(3) is not None and mask is None:
        raise Unsupported("the mask must be constant")
    op = Attention(
        scale=call.attributes.get("scale"),
        is_causal=bool(call.attribute("is_causal", 0)),
        is_boolean=mask is not None and mask.dtype == np.bool_,
    )
    return Built(op, (*call.inputs[:3], call.input(3)))

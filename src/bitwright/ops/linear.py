"""Fully connected layers and matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.graph.op import Emitter, Op, Role, Shape
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall


class Linear(Op):
    """x `[..., i]` times weight, plus optional bias `[o]`. *transposed*: the weight is stored `[i, o]` instead of `[o, i]`."""

    kind = "Linear"
    roles = (Role.ACTIVATION, Role.WEIGHT, Role.BIAS)
    bias_axis = -1

    def __init__(self, *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight.t() if self.transposed else weight, bias)

    def weight_axis(self, index: int, rank: int) -> int | None:
        return (1 if self.transposed else 0) if index == 1 else None

    def macs(self, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int:
        x, out = inputs[0], outputs[0]
        return 0 if x is None or out is None else math.prod(out) * x[-1]

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        x, weight, bias = (*inputs, None)[:3]
        assert x is not None
        assert weight is not None
        shape = emit.shape(x)
        if shape is not None and len(shape) == 2:
            emit.node("Gemm", [x, weight, bias], self.outputs, transB=0 if self.transposed else 1)
            return
        if not self.transposed:
            flipped = emit.temporary("weight_transposed")
            emit.node("Transpose", [weight], [flipped], perm=[1, 0])
            weight = flipped
        product = self.outputs[0] if bias is None else emit.temporary("product")
        emit.node("MatMul", [x, weight], [product])
        if bias is not None:
            emit.node("Add", [product, bias], self.outputs)

    def describe(self) -> str:
        return "transposed" if self.transposed else ""


class MatMul(Op):
    """Matrix product `[..., m, k] x [..., k, n]`; the second operand counts as a weight where it is constant."""

    kind = "MatMul"
    roles = (Role.ACTIVATION, Role.WEIGHT)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)

    def weight_axis(self, index: int, rank: int) -> int | None:
        return rank - 1 if index == 1 and rank >= 2 else None

    def macs(self, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int:
        a, out = inputs[0], outputs[0]
        return 0 if a is None or out is None else math.prod(out) * a[-1]

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("MatMul", inputs, self.outputs)


@ATEN.register("linear")
def _linear_from_aten(call: AtenCall) -> Built:
    return Built(Linear(), (call["input"], call["weight"], call["bias"]))


@ATEN.register("addmm")
def _addmm_from_aten(call: AtenCall) -> Built | None:
    if call["beta"] != 1 or call["alpha"] != 1 or len(call.shape(call["self"])) != 1:
        return None
    return Built(Linear(transposed=True), (call["mat1"], call["mat2"], call["self"]))


@ATEN.register("matmul", "mm", "bmm")
def _matmul_from_aten(call: AtenCall) -> Built:
    second = "other" if "other" in call.args else "mat2"
    return Built(MatMul(), (call["self"], call[second]))


@ONNX.register("MatMul")
def _matmul_from_onnx(call: OnnxCall) -> Built:
    return Built(MatMul(), (call.inputs[0], call.inputs[1]))


class Gemm(Op):
    """alpha * A' B' + beta * C, for the forms that are not a plain `Linear`."""

    kind = "Gemm"
    roles = (Role.ACTIVATION, Role.WEIGHT, Role.PARAMETER)

    def __init__(self, *, alpha: float, beta: float, trans_a: bool, trans_b: bool) -> None:
        super().__init__()
        self.alpha, self.beta, self.trans_a, self.trans_b = alpha, beta, trans_a, trans_b

    def forward(self, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        y = torch.matmul(a.t() if self.trans_a else a, b.t() if self.trans_b else b) * self.alpha
        return y if c is None else y + self.beta * c

    def weight_axis(self, index: int, rank: int) -> int | None:
        return (0 if self.trans_b else 1) if index == 1 else None

    def macs(self, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int:
        a, out = inputs[0], outputs[0]
        return 0 if a is None or out is None else math.prod(out) * a[0 if self.trans_a else 1]

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node(
            "Gemm",
            inputs,
            self.outputs,
            alpha=self.alpha,
            beta=self.beta,
            transA=int(self.trans_a),
            transB=int(self.trans_b),
        )


@ONNX.register("Gemm")
def _gemm_from_onnx(call: OnnxCall) -> Built:
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    trans_a, trans_b = bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))
    inputs = (call.input(0), call.input(1), call.input(2))
    c = call.constant(2)
    plain_bias = inputs[2] is None or (c is not None and np.ndim(c) == 1)
    if alpha == 1.0 and beta == 1.0 and not trans_a and plain_bias:
        return Built(Linear(transposed=not trans_b), inputs)
    return Built(Gemm(alpha=alpha, beta=beta, trans_a=trans_a, trans_b=trans_b), inputs)

"""Normalisation: over channels, groups, instances or the last axes; over the batch, see `batchnorm.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.elementwise import seen
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported

_NORM_ROLES = (Role.ACTIVATION, Role.PARAMETER, Role.PARAMETER)


def refuse_statistics(call: OnnxCall) -> None:
    """*raises* `Unsupported` if the statistics of a normalisation are read."""
    if any(call.outputs[1:]):
        raise Unsupported("outputs besides the normalised one are not computed")


def or_constant(emit: Emitter, name: str | None, like: tuple[int, ...], value: float, hint: str) -> str:
    """The value *name*, or a constant of shape *like* full of *value* where it is absent."""
    return name or emit.constant(np.full(like, value, dtype=np.float32), hint)


class LayerNorm(Op):
    """Mean 0, variance 1 over the last *rank* axes, then weight and bias. Inputs: x, weight or None, bias or None."""

    kind = "LayerNorm"
    roles = _NORM_ROLES

    def __init__(self, *, rank: int, epsilon: float) -> None:
        super().__init__()
        self.rank, self.epsilon = rank, epsilon

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[-self.rank :]
        if all(p is None or p.shape == shape for p in (weight, bias)):
            return F.layer_norm(x, shape, weight, bias, self.epsilon)
        y = F.layer_norm(x, shape, None, None, self.epsilon)  # ONNX lets the parameters broadcast
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        x, weight, bias = (*inputs, None, None)[:3]
        assert x is not None
        scale = or_constant(emit, weight, tuple((emit.shape(x) or ())[-self.rank :]), 1.0, "ones")
        emit.node("LayerNormalization", [x, scale, bias], self.outputs, axis=-self.rank, epsilon=self.epsilon)

    def describe(self) -> str:
        return f"rank={self.rank}, epsilon={self.epsilon}"


@ATEN.register("layer_norm")
def _layer_norm_from_aten(call: AtenCall) -> Built:
    op = LayerNorm(rank=len(call["normalized_shape"]), epsilon=call["eps"])
    return Built(op, (call["input"], call["weight"], call["bias"]))


def _rank_from_axis(call: OnnxCall) -> int:
    axis, shape = int(call.attribute("axis", -1)), call.shape(call.inputs[0])
    if axis < 0:
        return -axis
    if shape is None:
        raise Unsupported("the axis is counted from the front, but the rank is unknown")
    return len(shape) - axis


@ONNX.register("LayerNormalization")
def _layer_norm_from_onnx(call: OnnxCall) -> Built:
    refuse_statistics(call)
    op = LayerNorm(rank=_rank_from_axis(call), epsilon=call.attribute("epsilon", 1e-5))
    return Built(op, (call.input(0), call.input(1), call.input(2)))


class RMSNorm(Op):
    """x / sqrt(mean(x^2) + epsilon) over the last *rank* axes, times weight. Inputs: x, weight or None."""

    kind = "RMSNorm"
    roles = (Role.ACTIVATION, Role.PARAMETER)

    def __init__(self, *, rank: int, epsilon: float) -> None:
        super().__init__()
        self.rank, self.epsilon = rank, epsilon

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        axes = list(range(-self.rank, 0))
        y = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + self.epsilon)
        return y if weight is None else y * weight

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        x, weight = (*inputs, None)[:2]
        axes = emit.constant(np.arange(-self.rank, 0, dtype=np.int64), "axes")
        epsilon = emit.constant(np.asarray(self.epsilon, dtype=np.float32), "epsilon")
        square, mean, shifted, root = (emit.temporary(h) for h in ("square", "mean", "shifted", "root"))
        emit.node("Mul", [x, x], [square])
        emit.node("ReduceMean", [square, axes], [mean], keepdims=1)
        emit.node("Add", [mean, epsilon], [shifted])
        emit.node("Sqrt", [shifted], [root])
        if weight is None:
            emit.node("Div", [x, root], self.outputs)
            return
        normal = emit.temporary("normal")
        emit.node("Div", [x, root], [normal])
        emit.node("Mul", [normal, weight], self.outputs)

    def describe(self) -> str:
        return f"rank={self.rank}, epsilon={self.epsilon}"


@ATEN.register("rms_norm")
def _rms_norm_from_aten(call: AtenCall) -> Built:
    epsilon = call["eps"] if call["eps"] is not None else torch.finfo(seen(call["input"]).dtype).eps
    return Built(
        RMSNorm(rank=len(call["normalized_shape"]), epsilon=epsilon), (call["input"], call["weight"])
    )


@ONNX.register("RMSNormalization")
def _rms_norm_from_onnx(call: OnnxCall) -> Built:
    op = RMSNorm(rank=_rank_from_axis(call), epsilon=call.attribute("epsilon", 1e-5))
    return Built(op, (call.input(0), call.input(1)))


class GroupNorm(Op):
    """Mean 0, variance 1 over each of *groups* groups of channels. Inputs: x `[n, c, ...]`, weight `[c]`, bias `[c]`."""

    kind = "GroupNorm"
    roles = _NORM_ROLES

    def __init__(self, *, groups: int, epsilon: float) -> None:
        super().__init__()
        self.groups, self.epsilon = groups, epsilon

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.group_norm(x, self.groups, weight, bias, self.epsilon)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        x, weight, bias = (*inputs, None, None)[:3]
        assert x is not None
        shape = emit.shape(x)
        assert shape is not None
        channels = (shape[1],)
        scale = or_constant(emit, weight, channels, 1.0, "ones")
        shift = or_constant(emit, bias, channels, 0.0, "zeros")
        emit.node(
            "GroupNormalization",
            [x, scale, shift],
            self.outputs,
            num_groups=self.groups,
            epsilon=self.epsilon,
        )

    def describe(self) -> str:
        return f"groups={self.groups}, epsilon={self.epsilon}"


@ATEN.register("group_norm")
def _group_norm_from_aten(call: AtenCall) -> Built:
    op = GroupNorm(groups=call["num_groups"], epsilon=call["eps"])
    return Built(op, (call["input"], call["weight"], call["bias"]))


@ONNX.register("GroupNormalization")
def _group_norm_from_onnx(call: OnnxCall) -> Built:
    if call.opset < 21:
        raise Unsupported("before opset 21 its parameters are per group, which is not executed")
    op = GroupNorm(groups=call.attributes["num_groups"], epsilon=call.attribute("epsilon", 1e-5))
    return Built(op, call.inputs[:3])


class InstanceNorm(Op):
    """Mean 0, variance 1 over each channel of each sample. Inputs: x `[n, c, ...]`, weight `[c]`, bias `[c]`."""

    kind = "InstanceNorm"
    roles = _NORM_ROLES

    def __init__(self, *, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.instance_norm(x, weight=weight, bias=bias, use_input_stats=True, eps=self.epsilon)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        x, weight, bias = (*inputs, None, None)[:3]
        assert x is not None
        channels = tuple((emit.shape(x) or ())[1:2])
        scale = or_constant(emit, weight, channels, 1.0, "ones")
        shift = or_constant(emit, bias, channels, 0.0, "zeros")
        emit.node("InstanceNormalization", [x, scale, shift], self.outputs, epsilon=self.epsilon)

    def describe(self) -> str:
        return f"epsilon={self.epsilon}"


@ATEN.register("instance_norm")
def _instance_norm_from_aten(call: AtenCall) -> Built | None:
    if not call["use_input_stats"]:
        return None
    return Built(InstanceNorm(epsilon=call["eps"]), (call["input"], call["weight"], call["bias"]))


@ONNX.register("InstanceNormalization")
def _instance_norm_from_onnx(call: OnnxCall) -> Built:
    return Built(InstanceNorm(epsilon=call.attribute("epsilon", 1e-5)), call.inputs[:3])


class LpNormalization(Op):
    """x divided by its *p*-norm (1 or 2) along *axis*; 0 where that norm is 0."""

    kind = "LpNormalization"

    def __init__(self, *, axis: int, p: int) -> None:
        super().__init__()
        self.axis, self.p = axis, p

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, ord=self.p, dim=self.axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / norm)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("LpNormalization", inputs, self.outputs, axis=self.axis, p=self.p)

    def describe(self) -> str:
        return f"axis={self.axis}, p={self.p}"


@ONNX.register("LpNormalization")
def _lp_normalization_from_onnx(call: OnnxCall) -> Built:
    op = LpNormalization(axis=call.attribute("axis", -1), p=call.attribute("p", 2))
    return Built(op, (call.inputs[0],))


class LRN(Op):
    """x / (bias + alpha / size * sum of squares of *size* neighbouring channels) ^ beta."""

    kind = "LRN"

    def __init__(self, *, size: int, alpha: float, beta: float, bias: float) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.bias = size, alpha, beta, bias

    def forward(self, x: Tensor) -> Tensor:
        before, after = (self.size - 1) // 2, self.size // 2
        squares = F.pad(x.square().flatten(2).transpose(1, 2), (before, after))
        mean = F.avg_pool1d(squares, self.size, stride=1).transpose(1, 2).reshape(x.shape)
        return x / (self.bias + self.alpha * mean) ** self.beta

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node(
            "LRN", inputs, self.outputs, size=self.size, alpha=self.alpha, beta=self.beta, bias=self.bias
        )


@ONNX.register("LRN")
def _lrn_from_onnx(call: OnnxCall) -> Built:
    op = LRN(
        size=call.attributes["size"],
        alpha=call.attribute("alpha", 1e-4),
        beta=call.attribute("beta", 0.75),
        bias=call.attribute("bias", 1.0),
    )
    return Built(op, (call.inputs[0],))


class MeanVarianceNormalization(Op):
    """(x - mean) / (standard deviation + 1e-9) over *axes*."""

    kind = "MeanVarianceNormalization"

    def __init__(self, *, axes: Sequence[int]) -> None:
        super().__init__()
        self.axes = tuple(axes)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(self.axes, keepdim=True)
        return centred / (centred.square().mean(self.axes, keepdim=True).sqrt() + 1e-9)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("MeanVarianceNormalization", inputs, self.outputs, axes=list(self.axes))


@ONNX.register("MeanVarianceNormalization")
def _mvn_from_onnx(call: OnnxCall) -> Built:
    axes: Any = call.attribute("axes", [0, 2, 3])
    return Built(MeanVarianceNormalization(axes=axes), (call.inputs[0],))

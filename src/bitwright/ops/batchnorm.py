"""Batch normalisation, also over the processes of a distributed job, and the arithmetic of folding it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.conv import ConvTranspose
from bitwright.ops.norm import or_constant, refuse_statistics
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported


class _SumOfAll(torch.autograd.Function):
    """The sum over the processes of a distributed job; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _sum_of_all(x: Tensor) -> Tensor:
    total: Tensor = _SumOfAll.apply(x)  # type: ignore[no-untyped-call]
    return total


class BatchNorm(Op):
    """(x - mean) / sqrt(var + epsilon) * weight + bias per channel (axis 1).

    Inputs: x `[n, c, ...]`, weight `[c]` or None, bias `[c]` or None, running mean `[c]`, running variance `[c]`.
    In training the batch's own statistics are used and the running ones updated in place:
    running := (1 - momentum) * running + momentum * batch; momentum None: the mean over all batches so far.
    *synchronised*: statistics of the batches of all processes of a distributed job.
    """

    kind = "BatchNorm"
    roles = (Role.ACTIVATION, Role.PARAMETER, Role.PARAMETER, Role.PARAMETER, Role.PARAMETER)

    def __init__(self, *, epsilon: float, momentum: float | None, synchronised: bool = False) -> None:
        super().__init__()
        self.epsilon, self.momentum, self.synchronised = epsilon, momentum, synchronised
        #: Use the running statistics in training too.
        self.frozen = False

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        learning = self.training and not self.frozen
        momentum = self._count_batch() if learning else 0.0
        if learning and self.synchronised and dist.is_available() and dist.is_initialized():
            with torch.autocast(x.device.type, enabled=False):
                y = self._synchronised(x.float(), weight, bias, (mean.detach(), var.detach()), momentum)
            return y.to(x.dtype)
        # detach: the statistics are updated in place, also where they came as constants of an ONNX file.
        return F.batch_norm(x, mean.detach(), var.detach(), weight, bias, learning, momentum, self.epsilon)

    def _synchronised(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor],
        momentum: float,
    ) -> Tensor:
        axes = [0, *range(2, x.dim())]
        channels = [1, -1, *[1] * (x.dim() - 2)]
        count = _sum_of_all(x.new_tensor(float(x.numel() // x.shape[1])))
        mean = _sum_of_all(x.sum(axes)) / count
        centred = x - mean.reshape(channels)
        var = _sum_of_all(centred.square().sum(axes)) / count
        with torch.no_grad():
            running[0].lerp_(mean.to(running[0].dtype), momentum)
            running[1].lerp_((var * count / (count - 1).clamp(min=1)).to(running[1].dtype), momentum)
        scale = torch.rsqrt(var + self.epsilon)
        scale = scale if weight is None else scale * weight
        y = centred * scale.reshape(channels)
        return y if bias is None else y + bias.reshape(channels)

    def _count_batch(self) -> float:
        count = self._buffers.get("num_batches_tracked")
        if count is not None:
            count.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 1.0 if count is None else 1.0 / float(count)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        x, weight, bias, mean, var = inputs
        assert mean is not None
        channels = emit.shape(mean) or ()
        scale = or_constant(emit, weight, channels, 1.0, "ones")
        shift = or_constant(emit, bias, channels, 0.0, "zeros")
        emit.node("BatchNormalization", [x, scale, shift, mean, var], self.outputs, epsilon=self.epsilon)

    def describe(self) -> str:
        return f"epsilon={self.epsilon}, momentum={self.momentum}"


@ATEN.register("batch_norm")
def _batch_norm_from_aten(call: AtenCall) -> Built | None:
    if call["training"] or call["running_mean"] is None:  # statistics of the batch, also in evaluation
        return None
    momentum = call["momentum"]
    if isinstance(call.leaf, nn.modules.batchnorm._BatchNorm):
        momentum = call.leaf.momentum  # None is exported as 0
    synchronised = isinstance(call.leaf, nn.SyncBatchNorm)
    op = BatchNorm(epsilon=call["eps"], momentum=momentum, synchronised=synchronised)
    return Built(op, tuple(call[k] for k in ("input", "weight", "bias", "running_mean", "running_var")))


@ONNX.register("BatchNormalization")
def _batch_norm_from_onnx(call: OnnxCall) -> Built:
    refuse_statistics(call)
    if call.attribute("training_mode", 0):
        raise Unsupported("training_mode = 1 is not executed; export the model in evaluation mode")
    # ONNX weighs the old statistics with its momentum, torch the new ones.
    op = BatchNorm(epsilon=call.attribute("epsilon", 1e-5), momentum=1.0 - call.attribute("momentum", 0.9))
    return Built(op, tuple(call.input(i) for i in range(5)))


# --- folding into the layer before -------------------------------------------------------------------------------

#: What folding divides by again is kept away from 0 by this much.
_LEAST_FACTOR = 1e-6


def channels_of(layer: Op, rank: int) -> tuple[int, int]:
    """Axis of the output channels in the weight (of so many axes) of *layer*, and the groups of a transposed convolution, else 1."""
    return layer.weight_axis(1, rank) or 0, layer.groups if isinstance(layer, ConvTranspose) else 1


def fold_factor(gain: Tensor | None, variance: Tensor, epsilon: float) -> Tensor:
    """What folding multiplies each output channel by, `[c]`: gain / sqrt(variance + epsilon), kept away from 0."""
    factor = torch.rsqrt(variance.detach() + epsilon)
    if gain is not None:
        factor = factor * gain
    tiny = torch.where(factor < 0, -_LEAST_FACTOR, _LEAST_FACTOR)
    return torch.where(factor.abs() < _LEAST_FACTOR, tiny.to(factor.dtype), factor)


def times_channels(weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
    """*weight* with output channel c multiplied by factor[c]. *axis*: of the channels; *groups*: > 1 only where the channels of
    a transposed convolution lie on axis 1, group by group along axis 0.
    """
    if axis == 1 and groups > 1:
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        shape = [groups, 1, weight.shape[1], *[1] * (weight.dim() - 2)]
        return (grouped * factor.reshape(shape)).reshape(weight.shape)
    shape = [1] * weight.dim()
    shape[axis] = -1
    return weight * factor.reshape(shape)


def over_channels(weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
    """Inverse of `times_channels`."""
    return times_channels(weight, 1.0 / factor, axis, groups)

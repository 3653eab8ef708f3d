"""Convolution and transposed convolution, one to three spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from bitwright.graph.op import Emitter, Op, Role, Shape
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Conv(Op):
    """Convolution. Inputs: x `[n, c, *d]`, weight `[o, c/groups, *k]`, optional bias `[o]`.

    *pads*: ONNX order (all begins, then all ends), or `same_upper`/`same_lower` (computed from the input's size).
    """

    kind = "Conv"
    roles = (Role.ACTIVATION, Role.WEIGHT, Role.BIAS)
    bias_axis = 1

    def __init__(
        self,
        kernel: Sequence[int],
        *,
        stride: Sequence[int],
        pads: Sequence[int] | str,
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.dilation, self.groups = (
            tuple(kernel),
            tuple(stride),
            tuple(dilation),
            groups,
        )
        self.pads = pads if isinstance(pads, str) else tuple(pads)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        n = len(self.kernel)
        pads = self._resolved_pads(x)
        begins, ends = pads[:n], pads[n:]
        if begins != ends:
            x = F.pad(x, [p for b, e in zip(reversed(begins), reversed(ends), strict=True) for p in (b, e)])
            begins = (0,) * n
        result: Tensor = _CONV[n](x, weight, bias, self.stride, begins, self.dilation, self.groups)
        return result

    def _resolved_pads(self, x: Tensor) -> tuple[int, ...]:
        if not isinstance(self.pads, str):
            return self.pads
        totals = [
            max(0, (math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size)
            for size, s, k, d in zip(x.shape[2:], self.stride, self.kernel, self.dilation, strict=True)
        ]
        small, large = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        return small + large if self.pads == "same_upper" else large + small

    def weight_axis(self, index: int, rank: int) -> int | None:
        return 0 if index == 1 else None

    def macs(self, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int:
        weight, out = inputs[1], outputs[0]
        return 0 if weight is None or out is None else math.prod(out) * math.prod(weight[1:])

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        padding = {"auto_pad": self.pads.upper()} if isinstance(self.pads, str) else {"pads": list(self.pads)}
        emit.node(
            "Conv",
            inputs,
            self.outputs,
            kernel_shape=list(self.kernel),
            strides=list(self.stride),
            dilations=list(self.dilation),
            group=self.groups,
            **padding,
        )

    def describe(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, pads={self.pads}, dilation={self.dilation}, groups={self.groups}"


class ConvTranspose(Op):
    """Transposed convolution. Inputs: x `[n, c, *d]`, weight `[c, o/groups, *k]`, optional bias `[o]`."""

    kind = "ConvTranspose"
    roles = (Role.ACTIVATION, Role.WEIGHT, Role.BIAS)
    bias_axis = 1

    def __init__(
        self,
        kernel: Sequence[int],
        *,
        stride: Sequence[int],
        pads: Sequence[int],
        output_padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.pads = tuple(kernel), tuple(stride), tuple(pads)
        self.output_padding, self.dilation, self.groups = tuple(output_padding), tuple(dilation), groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        n = len(self.kernel)
        begins, ends = self.pads[:n], self.pads[n:]
        # torch knows one padding per axis; what exceeds it at either end is cropped afterwards.
        common = tuple(min(b, e) for b, e in zip(begins, ends, strict=True))
        y: Tensor = _CONV_TRANSPOSE[n](
            x, weight, bias, self.stride, common, self.output_padding, self.groups, self.dilation
        )
        for axis, (b, e, c) in enumerate(zip(begins, ends, common, strict=True), start=2):
            if b > c or e > c:
                y = y.narrow(axis, b - c, y.shape[axis] - (b - c) - (e - c))
        return y

    def weight_axis(self, index: int, rank: int) -> int | None:
        # With groups, axis 1 counts channels within a group: one scale would serve several output channels,
        # which ONNX's per-axis quantization still expresses exactly.
        return 1 if index == 1 else None

    def macs(self, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int:
        x, weight = inputs[0], inputs[1]
        return 0 if x is None or weight is None else math.prod(x) * math.prod(weight[1:])

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node(
            "ConvTranspose",
            inputs,
            self.outputs,
            kernel_shape=list(self.kernel),
            strides=list(self.stride),
            pads=list(self.pads),
            output_padding=list(self.output_padding),
            dilations=list(self.dilation),
            group=self.groups,
        )

    def describe(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, pads={self.pads}, groups={self.groups}"


def _per_axis(value: Sequence[int], n: int) -> tuple[int, ...]:
    return tuple(value) if len(value) == n else tuple(value) * n


@ATEN.register("conv1d", "conv2d", "conv3d")
def _conv_from_aten(call: AtenCall) -> Built:
    kernel = [k or 1 for k in call.shape(call["weight"])[2:]]
    n = len(kernel)
    padding = call["padding"]
    stride, dilation = _per_axis(call["stride"], n), _per_axis(call["dilation"], n)
    if isinstance(padding, str):
        # "same" pads the odd element at the end; torch allows it for stride 1 only.
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        pads = [t // 2 for t in totals] + [t - t // 2 for t in totals]
    else:
        pads = [*_per_axis(padding, n)] * 2
    op = Conv(kernel, stride=stride, pads=pads, dilation=dilation, groups=call["groups"])
    return Built(op, (call["input"], call["weight"], call["bias"]))


@ATEN.register("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose_from_aten(call: AtenCall) -> Built:
    kernel = [k or 1 for k in call.shape(call["weight"])[2:]]
    n = len(kernel)
    op = ConvTranspose(
        kernel,
        stride=_per_axis(call["stride"], n),
        pads=[*_per_axis(call["padding"], n)] * 2,
        output_padding=_per_axis(call["output_padding"], n),
        dilation=_per_axis(call["dilation"], n),
        groups=call["groups"],
    )
    return Built(op, (call["input"], call["weight"], call["bias"]))


def _onnx_kernel(call: OnnxCall) -> tuple[int, ...]:
    shape = call.attributes.get("kernel_shape") or (call.shape(call.inputs[1]) or ())[2:]
    kernel = tuple(int(k) for k in shape if k)
    if len(kernel) not in _CONV:
        raise Unsupported("the kernel must have one to three known spatial dimensions")
    return kernel


@ONNX.register("Conv")
def _conv_from_onnx(call: OnnxCall) -> Built:
    kernel = _onnx_kernel(call)
    n = len(kernel)
    auto_pad = call.attribute("auto_pad", "NOTSET")
    pads: Sequence[int] | str = call.attribute("pads", [0] * 2 * n)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        pads = auto_pad.lower()
    elif auto_pad == "VALID":
        pads = [0] * 2 * n
    op = Conv(
        kernel,
        stride=call.attribute("strides", [1] * n),
        pads=pads,
        dilation=call.attribute("dilations", [1] * n),
        groups=call.attribute("group", 1),
    )
    return Built(op, (call.input(0), call.input(1), call.input(2)))


@ONNX.register("ConvTranspose")
def _conv_transpose_from_onnx(call: OnnxCall) -> Built:
    kernel = _onnx_kernel(call)
    n = len(kernel)
    if call.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in call.attributes:
        raise Unsupported("auto_pad=SAME_* and output_shape are not executed for ConvTranspose; use pads")
    op = ConvTranspose(
        kernel,
        stride=call.attribute("strides", [1] * n),
        pads=call.attribute("pads", [0] * 2 * n),
        output_padding=call.attribute("output_padding", [0] * n),
        dilation=call.attribute("dilations", [1] * n),
        groups=call.attribute("group", 1),
    )
    return Built(op, (call.input(0), call.input(1), call.input(2)))

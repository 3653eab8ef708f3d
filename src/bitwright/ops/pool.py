"""Pooling over windows and over whole planes, one to three spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.graph.op import Emitter, Op
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class _Windows:
    """Where the windows of a pooling lie. *pads*: all begins, then all ends, or `same_upper`/`same_lower`."""

    def __init__(
        self,
        kernel: Sequence[int],
        *,
        stride: Sequence[int],
        pads: Sequence[int] | str,
        dilation: Sequence[int],
        ceil: bool,
    ) -> None:
        self.kernel, self.stride, self.dilation, self.ceil = (
            tuple(kernel),
            tuple(stride),
            tuple(dilation),
            ceil,
        )
        self.pads = pads if isinstance(pads, str) else tuple(pads)

    def margins(self, lengths: Sequence[int]) -> list[tuple[int, int, int]]:
        """Per axis: padding before, padding after, and what the last window needs beyond that (*ceil* only)."""
        n = len(self.kernel)
        found = []
        for i, (length, k, s, d) in enumerate(
            zip(lengths, self.kernel, self.stride, self.dilation, strict=True)
        ):
            reach = (k - 1) * d + 1
            if isinstance(self.pads, str):
                total = max(0, (math.ceil(length / s) - 1) * s + reach - length)
                small, large = total // 2, total - total // 2
                found.append((small, large, 0) if self.pads == "same_upper" else (large, small, 0))
                continue
            begin, end = self.pads[i], self.pads[n + i]
            count = (length + begin + end - reach) // s + 1
            if self.ceil:
                count = -(-(length + begin + end - reach) // s) + 1
                if (count - 1) * s >= length + begin:  # a window may not start in the padding after
                    count -= 1
            found.append((begin, end, max(0, (count - 1) * s + reach - (length + begin + end))))
        return found

    def onnx_attributes(self) -> dict[str, object]:
        same = isinstance(self.pads, str)
        return {
            "kernel_shape": list(self.kernel),
            "strides": list(self.stride),
            "ceil_mode": int(self.ceil),
            **({"auto_pad": str(self.pads).upper()} if same else {"pads": list(self.pads)}),
            **({"dilations": list(self.dilation)} if any(d != 1 for d in self.dilation) else {}),
        }

    def __str__(self) -> str:
        shown = f"kernel={self.kernel}, stride={self.stride}, pads={self.pads}"
        return shown + (f", dilation={self.dilation}" if any(d != 1 for d in self.dilation) else "")


def _padded(x: Tensor, margins: Sequence[tuple[int, int]], value: float) -> Tensor:
    flat = [p for pair in reversed(margins) for p in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


class MaxPool(Op):
    """The largest element of each window of x `[n, c, *d]`."""

    kind = "MaxPool"
    passthrough = True

    def __init__(
        self,
        kernel: Sequence[int],
        *,
        stride: Sequence[int],
        pads: Sequence[int] | str,
        dilation: Sequence[int],
        ceil: bool = False,
    ) -> None:
        super().__init__()
        self.windows = _Windows(kernel, stride=stride, pads=pads, dilation=dilation, ceil=ceil)

    def forward(self, x: Tensor) -> Tensor:
        w = self.windows
        margins = w.margins(x.shape[2:])
        n = len(w.kernel)
        if all(
            b == e and not extra and 2 * b <= k for (b, e, extra), k in zip(margins, w.kernel, strict=True)
        ):
            begins = tuple(b for b, _, _ in margins)
        else:  # torch pads equally at both ends
            x = _padded(x, [(b, e + extra) for b, e, extra in margins], -math.inf)
            begins = (0,) * n
        result: Tensor = _MAX[n](x, w.kernel, w.stride, begins, w.dilation)
        return result

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("MaxPool", inputs, self.outputs, **self.windows.onnx_attributes())

    def describe(self) -> str:
        return str(self.windows)


class AveragePool(Op):
    """The mean of each window of x `[n, c, *d]`; *count_padding*: padded zeros count as elements."""

    kind = "AveragePool"

    def __init__(
        self,
        kernel: Sequence[int],
        *,
        stride: Sequence[int],
        pads: Sequence[int] | str,
        ceil: bool = False,
        count_padding: bool = False,
    ) -> None:
        super().__init__()
        self.windows = _Windows(kernel, stride=stride, pads=pads, dilation=[1] * len(kernel), ceil=ceil)
        self.count_padding = count_padding

    def forward(self, x: Tensor) -> Tensor:
        w = self.windows
        n, margins = len(w.kernel), w.margins(x.shape[2:])
        padding = [(b, e) for b, e, _ in margins]
        extra = [(0, extra) for _, _, extra in margins]
        pool = _AVERAGE[n]
        y: Tensor = pool(_padded(_padded(x, padding, 0.0), extra, 0.0), w.kernel, w.stride)
        if not any(e for _, e in extra) and (self.count_padding or not any(map(any, padding))):
            return y
        counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
        counted = _padded(_padded(counted, padding, float(self.count_padding)), extra, 0.0)
        return y / pool(counted, w.kernel, w.stride)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node(
            "AveragePool",
            inputs,
            self.outputs,
            count_include_pad=int(self.count_padding),
            **self.windows.onnx_attributes(),
        )

    def describe(self) -> str:
        return str(self.windows) + (", count_padding" if self.count_padding else "")


class GlobalAveragePool(Op):
    """The mean over all spatial axes of x `[n, c, *d]`, kept with length 1."""

    kind = "GlobalAveragePool"

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.dim())), keepdim=True)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("GlobalAveragePool", inputs, self.outputs)


class GlobalMaxPool(Op):
    """The maximum over all spatial axes of x `[n, c, *d]`, kept with length 1."""

    kind = "GlobalMaxPool"
    passthrough = True

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(tuple(range(2, x.dim())), keepdim=True)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("GlobalMaxPool", inputs, self.outputs)


# --- ATen ----------------------------------------------------------------------------------------------------


def _per_axis(value: int | Sequence[int], n: int) -> list[int]:
    listed = [value] if isinstance(value, int) else list(value)
    return listed if len(listed) == n else listed * n


def _batched(call: AtenCall, n: int) -> bool:
    """False for torch's unbatched form `[c, *d]`, which ONNX does not have."""
    return len(call.shape(call["self"])) == n + 2


@ATEN.register("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool_from_aten(call: AtenCall) -> Built | None:
    n = _rank_in(call.target)
    if not _batched(call, n):
        return None
    kernel = _per_axis(call["kernel_size"], n)
    op = MaxPool(
        kernel,
        stride=_per_axis(call["stride"] or kernel, n),
        pads=_per_axis(call["padding"], n) * 2,
        dilation=_per_axis(call["dilation"], n),
        ceil=call["ceil_mode"],
    )
    return Built(op, (call["self"],))


@ATEN.register("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _average_pool_from_aten(call: AtenCall) -> Built | None:
    n = _rank_in(call.target)
    if not _batched(call, n) or call.args.get("divisor_override") is not None:
        return None
    kernel = _per_axis(call["kernel_size"], n)
    op = AveragePool(
        kernel,
        stride=_per_axis(call["stride"] or kernel, n),
        pads=_per_axis(call["padding"], n) * 2,
        ceil=call["ceil_mode"],
        count_padding=call["count_include_pad"],
    )
    return Built(op, (call["self"],))


@ATEN.register("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def _adaptive_pool_from_aten(call: AtenCall) -> Built | None:
    n = _rank_in(call.target)
    sizes = _per_axis(call["output_size"], n)
    if not _batched(call, n):
        return None
    if all(size == 1 for size in sizes):
        return Built(GlobalAveragePool(), (call["self"],))
    lengths = call.shape(call["self"])[2:]
    # Where the lengths divide, the adaptive windows are equal and do not overlap.
    kernel = [
        length // size for length, size in zip(lengths, sizes, strict=True) if length and length % size == 0
    ]
    if len(kernel) != n:
        return None
    return Built(AveragePool(kernel, stride=kernel, pads=[0] * 2 * n), (call["self"],))


def _rank_in(target: str) -> int:
    return next(n for n in (1, 2, 3) if f"pool{n}d" in target)


# --- ONNX ----------------------------------------------------------------------------------------------------


def _pads(call: OnnxCall, n: int) -> Sequence[int] | str:
    auto_pad = call.attribute("auto_pad", "NOTSET")
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return str(auto_pad).lower()
    pads: Sequence[int] = call.attribute("pads", [0] * 2 * n)
    return [0] * 2 * n if auto_pad == "VALID" else pads


def _kernel(call: OnnxCall) -> list[int]:
    kernel = [int(k) for k in call.attributes["kernel_shape"]]
    if len(kernel) not in _MAX:
        raise Unsupported("one to three spatial dimensions are executed")
    return kernel


@ONNX.register("MaxPool")
def _max_pool_from_onnx(call: OnnxCall) -> Built:
    kernel = _kernel(call)
    n = len(kernel)
    if any(call.outputs[1:]):
        raise Unsupported("the output Indices")
    op = MaxPool(
        kernel,
        stride=call.attribute("strides", [1] * n),
        pads=_pads(call, n),
        dilation=call.attribute("dilations", [1] * n),
        ceil=bool(call.attribute("ceil_mode", 0)),
    )
    return Built(op, (call.inputs[0],))


@ONNX.register("AveragePool")
def _average_pool_from_onnx(call: OnnxCall) -> Built:
    kernel = _kernel(call)
    n = len(kernel)
    if any(d != 1 for d in call.attribute("dilations", [1] * n)):
        raise Unsupported("dilations")
    op = AveragePool(
        kernel,
        stride=call.attribute("strides", [1] * n),
        pads=_pads(call, n),
        ceil=bool(call.attribute("ceil_mode", 0)),
        count_padding=bool(call.attribute("count_include_pad", 0)),
    )
    return Built(op, (call.inputs[0],))


@ONNX.register("GlobalAveragePool")
def _global_average_pool_from_onnx(call: OnnxCall) -> Built:
    return Built(GlobalAveragePool(), (call.inputs[0],))


@ONNX.register("GlobalMaxPool")
def _global_max_pool_from_onnx(call: OnnxCall) -> Built:
    return Built(GlobalMaxPool(), (call.inputs[0],))

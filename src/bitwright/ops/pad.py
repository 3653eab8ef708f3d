"""Padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.sizes import Sizes, as_vector, emit_sizes, int_constant, resolve, static_ints
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported, ints


class Pad(Op):
    """x with elements added (or, negative, removed) at the begin and end of *axes*.

    *pads*: `Sizes`, all begins, then all ends. *mode*: `constant` (with *value*), `reflect`, `edge` or `wrap`.
    *axes*: None for all.
    """

    kind = "Pad"
    roles = (Role.ACTIVATION, Role.INDEX)

    def __init__(
        self, pads: Sizes, *, mode: str = "constant", value: float = 0.0, axes: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.pads, self.mode, self.value = pads, mode, value
        self.axes = None if axes is None else tuple(axes)

    @property
    def passthrough(self) -> bool:  # type: ignore[override]
        # A range always contains 0; another constant may lie outside the input's.
        return self.mode != "constant" or self.value == 0

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        pads = resolve(self.pads, given)
        axes = range(x.dim()) if self.axes is None else [a % x.dim() for a in self.axes]
        pairs = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
        if self.mode == "constant":
            flat = [p for axis in reversed(range(x.dim())) for p in pairs.get(axis, (0, 0))]
            value: Any = bool(self.value) if x.dtype == torch.bool else self.value
            return F.pad(x, flat, value=value)
        for axis, (begin, end) in pairs.items():
            if begin or end:
                x = x.index_select(axis, self._sources(x.shape[axis], begin, end, x.device))
        return x

    def _sources(self, n: int, begin: int, end: int, device: torch.device) -> Tensor:
        """`[begin + n + end]` int64: where each element of the padded axis comes from."""
        at = torch.arange(-begin, n + end, device=device)
        if self.mode == "edge":
            return at.clamp(0, n - 1)
        if self.mode == "wrap":
            return at % n
        period = max(1, 2 * (n - 1))
        at = at % period
        return torch.minimum(at, period - at) if n > 1 else at * 0

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        assert inputs[0] is not None
        shape = emit.shape(inputs[0])
        if self.pads is not None and self.axes is not None and shape is not None:
            # All axes written out: ONNX Runtime's layout optimiser fails on Pad with an `axes` input.
            Pad(self.pads_of_all_axes(len(shape)), mode=self.mode, value=self.value)._write(
                emit, inputs, self.outputs
            )
            return
        self._write(emit, inputs, self.outputs)

    def pads_of_all_axes(self, rank: int) -> tuple[int, ...]:
        """The pads of all *rank* axes, where *pads* and *axes* are constant."""
        assert self.pads is not None
        assert self.axes is not None
        n = len(self.axes)
        full = [0] * (2 * rank)
        for i, axis in enumerate(self.axes):
            full[axis % rank], full[rank + axis % rank] = int(self.pads[i] or 0), int(self.pads[n + i] or 0)
        return tuple(full)

    def _write(self, emit: Emitter, inputs: Sequence[str | None], outputs: Sequence[str]) -> None:
        names = [inputs[0], emit_sizes(emit, self.pads, inputs[1:], "pads")]
        if self.mode == "constant" and self.value != 0:
            names.append(emit.constant(np.array(self.value, dtype=np.float32), "value"))
        elif self.axes is not None:
            names.append(None)
        if self.axes is not None:
            names.append(int_constant(emit, self.axes, "axes"))
        emit.node("Pad", names, outputs, mode=self.mode)

    def describe(self) -> str:
        shown = "?" if self.pads is None else self.pads
        return f"pads={shown}, mode={self.mode}" + (f", value={self.value}" if self.value else "")


@ONNX.register("Pad")
def _pad_from_onnx(call: OnnxCall) -> Built:
    pads, value = as_vector(call.constant(1)), 0.0
    if call.input(2) is not None:
        value = call.required_constant(2, "the padding value").item()
    axes = None if call.input(3) is None else ints(call.required_constant(3, "axes"))
    mode = call.attribute("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise Unsupported(f"mode={mode}")
    op = Pad(pads, mode=mode, value=value, axes=axes)
    return Built(op, (call.inputs[0],) if pads is not None else (call.inputs[0], call.inputs[1]))


_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _padded(call: AtenCall, pad: Sequence[Any], mode: str, value: Any) -> Built | None:
    flat = static_ints(pad)
    if flat is None or mode not in _MODES:
        return None
    rank, n = len(call.shape(call["self"])), len(flat) // 2
    axes = range(rank - n, rank)
    pads = [flat[2 * (n - 1 - i)] for i in range(n)] + [flat[2 * (n - 1 - i) + 1] for i in range(n)]
    op = Pad(tuple(pads), mode=_MODES[mode], value=value or 0.0, axes=axes)
    return Built(op, (call["self"],))


@ATEN.register("pad")
def _pad_from_aten(call: AtenCall) -> Built | None:
    return _padded(call, call["pad"], call["mode"], call["value"])


@ATEN.register("constant_pad_nd")
def _constant_pad_from_aten(call: AtenCall) -> Built | None:
    return _padded(call, call["pad"], "constant", call["value"])


@ATEN.register("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def _reflection_pad_from_aten(call: AtenCall) -> Built | None:
    return _padded(call, call["padding"], "reflect", 0.0)


@ATEN.register("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _replication_pad_from_aten(call: AtenCall) -> Built | None:
    return _padded(call, call["padding"], "replicate", 0.0)

"""Resampling to another size: nearest, linear and cubic, with ONNX's coordinate rules.

Every rule is separable: along one axis, an output element is a weighted sum of a few input elements. Places are computed
in float32 as ONNX Runtime does, because rounding decides which neighbour is the nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitwright.graph.op import Emitter, Op
from bitwright.ops.sizes import int_constant
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall, Unsupported, ints

_Floats = npt.NDArray[np.float32]

COORDINATES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


class Resize(Op):
    """x resampled along *axes* to *sizes*, or by *scales* (output length / input length, > 0). A size of -1 keeps the axis.

    *coordinates*: one of `COORDINATES`; *nearest*: one of `NEAREST`, for the mode `nearest`; *cubic*: the coefficient a of
    Keys' kernel; *inside*: cubic weights outside the input count as 0 and the others are scaled up.
    """

    kind = "Resize"

    def __init__(
        self,
        mode: str,
        *,
        axes: Sequence[int],
        sizes: Sequence[int] | None = None,
        scales: Sequence[float] | None = None,
        coordinates: str = "half_pixel",
        nearest: str = "round_prefer_floor",
        cubic: float = -0.75,
        inside: bool = False,
    ) -> None:
        super().__init__()
        self.mode, self.axes = mode, tuple(axes)
        self.sizes = None if sizes is None else tuple(sizes)
        self.scales = None if scales is None else tuple(scales)
        self.coordinates, self.nearest, self.cubic, self.inside = coordinates, nearest, cubic, inside

    @property
    def passthrough(self) -> bool:  # type: ignore[override]
        return self.mode == "nearest"

    def forward(self, x: Tensor) -> Tensor:
        for axis, indices, weights in self.taps(x.shape):
            y = None
            for tap in range(indices.shape[1]):
                part = x.index_select(axis, torch.from_numpy(indices[:, tap].copy()).to(x.device))
                if self.mode != "nearest":
                    shape = [1] * x.dim()
                    shape[axis] = -1
                    part = part * torch.from_numpy(weights[:, tap].copy()).to(x).reshape(shape)
                y = part if y is None else y + part
            assert y is not None
            x = y
        return x

    def taps(self, shape: Sequence[int]) -> list[tuple[int, npt.NDArray[np.int64], _Floats]]:
        """For each axis of x that changes: the axis, which elements each output element reads, and how much of them, `[length, taps]`."""
        found = []
        for i, axis in enumerate(self.axes):
            length, scale = self._length(i, shape[axis])
            if length != shape[axis] or float(scale) != 1.0:
                found.append((axis % len(shape), *self._taps(shape[axis], length, scale)))
        return found

    def _length(self, i: int, n: int) -> tuple[int, np.float32]:
        if self.sizes is not None:
            length = n if self.sizes[i] == -1 else self.sizes[i]
            return length, np.float32(length) / np.float32(n)
        assert self.scales is not None
        scale = np.float32(self.scales[i])
        return int(np.floor(np.float32(n) * scale)), scale

    def _taps(self, n: int, length: int, scale: np.float32) -> tuple[npt.NDArray[np.int64], _Floats]:
        """For every output element, which inputs it reads and how much of them: `[length, taps]` each."""
        at = _places(self.coordinates, n, length, scale)
        if self.mode == "nearest":
            return _clamped(_nearest(self.nearest, at)[:, None], n), np.ones((length, 1), dtype=np.float32)
        whole = np.floor(at)
        t = (at - whole)[:, None]
        if self.mode == "linear":
            at = np.clip(at, 0, n - 1)  # beyond the first and last element, these
            whole = np.floor(at)
            t = (at - whole)[:, None]
            weights = np.concatenate([1 - t, t], axis=1)
            return _clamped(whole[:, None] + np.arange(2), n), weights.astype(np.float32)
        weights = _keys(t, self.cubic)
        indices = whole[:, None] + np.arange(-1, 3)
        if self.inside:
            weights = np.where((indices >= 0) & (indices < n), weights, 0)
            weights = weights / weights.sum(axis=1, keepdims=True)
        return _clamped(indices, n), weights.astype(np.float32)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        x = inputs[0]
        assert x is not None
        sizes = scales = None
        axes: Sequence[int] = self.axes
        if self.sizes is not None:
            kept = [(a, s) for a, s in zip(self.axes, self.sizes, strict=True) if s != -1]
            axes = [a for a, _ in kept]
            sizes = int_constant(emit, [s for _, s in kept], "sizes")
        else:
            scales = emit.constant(np.array(self.scales, dtype=np.float32), "scales")
        attributes: dict[str, Any] = {"mode": self.mode, "coordinate_transformation_mode": self.coordinates}
        if self.mode == "nearest":
            attributes["nearest_mode"] = self.nearest
        if self.mode == "cubic":
            attributes.update(cubic_coeff_a=self.cubic, exclude_outside=int(self.inside))
        emit.node("Resize", [x, None, scales, sizes], self.outputs, axes=list(axes), **attributes)

    def describe(self) -> str:
        target = f"sizes={self.sizes}" if self.sizes is not None else f"scales={self.scales}"
        return f"{self.mode}, axes={self.axes}, {target}, {self.coordinates}"


def _places(rule: str, n: int, length: int, scale: np.float32) -> _Floats:
    """`[length]` float32: where in the input each output element lies."""
    out = np.arange(length, dtype=np.float32)
    half, one = np.float32(0.5), np.float32(1)
    if rule == "asymmetric":
        return (out / scale).astype(np.float32)
    if rule == "align_corners":
        if length == 1:
            return np.zeros(1, dtype=np.float32)
        return (out * np.float32(n - 1) / np.float32(length - 1)).astype(np.float32)
    if rule == "pytorch_half_pixel" and length == 1:
        return np.zeros(1, dtype=np.float32)
    offset = np.float32(0)
    if rule == "half_pixel_symmetric":
        # The output covers length / scale input elements; what is left over lies at both ends in equal parts.
        adjustment = np.float32(length) / (scale * np.float32(n))
        offset = np.float32(n) / 2 * (one - adjustment)
    return (offset + (out + half) / scale - half).astype(np.float32)


def _nearest(rule: str, at: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    at = at.astype(np.float64)  # so that adding a half does not round
    rounded: npt.NDArray[np.float64] = {
        "floor": np.floor(at),
        "ceil": np.ceil(at),
        "round_prefer_floor": np.ceil(at - 0.5),
        "round_prefer_ceil": np.floor(at + 0.5),
    }[rule]
    return rounded


def _keys(t: _Floats, a: float) -> npt.NDArray[np.float64]:
    """Weights of the elements at -1, 0, 1, 2 for a place t in [0, 1) between the middle two (Keys 1981): `[k, 4]`."""
    d = np.abs(t.astype(np.float64) - np.arange(-1, 3))
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _clamped(indices: npt.NDArray[Any], n: int) -> npt.NDArray[np.int64]:
    clamped: npt.NDArray[np.int64] = np.clip(indices, 0, n - 1).astype(np.int64)
    return clamped


# --- ONNX ----------------------------------------------------------------------------------------------------


@ONNX.register("Resize")
def _resize_from_onnx(call: OnnxCall) -> Built:
    mode = call.attribute("mode", "nearest")
    coordinates = call.attribute("coordinate_transformation_mode", "half_pixel")
    if coordinates not in COORDINATES:
        raise Unsupported(f"coordinate_transformation_mode={coordinates}")
    if call.attribute("antialias", 0):
        raise Unsupported("antialias")
    scales, sizes = call.input(2), call.input(3)
    numbers = call.required_constant(3 if sizes else 2, "sizes and scales") if sizes or scales else None
    if numbers is None:
        raise Unsupported("neither sizes nor scales")
    if sizes and call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("keep_aspect_ratio_policy")
    op = Resize(
        mode,
        axes=call.attribute("axes", range(numbers.size)),
        sizes=ints(numbers) if sizes else None,
        scales=None if sizes else [float(s) for s in numbers.reshape(-1)],
        coordinates=coordinates,
        nearest=call.attribute("nearest_mode", "round_prefer_floor"),
        cubic=call.attribute("cubic_coeff_a", -0.75),
        inside=bool(call.attribute("exclude_outside", 0)),
    )
    return Built(op, (call.inputs[0],))


# --- ATen ----------------------------------------------------------------------------------------------------

#: ATen's name -> mode, coordinates (without align_corners), nearest rule.
_ATEN = {
    "upsample_nearest": ("nearest", "asymmetric", "floor"),
    "_upsample_nearest_exact": ("nearest", "half_pixel", "round_prefer_ceil"),
    "upsample_linear": ("linear", "half_pixel", "floor"),
    "upsample_bilinear": ("linear", "half_pixel", "floor"),
    "upsample_trilinear": ("linear", "half_pixel", "floor"),
    "upsample_bicubic": ("cubic", "half_pixel", "floor"),
}


@ATEN.register(
    *(f"{name}{n}d" for name in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)),
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
)
def _resize_from_aten(call: AtenCall) -> Built | None:
    mode, coordinates, nearest = _ATEN[call.target[:-2]]
    if call.args.get("align_corners"):
        coordinates = "align_corners"
    lengths = call.output_shape[2:]
    sizes = [length for length in lengths if length is not None]
    scales = _aten_scales(call)
    if len(sizes) != len(lengths) and scales is None:
        return None
    op = Resize(
        mode,
        axes=range(2, 2 + len(lengths)),
        sizes=sizes if scales is None else None,
        scales=scales,
        coordinates=coordinates,
        nearest=nearest,
    )
    return Built(op, (call["input"] if "input" in call.args else call["self"],))


def _aten_scales(call: AtenCall) -> list[float] | None:
    """The factors asked for, which torch uses for coordinates instead of the ratio of lengths; None if there are none."""
    listed = call.args.get("scale_factors")
    if listed is None:
        listed = [call.args[k] for k in ("scales", "scales_d", "scales_h", "scales_w") if k in call.args]
    if not listed or any(not isinstance(s, (int, float)) for s in listed):
        return None
    return [float(s) for s in listed]

"""Moving blocks of pixels into channels and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bitwright.graph.op import Emitter, Op
from bitwright.ops.sizes import int_constant
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall


class DepthToSpace(Op):
    """`[n, c b b, h, w]` to `[n, c, h b, w b]`. *mode*: `DCR` (block outermost in depth) or `CRD` (pixel shuffle)."""

    kind = "DepthToSpace"
    passthrough = True

    def __init__(self, block: int, *, mode: str) -> None:
        super().__init__()
        self.block, self.mode = block, mode

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        b = self.block
        if self.mode == "CRD":
            y = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
        else:
            y = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return y.reshape(n, c // b**2, h * b, w * b)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("DepthToSpace", inputs, self.outputs, blocksize=self.block, mode=self.mode)

    def describe(self) -> str:
        return f"block={self.block}, mode={self.mode}"


class SpaceToDepth(Op):
    """The inverse of `DepthToSpace`; ONNX knows the mode `DCR` only."""

    kind = "SpaceToDepth"
    passthrough = True

    def __init__(self, block: int, *, mode: str) -> None:
        super().__init__()
        self.block, self.mode = block, mode

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        b = self.block
        y = x.reshape(n, c, h // b, b, w // b, b)
        order = (0, 1, 3, 5, 2, 4) if self.mode == "CRD" else (0, 3, 5, 1, 2, 4)
        return y.permute(order).reshape(n, c * b**2, h // b, w // b)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        if self.mode == "DCR":
            emit.node("SpaceToDepth", inputs, self.outputs, blocksize=self.block)
            return
        assert inputs[0] is not None
        shape = emit.shape(inputs[0])
        assert shape is not None
        _, c, h, w = shape
        b = self.block
        split, ordered = emit.temporary("split"), emit.temporary("ordered")
        blocks = int_constant(emit, [0, c, h // b, b, w // b, b], "blocks")
        emit.node("Reshape", [inputs[0], blocks], [split])
        emit.node("Transpose", [split], [ordered], perm=[0, 1, 3, 5, 2, 4])
        emit.node(
            "Reshape", [ordered, int_constant(emit, [0, c * b**2, h // b, w // b], "shape")], self.outputs
        )

    def describe(self) -> str:
        return f"block={self.block}, mode={self.mode}"


@ONNX.register("DepthToSpace")
def _depth_to_space_from_onnx(call: OnnxCall) -> Built:
    op = DepthToSpace(call.attributes["blocksize"], mode=call.attribute("mode", "DCR"))
    return Built(op, (call.inputs[0],))


@ONNX.register("SpaceToDepth")
def _space_to_depth_from_onnx(call: OnnxCall) -> Built:
    return Built(SpaceToDepth(call.attributes["blocksize"], mode="DCR"), (call.inputs[0],))


@ATEN.register("pixel_shuffle")
def _pixel_shuffle_from_aten(call: AtenCall) -> Built | None:
    if len(call.shape(call["self"])) != 4:
        return None
    return Built(DepthToSpace(call["upscale_factor"], mode="CRD"), (call["self"],))


@ATEN.register("pixel_unshuffle")
def _pixel_unshuffle_from_aten(call: AtenCall) -> Built | None:
    if len(call.shape(call["self"])) != 4:
        return None
    return Built(SpaceToDepth(call["downscale_factor"], mode="CRD"), (call["self"],))

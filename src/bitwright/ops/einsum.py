"""Sums of products, written as an Einstein equation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bitwright.graph.op import Emitter, Op, Role, Shape
from bitwright.ops.spelling import ATEN, ONNX, AtenCall, Built, OnnxCall


class Einsum(Op):
    """`torch.einsum` of all inputs; the second and later ones count as weights where they are constant."""

    kind = "Einsum"
    roles = (Role.ACTIVATION, Role.WEIGHT)

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation.replace(" ", "")

    def forward(self, *xs: Tensor) -> Tensor:
        result: Tensor = torch.einsum(self.equation, *xs)
        return result

    def _terms(self) -> tuple[list[str], str]:
        left, _, right = self.equation.partition("->")
        terms = left.split(",")
        if "->" not in self.equation:  # implied: letters that occur once, in alphabetical order
            letters = left.replace(",", "").replace("...", "")
            right = "..." * ("..." in left) + "".join(
                sorted(c for c in set(letters) if letters.count(c) == 1)
            )
        return terms, right

    def weight_axis(self, index: int, rank: int) -> int | None:
        """The one axis that this input alone gives to the output, if there is exactly one."""
        terms, right = self._terms()
        if index == 0 or index >= len(terms) or "..." in terms[index]:
            return None
        others = "".join(t for i, t in enumerate(terms) if i != index)
        own = [axis for axis, c in enumerate(terms[index]) if c in right and c not in others]
        return own[0] if len(own) == 1 else None

    def macs(self, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int:
        terms, right = self._terms()
        out = outputs[0]
        if out is None or len(terms) < 2:
            return 0
        lengths = {
            c: n
            for term, shape in zip(terms, inputs, strict=False)
            if shape is not None and "..." not in term
            for c, n in zip(term, shape, strict=False)
        }
        return math.prod(out) * math.prod(n for c, n in lengths.items() if c not in right)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        emit.node("Einsum", inputs, self.outputs, equation=self.equation)

    def describe(self) -> str:
        return self.equation


@ONNX.register("Einsum")
def _einsum_from_onnx(call: OnnxCall) -> Built:
    return Built(Einsum(call.attributes["equation"]), call.inputs)


@ATEN.register("einsum")
def _einsum_from_aten(call: AtenCall) -> Built:
    return Built(Einsum(call["equation"]), tuple(call["tensors"]))

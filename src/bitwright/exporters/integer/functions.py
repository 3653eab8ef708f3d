"""`outlined`: nodes that belong together as one call each of a function that the file defines.

A rescale is ten nodes, a table with segments forty, and a network has hundreds of both: written once, as a function of ONNX, they
make a file that is smaller and can be read. Runtimes put the nodes back in (`onnx.inliner` does so for those that cannot).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from bitwright.exporters.edit import fresh_name, reads_of
from bitwright.plan.code_names import move_codes

#: Where the functions of an integer model live.
DOMAIN = "bitwright"

#: What each function is, for whoever opens the file.
MEANING = {
    "Rescale": "Codes of x: (x * multiplier + offset) >> shift, rounded, minus zero, clipped (docs/numerics.md, 10.2).",
    "RescaleOf": "Multiplier, shift and offset of each channel from what is stored: 2^(shift + room) - zero * multiplier.",
    "Table": "y = table[x], for each of 256 codes (docs/numerics.md, 9).",
    "RegularTable": "y = table(x): 513 entries, evenly spaced, linear in between (docs/numerics.md, 9).",
    "SegmentTable": "y = table(x): segments with entries 2^spacing apart, linear in between (docs/numerics.md, 9).",
    "PeriodicTable": "y = table(x): one period, linear between entries (docs/numerics.md, 9).",
    "Centre": "x minus its zero point, wide enough to compute with.",
    "Product": "(x - zero) * (x2 - zero), exact.",
    "Sum": "Terms in one unit, added: rounded once, later.",
    "Bytes": "Codes of x as unsigned bytes, the high one first (docs/numerics.md, 10.3).",
    "Joined": "Products of single bytes as the product of the whole integers.",
}


@dataclass(frozen=True)
class Block:
    """Nodes *first* … *last* - 1 are one call of function *name*."""

    name: str
    first: int
    last: int


@dataclass
class _Functions:
    """The functions of one file, by what they do. *roles*: constant -> what it is to a function; *literals*: constants for bodies."""

    opset: int
    literals: Mapping[str, npt.NDArray[Any]]
    roles: Mapping[str, str]
    made: dict[bytes, onnx.FunctionProto] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def call(self, name: str, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> onnx.NodeProto:
        """One node in place of *nodes*, which is read as *outputs*."""
        formal, inputs, literals = self._formals(nodes, outputs)
        body = [_constant(formal[n], self.literals[n]) for n in literals]
        for node in nodes:
            inner = helper.make_node(
                node.op_type, [formal.get(n, n) for n in node.input], [formal[n] for n in node.output]
            )
            inner.attribute.extend(node.attribute)
            body.append(inner)
        key = b"".join([name.encode(), *(node.SerializeToString(deterministic=True) for node in body)])
        if key not in self.made:
            self.made[key] = helper.make_function(
                DOMAIN,
                fresh_name(name, self.taken),
                [formal[n] for n in inputs],
                [formal[n] for n in outputs],
                body,
                [helper.make_opsetid("", self.opset)],
                doc_string=MEANING[name],
            )
        called = helper.make_node(self.made[key].name, inputs, outputs, domain=DOMAIN)
        called.name = next((node.name for node in nodes if node.name), "")
        move_codes(nodes, called)
        return called

    def _formals(
        self, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]
    ) -> tuple[dict[str, str], list[str], list[str]]:
        """Names inside the function; the inputs, and the constants of its body, in the order of their first use."""
        formal: dict[str, str] = {}
        taken: set[str] = set()
        inputs: list[str] = []
        literals: list[str] = []
        for node in nodes:
            for name in node.input:
                if name and name not in formal:
                    known = name in self.literals
                    (literals if known else inputs).append(name)
                    formal[name] = fresh_name("c" if known else self.roles.get(name, "x"), taken)
            for name in node.output:
                formal[name] = fresh_name(
                    self.roles.get(name, "y") if name in outputs else node.op_type.lower(), taken
                )
        return formal, inputs, literals


def outlined(
    nodes: Sequence[onnx.NodeProto],
    blocks: Sequence[Block],
    *,
    outputs: Sequence[str],
    literals: Mapping[str, npt.NDArray[Any]],
    roles: Mapping[str, str],
    opset: int,
) -> tuple[list[onnx.NodeProto], list[onnx.FunctionProto]]:
    """*nodes* with each of *blocks* (in order, disjoint) as one call, and the functions that are called.

    What a block leaves is what nodes outside read, what the graph returns as *outputs*, and what nothing reads.
    """
    functions = _Functions(opset, literals, roles)
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for name in reads_of(node):
            readers.setdefault(name, []).append(i)
    found: list[onnx.NodeProto] = []
    done = 0
    for block in (b for b in blocks if b.last - b.first > 1):
        inside = nodes[block.first : block.last]
        left = [
            name
            for node in inside
            for name in node.output
            if name in outputs
            or name not in readers
            or any(not block.first <= i < block.last for i in readers[name])
        ]
        found += nodes[done : block.first]
        found.append(functions.call(block.name, inside, left))
        done = block.last
    return [*found, *nodes[done:]], list(functions.made.values())


def _constant(name: str, array: npt.NDArray[Any]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))

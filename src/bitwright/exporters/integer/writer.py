"""`IntegerWriter`: the writer of single nodes, with short names and a way back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import onnx
from onnx import helper

from bitwright.exporters.edit import fresh_name
from bitwright.exporters.integer.functions import DOMAIN, Block, outlined
from bitwright.exporters.writer import Writer
from bitwright.graph.graph import Graph
from bitwright.graph.op import Op, Shape
from bitwright.plan.code_names import SUFFIX, say_whose_codes


class IntegerWriter(Writer):
    """A `Writer` of single nodes, which can take back what was written last, and makes functions of what recurs.

    *aliases*: further name -> value of the graph. *roles*: constant -> what it is to a function that reads it; *literals*:
    constants that belong into the functions that read them.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.aliases: dict[str, str] = {}
        self.roles: dict[str, str] = {}
        self.literals: dict[str, npt.NDArray[Any]] = {}
        self._blocks: list[Block] = []
        self._depth = 0

    def shape(self, value: str) -> Shape | None:
        return super().shape(self.aliases.get(value, value))

    def node(
        self, op_type: str, inputs: Sequence[str | None], outputs: Sequence[str], **attributes: Any
    ) -> None:
        super().node(op_type, inputs, outputs, **attributes)
        # The nodes of an operator are many and follow one another: only the first is called like it.
        if len(self._nodes) - self._first_node > 1:
            self._nodes[-1].name = ""

    def temporary(self, hint: str) -> str:
        """A short name: a third of a small model would be names else."""
        return fresh_name(f"_{len(self._taken)}", self._taken)

    def begin(self, op: Op) -> None:
        """What is written from now on belongs to *op*."""
        self._op, self._first_node = op, len(self._nodes)

    def take_back(self) -> None:
        """Forget the nodes since `begin`."""
        for node in self._nodes[self._first_node :]:
            for name in node.output:
                self.owners.pop(name, None)
        del self._nodes[self._first_node :]
        self._blocks = [b for b in self._blocks if b.last <= self._first_node]

    @contextmanager
    def function(self, name: str) -> Iterator[None]:
        """What is written meanwhile becomes one call of a function. Inside another function it belongs to that."""
        first = len(self._nodes)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth == 0:
            self._blocks.append(Block(name, first, len(self._nodes)))

    def is_new(self, name: str) -> bool:
        """Whether *name* was written since `begin`, and is not the codes of a value yet."""
        written = any(name in node.output for node in self._nodes[self._first_node :])
        return written and name not in self.aliases

    def model(self) -> onnx.ModelProto:
        nodes = self._nodes
        self._nodes, functions = outlined(
            nodes,
            self._blocks,
            outputs=self.graph.info.outputs,
            literals=self.literals,
            roles=self.roles,
            opset=self.opset,
        )
        made = super().model()
        self._nodes = nodes
        if functions:
            made.functions.extend(functions)
            made.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        return made

    def mark(self, name: str, value: str) -> str:
        """Say in the file that the node which has just written *name* writes the codes of *value*; returns their new name."""
        node = next(n for n in reversed(self._nodes) if name in n.output)
        index = list(node.output).index(name)
        renamed = fresh_name(f"{value}{SUFFIX}", self._taken)
        node.output[index] = renamed
        say_whose_codes(node, renamed, value)
        self.owners[renamed] = self.owners.pop(name)
        self.aliases[renamed] = value
        return renamed

    def begin_edge(self, name: str) -> None:
        """What is written from now on belongs to the graph's input or output *name*."""
        edge = Op()
        edge.name = fresh_name(f"{name}.edge", self._taken)
        self.begin(edge)

    def call_inputs(self, op: Op) -> list[str | None]:
        """Value names of what *op* is called with, numbers as constants."""
        return self._inputs(op)

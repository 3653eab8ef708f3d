"""`IntegerWriter`: the writer of single nodes, with short names and a way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitwright.exporters.edit import fresh_name
from bitwright.exporters.onnx_qdq import VALUE_KEY
from bitwright.exporters.writer import Writer
from bitwright.graph.graph import Graph
from bitwright.graph.op import Op, Shape


class IntegerWriter(Writer):
    """A `Writer` of single nodes, which can take back what was written last. *aliases*: further name -> value of the graph."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.aliases: dict[str, str] = {}

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

    def mark(self, name: str, value: str) -> str:
        """Say in the file that the node which has just written *name* writes the codes of *value*; returns their new name."""
        node = next(n for n in reversed(self._nodes) if name in n.output)
        index = list(node.output).index(name)
        entry = node.metadata_props.add()
        entry.key, entry.value = f"{VALUE_KEY}.{index}" if index else VALUE_KEY, value
        renamed = fresh_name(f"{value}_quantized", self._taken)
        node.output[index] = renamed
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

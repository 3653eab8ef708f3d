"""Putting several operators in the place of one: the common part of the rewrites that take operators apart."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx, nn

from bitwright.graph.graph import Graph, ValueInfo
from bitwright.graph.op import Composite, Op


class Parts:
    """Replaces operator *name* of *graph* by parts `<name>.<part>`, added in execution order; the last makes its value.

    The operator's module becomes a container that holds the author's parameters and buffers under their names.
    """

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph, self.op, self.node = graph, graph.op(name), graph.op_node(name)
        self.target = str(self.node.target)
        self.output = graph.value(self.op.outputs[0]).info
        self.values = dict(graph.info.values)
        self._make_room()

    def add(
        self,
        part: str,
        op: Op,
        args: tuple[object, ...],
        info: ValueInfo,
        *,
        composite: Composite | None = None,
    ) -> fx.Node:
        """Append a part that reads *args* (nodes and literals). *info*: of its value. *returns*: its node."""
        room = self.graph.get_submodule(self.target)
        while hasattr(room, part) or f"{self.op.name}.{part}" in self.values:
            part += "_"
        op.name = f"{self.op.name}.{part}"
        op.outputs = (op.name,)
        op.composite = composite
        op.train(self.op.training)
        target = f"{self.target}.{part}"
        self.graph.add_submodule(target, op)
        self.values[op.outputs[0]] = info
        with self.graph.graph.inserting_before(self.node):
            return self.graph.graph.call_module(target, args)  # type: ignore[arg-type]

    def constant(self, name: str, tensor: Tensor) -> fx.Node:
        """A constant of the parts, which checkpoints leave out."""
        path = f"{self.target}.{name}"
        self.graph.get_submodule(self.target).register_buffer(name, tensor, persistent=False)
        self.values[path] = ValueInfo(tuple(tensor.shape), tensor.dtype)
        with self.graph.graph.inserting_before(self.node):
            return self.graph.graph.get_attr(path)

    def finish(self, result: fx.Node) -> None:
        """Let *result*, the last part, stand for the operator, and make its value."""
        last = self.graph.get_submodule(str(result.target))
        assert isinstance(last, Op)
        del self.values[last.outputs[0]]
        last.outputs = self.op.outputs
        self.node.replace_all_uses_with(result)
        self.graph.graph.erase_node(self.node)
        self.graph.info = replace(self.graph.info, values=self.values)
        self.graph.refresh()

    def info(self, node: fx.Node) -> ValueInfo:
        """What is known of the value that *node*, one of the original graph, computes."""
        return self.graph.value(self.graph.value_name(node)).info

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape that capture saw of that value."""
        shape = self.info(node).shape
        assert shape is not None, "capture saw every tensor's shape"
        return shape

    def _make_room(self) -> None:
        room = nn.Module()
        room._parameters.update(self.op._parameters)
        room._buffers.update(self.op._buffers)
        room._non_persistent_buffers_set.update(self.op._non_persistent_buffers_set)
        room._modules.update(self.op._modules)
        room.training = self.op.training
        path, _, leaf = self.target.rpartition(".")
        self.graph.get_submodule(path)._modules[leaf] = room

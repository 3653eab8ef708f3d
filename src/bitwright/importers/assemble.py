"""Building a `Graph` from operators, constants and names, and looking at its values once.

Both front ends end here, so that a graph looks the same wherever it came from.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor, fx, nn

from bitwright.graph.graph import Graph, GraphInfo, GraphInput, ValueInfo
from bitwright.graph.op import Op
from bitwright.graph.replay import Replay
from bitwright.graph.structure import VALUE_NAME


class Assembler:
    """Collects inputs, constants and operators in execution order; `finish` makes the graph.

    Value names are the public names; module paths are made from operator names and only differ from them where a name
    cannot be an attribute path (empty parts, or a part that is already taken by something else).
    """

    def __init__(self) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.inputs: list[GraphInput] = []
        self.opaque: list[str] = []
        self._nodes: dict[str, fx.Node] = {}

    def __contains__(self, value: str) -> bool:
        return value in self._nodes

    def add_input(self, spec: GraphInput) -> None:
        """Declare a graph input; its value has the input's name."""
        node = self.graph.placeholder(_identifier(spec.name))
        self.inputs.append(spec)
        self._nodes[spec.name] = node

    def add_constant(
        self, path: str, tensor: Tensor, *, parameter: bool | None = None, persistent: bool = True
    ) -> str:
        """Store *tensor* at *path*, once, as a parameter (default: if it is float) or buffer; returns its value name.

        *persistent*: whether checkpoints contain the buffer.
        """
        if path in self._nodes:
            return path
        owner, leaf, target = self._place(path)
        as_parameter = tensor.is_floating_point() if parameter is None else parameter
        if as_parameter:
            held = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=True)
            owner.register_parameter(leaf, held)
        else:
            owner.register_buffer(leaf, tensor, persistent=persistent)
        node = self.graph.get_attr(target)
        node.meta[VALUE_NAME] = path
        self._nodes[path] = node
        return path

    def add_alias(self, path: str, value: str) -> None:
        """Let checkpoints contain the constant *value* under a second *path* too (tied weights)."""
        source, _, key = str(self._nodes[value].target).rpartition(".")
        tensor = getattr(self.root.get_submodule(source), key)
        owner, leaf, _ = self._place(path)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)

    def add_op(self, op: Op, name: str, inputs: Sequence[Any], outputs: Sequence[str]) -> None:
        """Append operator *op* called *name*. *inputs*: value names (str), numbers, or None. *outputs*: value names."""
        op.name, op.outputs = name, tuple(outputs)
        owner, leaf, target = self._place(name, op)
        held = owner._modules.get(leaf)
        if held is not None:  # parameters or inner operators are already stored at this path: move them over
            _adopt(op, held)
        owner.add_module(leaf, op)
        args = tuple(self._nodes[i] if isinstance(i, str) else i for i in inputs)
        node = self.graph.call_module(target, args)
        if len(outputs) == 1:
            self._nodes[outputs[0]] = node
            return
        for index, value in enumerate(outputs):
            if value:
                self._nodes[value] = self.graph.call_function(operator.getitem, (node, index))

    def finish(self, outputs: Any, info: GraphInfo) -> Graph:
        """The graph that returns *outputs*: value names (or None, numbers) in any nesting of tuples, lists and dicts.

        Operators that nothing reads are dropped.
        """
        self.graph.output(torch.utils._pytree.tree_map(lambda o: self._nodes.get(o, o), outputs))
        for node in reversed(list(self.graph.nodes)):
            if node.op not in ("placeholder", "output") and not node.users:
                self.graph.erase_node(node)
        info = replace(info, inputs=tuple(self.inputs), opaque=tuple(self.opaque))
        self.root.eval()
        graph = Graph.build(self.root, self.graph, info)
        leaves = torch.utils._pytree.tree_leaves(graph.graph.output_node().args[0])
        # Public output names: what the values are called (an output may be an input or a constant).
        names = tuple(graph.value_name(leaf) for leaf in leaves if isinstance(leaf, fx.Node))
        graph.info = replace(graph.info, outputs=names)
        return graph

    # --- where things are stored ---------------------------------------------------------------------------

    def _place(self, path: str, op: Op | None = None) -> tuple[nn.Module, str, str]:
        """The module that will hold *path*'s last part, created if need be; that part; and the whole path.

        All are free of collisions.
        """
        parts = [p for p in path.replace('"', "'").replace("\\", "/").split(".") if p] or ["_"]
        owner, keys = self.root, []
        for part in parts[:-1]:
            key = part
            while not isinstance(owner._modules.get(key), nn.Module) and self._is_taken(owner, key):
                key += "_"
            if key not in owner._modules:
                owner.add_module(key, nn.Module())
            child = owner._modules[key]
            assert child is not None
            owner = child
            keys.append(key)
        leaf = parts[-1]
        while self._is_taken(owner, leaf) and not (
            op is not None and _can_adopt(op, owner._modules.get(leaf))
        ):
            leaf += "_"
        return owner, leaf, ".".join([*keys, leaf])

    def _is_taken(self, owner: nn.Module, key: str) -> bool:
        # The root's contents end in a `Graph`, whose own attributes they must not hide.
        return hasattr(owner, key) or (owner is self.root and (key == "info" or hasattr(Graph, key)))


def _can_adopt(op: Op, held: nn.Module | None) -> bool:
    """True if *held* only stores things at the operator's path, under names that the operator does not use itself."""
    if held is None or isinstance(held, Op):
        return False
    keys = (*held._parameters, *held._buffers, *held._modules)
    return not any(hasattr(op, key) for key in keys)


def _adopt(op: Op, held: nn.Module) -> None:
    for key, parameter in held._parameters.items():
        op.register_parameter(key, parameter)
    for key, buffer in held._buffers.items():
        op.register_buffer(key, buffer, persistent=key not in held._non_persistent_buffers_set)
    for key, child in held._modules.items():
        op.add_module(key, child)


def _identifier(name: str) -> str:
    cleaned = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    return cleaned if cleaned and not cleaned[0].isdigit() else f"_{cleaned}"


def look_at_values(
    graph: Graph, example: Mapping[str, Tensor], double: Mapping[str, Tensor] | None
) -> dict[str, ValueInfo]:
    """Shapes and dtypes of all values for *example*, and which axis follows the batch.

    *double*: the same inputs with twice the batch, or None if the batch is fixed.
    """
    replay = Replay(graph)
    first = replay.run(example, keep=None)
    second = replay.run(double, keep=None) if double is not None else {}
    found = {}
    for name, value in graph.values.items():
        if value.is_constant:
            tensor = graph.constant(name)
            found[name] = ValueInfo(tuple(tensor.shape), tensor.dtype)
        else:
            found[name] = _compare(first[name], second.get(name))
    return found


def _compare(x: Any, y: Any) -> ValueInfo:
    if not isinstance(x, Tensor):
        return ValueInfo(None, None, scales=y is not None and y == 2 * x and x != 0)
    info = ValueInfo(tuple(x.shape), x.dtype)
    if not isinstance(y, Tensor):
        return info
    grown = [i for i, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if b == 2 * a]
    if len(grown) == 1:
        return replace(info, batch_axis=grown[0])
    if x.dtype not in (torch.int32, torch.int64) or x.shape != y.shape or x.dim() > 1 or bool((x == y).all()):
        return info
    if x.dim() == 0:
        return replace(info, scales=bool(y == 2 * x))
    grown = [i for i, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)) if a != b]
    return replace(info, scaled_entries=tuple(grown) if bool((y[grown] == 2 * x[grown]).all()) else ())

"""What a network computes in training alone (auxiliary heads, other outputs), beside what it computes in evaluation.

Both are captured; operators that both have are found by what they compute, the others are added, and both structures of outputs kept.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.graph.graph import Graph
from bitwright.graph.op import Op, Role
from bitwright.graph.structure import VALUE_NAME, graph_of, records_of

_SUFFIX = "_training"


@dataclass(frozen=True)
class OfValue:
    """In the structure of the outputs: the value called *name*."""

    name: str


@dataclass(frozen=True)
class TrainingBranch:
    """*graph*: the evaluation graph, on the same modules, with the operators *ops* added, which only training needs. *outputs*: what
    training returns, `OfValue` in the place of tensors.
    """

    graph: Graph
    ops: frozenset[str]
    outputs: Any


def join_training(graph: Graph, trained: Graph) -> TrainingBranch | None:
    """*graph* (evaluation) with what *trained*, the same network in training, computes besides. None if they cannot be matched: a weight
    that both read would be read by different operators, and one of these never be quantized.
    """
    if [i.name for i in graph.info.inputs] != [i.name for i in trained.info.inputs]:
        return None
    return _Joining(graph, trained).done()


class _Joining:
    def __init__(self, graph: Graph, trained: Graph) -> None:
        self.trained = trained
        self.made = Graph.build(graph, graph_of(records_of(graph.graph)), graph.info)
        self._known: dict[Any, list[Op]] = {}
        for op in self.made.ops:
            self._known.setdefault(_key(self.made, op, {}), []).append(op)
        #: Value of the training graph -> the same in the joined one, and its node there.
        self._names = {i.name: i.name for i in trained.info.inputs}
        self._nodes = {name: value.node for name, value in self.made.values.items()}
        self._added: list[str] = []

    def done(self) -> TrainingBranch | None:
        weights = {v.name for v in self.made.values.values() if v.is_constant}
        output = self.made.graph.output_node()
        with self.made.graph.inserting_before(output):
            for op in self.trained.ops:
                if self._match(op):
                    continue
                for name, role in zip(self.trained.op_inputs(op.name), op.roles, strict=False):
                    if role is Role.WEIGHT and name in weights:
                        return None
                if not self._add(op):
                    return None
        outputs = fx.map_arg(
            self.trained.graph.output_node().args[0],
            lambda node: OfValue(self._names[self.trained.value_name(node)]),  # type: ignore[arg-type,return-value]
        )
        self.made.refresh()
        return TrainingBranch(self.made, frozenset(self._added), outputs)

    def _match(self, op: Op) -> bool:
        """Whether the evaluation graph computes the same."""
        for name in self.trained.op_inputs(op.name):
            if name is not None and not self._is_known(name):
                return False
        same = self._known.get(_key(self.trained, op, self._names))
        if not same:
            return False
        self._names.update(zip(op.outputs, same.pop(0).outputs, strict=True))
        return True

    def _is_known(self, name: str) -> bool:
        if name in self._names:
            return True
        here = self.made.values.get(name)
        if not self.trained.value(name).is_constant or here is None or not here.is_constant:
            return False
        if not torch.equal(self.made.constant(name), self.trained.constant(name)):
            return False
        self._names[name] = name
        return True

    # --- what is added ---------------------------------------------------------------------------------------

    def _add(self, op: Op) -> bool:
        node = self.trained.op_node(op.name)
        args: list[Any] = []
        for arg in node.args:
            if not isinstance(arg, fx.Node):
                args.append(arg)
                continue
            name = self.trained.value_name(arg)
            if not self._is_known(name) and not self._add_constant(name):
                return False
            args.append(self._nodes[self._names[name]])
        path = self._place(str(node.target), op)
        taken = {*self.made.op_names, *self._added}
        old = op.outputs
        op.name = op.name if op.name not in taken else op.name + _SUFFIX
        op.outputs = tuple(o if not o or o not in self._nodes else o + _SUFFIX for o in old)
        self._added.append(op.name)
        call = self.made.graph.call_module(path, tuple(args))
        self._names.update((a, b) for a, b in zip(old, op.outputs, strict=True) if a)
        self._remember(op, call)
        return True

    def _remember(self, op: Op, call: fx.Node) -> None:
        if len(op.outputs) == 1:
            self._nodes[op.outputs[0]] = call
            return
        for index, name in enumerate(op.outputs):
            if name:
                self._nodes[name] = self.made.graph.call_function(operator.getitem, (call, index))

    def _add_constant(self, name: str) -> bool:
        """A constant that evaluation does not read: state that is there all the same, or a number in the code of the branch."""
        value = self.trained.value(name)
        if not value.is_constant:
            return False
        path, tensor = str(value.node.target), self.trained.constant(name)
        held = _tensor_at(self.made, path)
        if held is None:
            owner, leaf = _owner(self.made, path)
            if hasattr(owner, leaf):
                return False
            owner.register_buffer(leaf, tensor, persistent=False)
        elif not torch.equal(held, tensor):
            return False
        node = self.made.graph.get_attr(path)
        node.meta[VALUE_NAME] = name
        self._names[name], self._nodes[name] = name, node
        return True

    def _place(self, path: str, op: Op) -> str:
        """Puts *op* at *path*, on what is stored there (its parameters), or beside what stands there. *returns*: its path."""
        owner, leaf = _owner(self.made, path)
        held = owner._modules.get(leaf)
        op._parameters.clear()
        op._buffers.clear()
        op._modules.clear()
        if held is None and not hasattr(owner, leaf):
            owner.add_module(leaf, op)
            return path
        if held is None or isinstance(held, Op):
            return self._place(path + _SUFFIX, op)
        op._parameters.update(held._parameters)
        op._buffers.update(held._buffers)
        op._modules.update(held._modules)
        op._non_persistent_buffers_set |= held._non_persistent_buffers_set
        owner._modules[leaf] = op
        return path


def _key(graph: Graph, op: Op, names: Mapping[str, str]) -> Any:
    """What an operator computes, and of what. *names*: of values in the graph that is compared with."""
    args = []
    for arg in graph.op_node(op.name).args:
        name = graph.value_name(arg) if isinstance(arg, fx.Node) else None
        args.append(("value", names.get(name, name)) if name is not None else ("number", repr(arg)))
    return op.kind, op.describe(), len(op.outputs), tuple(args)


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the last part of *path*, made if there is none, and that part."""
    *parts, leaf = path.split(".")
    owner = root
    for part in parts:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    return owner, leaf


def _tensor_at(root: nn.Module, path: str) -> Tensor | None:
    held: Any = root
    for part in path.split("."):
        held = getattr(held, part, None)
    return held if isinstance(held, Tensor) else None

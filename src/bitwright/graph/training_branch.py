"""What a network computes in training alone (auxiliary heads, other outputs), beside what it computes in evaluation.

Both are captured; operators that both have are found by what they compute, the others are added, and both structures of outputs kept.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.graph.graph import Graph
from bitwright.graph.op import Op, Role
from bitwright.graph.replay import Replay
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
    that both read would be read by different operators, and one of these never be quantized; or stored tensors differ.
    """
    if [i.name for i in graph.info.inputs] != [i.name for i in trained.info.inputs]:
        return None
    return _Joining(graph, trained).done()


def is_faithful(branch: TrainingBranch, trained: Graph, example: Mapping[str, Tensor]) -> bool:
    """Whether the joined graph gives the outputs of *trained* for *example*, both in evaluation mode: nothing was taken for something else."""
    expected = Replay(trained.eval()).run(example, keep=None)
    found = Replay(branch.graph.eval()).run(example, keep=None)
    pairs: list[tuple[Tensor, Tensor]] = []

    def compare(node: fx.Node, joined: Any) -> None:
        name = trained.value_name(node)
        if not trained.value(name).is_constant:
            pairs.append((expected[name], found[joined.name]))

    _walk(trained.graph.output_node().args[0], branch.outputs, compare)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in pairs
    )


def _walk(structure: Any, other: Any, do: Callable[[fx.Node, Any], None]) -> None:
    if isinstance(structure, fx.Node):
        do(structure, other)
    elif isinstance(structure, dict):
        for key, part in structure.items():
            _walk(part, other[key], do)
    elif isinstance(structure, (list, tuple)):
        for part, same in zip(structure, other, strict=True):
            _walk(part, same, do)


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
        self._stored = {str(n.target) for n in trained.graph.nodes} | {*trained.state_dict()}

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
            outputs = self._outputs()
        self.made.refresh()
        return None if outputs is None else TrainingBranch(self.made, frozenset(self._added), outputs)

    def _outputs(self) -> Any:
        """What training returns; None if that is something which evaluation does not have."""
        output = self.trained.graph.output_node()
        for node in output.all_input_nodes:
            name = self.trained.value_name(node)
            if not self._is_known(name) and not self._add_constant(name):
                return None
        return fx.map_arg(
            output.args[0],
            lambda node: OfValue(self._names[self.trained.value_name(node)]),  # type: ignore[arg-type,return-value]
        )

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
        own = self._copied(op, str(node.target))
        path = self._place(str(node.target), own)
        taken = {*self.made.op_names, *self._added}
        own.name = own.name if own.name not in taken else own.name + _SUFFIX
        own.outputs = tuple(o if not o or o not in self._nodes else o + _SUFFIX for o in op.outputs)
        self._added.append(own.name)
        self._names.update((a, b) for a, b in zip(op.outputs, own.outputs, strict=True) if a)
        self._remember(own, self.made.graph.call_module(path, tuple(args)))
        return True

    def _copied(self, op: Op, path: str) -> Op:
        """*op* without what is only stored at its *path*: parameters of the author's, operators inside."""
        own = copy.copy(op)
        for held in ("_parameters", "_buffers", "_modules"):
            inside: dict[str, Any] = vars(op)[held]
            vars(own)[held] = {
                key: x
                for key, x in inside.items()
                if not any(t == f"{path}.{key}" or t.startswith(f"{path}.{key}.") for t in self._stored)
            }
        own._non_persistent_buffers_set = {*op._non_persistent_buffers_set}
        return own

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

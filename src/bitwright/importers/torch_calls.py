"""The calls of a functional exported graph as operators: builders asked, no-ops dropped, what nobody reads left out."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.errors import ModelError
from bitwright.graph.op import Op
from bitwright.importers.torch_functional import kind, where
from bitwright.importers.torch_names import Stack, leaf_calls, module_stack
from bitwright.ops.int_arithmetic import INTEGER_FUNCTIONS, integer_arithmetic
from bitwright.ops.opaque import opaque_from_node
from bitwright.ops.spelling import ATEN, AtenCall, Built

#: Calls that give back their first argument.
_NOTHING = {"detach", "alias", "contiguous", "clone", "lift_fresh_copy", "lift_fresh", "lift"}
#: Calls that do so if the dtype stays.
_CONVERSIONS = {"to", "_to_copy", "type_as"}
#: Calls for their effect; torch marks them as checks, not computations.
_CHECKS = ("_assert", "sym_constrain", "_check")


@dataclass(frozen=True)
class Call:
    """One operator to be. *inputs*: nodes, numbers, None. *count*: of the outputs if they come as a tuple, else None.

    *elements*: output index -> the getitem nodes that stand for it. *token*: lower-case operator name.
    """

    node: fx.Node
    op: Op
    inputs: tuple[Any, ...]
    count: int | None
    stack: Stack
    token: str
    elements: dict[int, list[fx.Node]] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The path of the innermost module."""
        return self.stack[-1][1] if self.stack else ""


def read_calls(
    graph: fx.Graph, model: nn.Module, canonical: Mapping[str, str]
) -> tuple[list[Call], Sequence[Any]]:
    """The operators of *graph* in execution order, and the nodes (or numbers, None) that it returns."""
    return _CallReader(graph, model, canonical).read()


class _CallReader:
    def __init__(self, graph: fx.Graph, model: nn.Module, canonical: Mapping[str, str]) -> None:
        self._graph, self._model, self._canonical = graph, model, canonical
        self._same: dict[fx.Node, fx.Node] = {}
        self._calls: dict[fx.Node, Call] = {}

    def read(self) -> tuple[list[Call], Sequence[Any]]:
        found = [n for n in self._graph.nodes if n.op == "call_function" and not self._is_nothing(n)]
        used = _reachable(self._graph)
        computing = [n for n in found if n in used and n.target is not operator.getitem]
        stacks = {n: module_stack(n, self._canonical) for n in computing}
        self._leaves = leaf_calls(stacks.values())
        for node in found:
            if node.target is operator.getitem:
                self._add_element(node)
            elif node in stacks:
                self._calls[node] = self._call(node, stacks[node])
        outputs = [self._resolved(o) for o in self._graph.output_node().args[0]]  # type: ignore[union-attr]
        return list(self._live(outputs)), outputs

    def _is_nothing(self, node: fx.Node) -> bool:
        """True for calls that compute nothing; remembers what they stand for."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        name = node.target.overloadpacket.__name__
        if name.startswith(_CHECKS):
            return True
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        if name in _NOTHING or (name in _CONVERSIONS and _dtype(node) == _dtype(source)):
            self._same[node] = self._resolved(source)
            return True
        return False

    def _resolved(self, x: Any) -> Any:
        return self._same.get(x, x) if isinstance(x, fx.Node) else x

    def _add_element(self, node: fx.Node) -> None:
        source, index = node.args
        call = self._calls.get(source) if isinstance(source, fx.Node) else None
        if call is not None:
            assert isinstance(index, int)
            call.elements.setdefault(index, []).append(node)

    def _call(self, node: fx.Node, stack: Stack) -> Call:
        built = self._build(node, stack)
        val = node.meta.get("val")
        count = len(val) if isinstance(val, (tuple, list)) else None
        inputs = tuple(self._resolved(i) for i in built.inputs)
        return Call(node, built.op, inputs, count, stack, kind(node).rpartition(".")[2].lower())

    def _build(self, node: fx.Node, stack: Stack) -> Built:
        if node.target in INTEGER_FUNCTIONS:
            return integer_arithmetic(node.target, node.args)  # type: ignore[arg-type]
        if isinstance(node.target, torch._ops.OpOverload):
            if _draws(node.target):
                raise ModelError(
                    where(node),
                    expected="a forward without chance in evaluation mode",
                    found=kind(node),
                    remedy="Draw random numbers outside and pass them as an input.",
                )
            builder = ATEN.find(node.target.overloadpacket.__name__)
            built = builder(self._aten_call(node, node.target, stack)) if builder else None
            if built is not None:
                return built
        return opaque_from_node(node)

    def _aten_call(self, node: fx.Node, target: Any, stack: Stack) -> AtenCall:
        arguments: dict[str, Any] = {}
        for i, argument in enumerate(target._schema.arguments):
            if i < len(node.args):
                arguments[argument.name] = node.args[i]
            elif argument.name in node.kwargs:
                arguments[argument.name] = node.kwargs[argument.name]
            else:
                arguments[argument.name] = argument.default_value
        leaf = None
        if stack and stack[-1][0] in self._leaves:
            leaf = self._model.get_submodule(stack[-1][1])
        val = node.meta.get("val")
        first = val[0] if isinstance(val, (tuple, list)) and val else val
        return AtenCall(
            target.overloadpacket.__name__,
            fx.map_arg(arguments, self._resolved),  # type: ignore[arg-type]
            lambda n: _shape(n.meta.get("val")),
            _shape(first),
            leaf,
        )

    def _live(self, outputs: Sequence[Any]) -> Iterator[Call]:
        """The calls that the outputs depend on, in execution order."""
        needed = {o for o in outputs if isinstance(o, fx.Node)}
        live = []
        for call in reversed(self._calls.values()):
            nodes = {call.node, *(e for es in call.elements.values() for e in es)}
            if nodes & needed:
                needed.update(i for i in call.inputs if isinstance(i, fx.Node))
                live.append(call)
        return reversed(live)


def _reachable(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the outputs depend on."""
    found: set[fx.Node] = set()
    waiting = list(graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _shape(val: Any) -> tuple[int | None, ...]:
    return tuple(d if isinstance(d, int) else None for d in val.shape) if isinstance(val, Tensor) else ()


def _dtype(node: fx.Node) -> torch.dtype | None:
    val = node.meta.get("val")
    return val.dtype if isinstance(val, Tensor) else None


def _draws(target: torch._ops.OpOverload) -> bool:
    """True for operators that always draw random numbers (dropout in evaluation does not)."""
    return (
        torch.Tag.nondeterministic_seeded in target.tags
        and target.overloadpacket.__name__ not in _QUIET_RANDOM
    )


#: Marked as random by torch, but not in evaluation mode.
_QUIET_RANDOM = {
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "rrelu",
    "scaled_dot_product_attention",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
}

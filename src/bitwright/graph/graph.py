"""`Graph`: a `torch.fx.GraphModule` whose operators are named `Op` modules, and what is known of its values."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.errors import UnknownName
from bitwright.graph.op import Op, Role, Shape
from bitwright.graph.structure import VALUE_NAME, Record, graph_of, held_by, keep_state, module_of, records_of

#: The consumer name that stands for "this value is an output of the graph".
OUTPUT = "<output>"


@dataclass(frozen=True)
class ValueInfo:
    """What capture saw of a value. *shape*: at batch size `GraphInfo.example_batch`, None for Python integers.

    *batch_axis*: the axis whose length is proportional to the batch size, or None. *scales*: an integer value that is
    itself proportional to the batch size. *scaled_entries*: places in an integer vector that are so (a shape's batch).
    """

    shape: Shape | None
    dtype: torch.dtype | None
    batch_axis: int | None = None
    scales: bool = False
    scaled_entries: tuple[int, ...] = ()

    @property
    def is_float(self) -> bool:
        """True for real-valued tensors, the only ones that can be quantized."""
        return self.dtype is not None and self.dtype.is_floating_point


@dataclass(frozen=True)
class GraphInput:
    """One input of the graph; a None in *shape* is a dynamic dimension."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class FoldedBatchNorm:
    """A record left by the batch-norm rewrite: operator *conv* now ends where *batchnorm* ended."""

    conv: str
    batchnorm: str


@dataclass(frozen=True)
class GraphInfo:
    """Facts about a graph that are not operators. *source*: `torch` or `onnx`; *onnx_model*: the user's own model."""

    source: str
    inputs: tuple[GraphInput, ...]
    outputs: tuple[str, ...]
    dynamic_batch: bool
    example_batch: int = 1
    values: Mapping[str, ValueInfo] = field(default_factory=dict)
    opaque: tuple[str, ...] = ()
    folded: tuple[FoldedBatchNorm, ...] = ()
    #: An `onnx.ModelProto` at opset 21 or later, for graphs that came from ONNX.
    onnx_model: Any = None


@dataclass(frozen=True)
class Reader:
    """One use of a value: operator *op* reads it at input *index* with *role*."""

    op: str
    index: int
    role: Role


@dataclass(frozen=True)
class Value:
    """A value: graph input, constant (weight, bias, buffer) or operator output."""

    name: str
    node: fx.Node
    producer: str | None
    readers: tuple[Reader, ...]
    is_constant: bool
    is_output: bool
    info: ValueInfo


class Graph(fx.GraphModule):
    """An fx graph of named operators. Callable like the module it was captured from; `info` holds what is known.

    It can be pickled, whole: `info.onnx_model` is kept (`without_onnx_model` makes a lighter graph), tensors that are shared
    stay shared.
    """

    def __init__(
        self, root: nn.Module | dict[str, Any], graph: fx.Graph, class_name: str = "Graph", **_: Any
    ) -> None:
        super().__init__(root, graph, class_name)

    @property
    def info(self) -> GraphInfo:
        """What is known of the graph; setting it makes `values` new."""
        known: GraphInfo = self.__dict__["_info"]
        return known

    @info.setter
    def info(self, known: GraphInfo) -> None:
        self.__dict__["_info"] = known
        self._forget()

    def _forget(self) -> None:
        for cached in ("_op_nodes", "_input_names", "values"):
            self.__dict__.pop(cached, None)

    @classmethod
    def build(cls, root: nn.Module, graph: fx.Graph, info: GraphInfo) -> Graph:
        """A graph over the modules of *root*; every operator's `name` and `outputs` must be set."""
        made = cls(root, graph)
        keep_state(made, root, {})
        made.info = info
        made.train(root.training)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        # Cached look-ups hold fx nodes, whose deep copy follows their links, one stack frame each.
        self._forget()
        made = super().__deepcopy__(memo)
        assert isinstance(made, Graph)
        keep_state(made, self, memo)
        made.info = replace(
            self.info, values=dict(self.info.values), onnx_model=copy.copy(self.info.onnx_model)
        )
        made.train(self.training)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        # fx would keep generated code and trace it again: names of values, and whatever tracing does not see, would be lost.
        return _restored, (held_by(self), records_of(self.graph), self.info)

    def without_onnx_model(self) -> Graph:
        """The same graph, on the same parameters, without the user's own file: all that is needed to execute it."""
        return Graph.build(self, copy.deepcopy(self.graph), replace(self.info, onnx_model=None))

    def _get_name(self) -> str:
        return "Graph"

    # --- operators -------------------------------------------------------------------------------------------

    @cached_property
    def _op_nodes(self) -> dict[str, fx.Node]:
        return {self._op_at(n).name: n for n in self.graph.nodes if n.op == "call_module"}

    def _op_at(self, node: fx.Node) -> Op:
        module = self.get_submodule(str(node.target))
        assert isinstance(module, Op), f"{node.target} is not an operator"
        return module

    @property
    def ops(self) -> Iterator[Op]:
        """The operators in execution order."""
        return (self._op_at(n) for n in self._op_nodes.values())

    @property
    def op_names(self) -> list[str]:
        """Operator names in execution order."""
        return list(self._op_nodes)

    def op(self, name: str) -> Op:
        """The operator called *name*. *raises* `UnknownName`."""
        return self._op_at(self.op_node(name))

    def op_node(self, name: str) -> fx.Node:
        """The fx node of the operator called *name*. *raises* `UnknownName`."""
        if name not in self._op_nodes:
            raise UnknownName("graph", kind="operator", name=name, known=self._op_nodes)
        return self._op_nodes[name]

    def op_inputs(self, name: str) -> list[str | None]:
        """Value names of the operator's inputs, None where an optional one is absent or a Python scalar stands."""
        return [self.value_name(a) if isinstance(a, fx.Node) else None for a in self.op_node(name).args]

    # --- values ----------------------------------------------------------------------------------------------

    def value_name(self, node: fx.Node) -> str:
        """The name of the value that *node* computes (the first one, for operators with several outputs)."""
        if node.op == "call_module":
            return self._op_at(node).outputs[0]
        if node.op == "call_function" and node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(index, int)
            return self._op_at(source).outputs[index]
        if node.op == "placeholder":
            return self._input_names[node]
        return str(node.meta.get(VALUE_NAME, node.target))

    @cached_property
    def _input_names(self) -> dict[fx.Node, str]:
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        return {n: spec.name for n, spec in zip(placeholders, self.info.inputs, strict=True)}

    @cached_property
    def values(self) -> dict[str, Value]:
        """All values by name, in execution order."""
        found: dict[str, Value] = {}
        for node in self.graph.nodes:
            if node.op == "output" or self._is_tuple(node):
                continue
            name = self.value_name(node)
            producer = None
            if node.op == "call_module":
                producer = self._op_at(node).name
            elif node.op == "call_function":
                producer = self._op_at(node.args[0]).name
            found[name] = Value(
                name,
                node,
                producer,
                self._readers(node),
                node.op == "get_attr",
                any(u.op == "output" for u in node.users),
                self.info.values.get(name, ValueInfo(None, None)),
            )
        return found

    def value(self, name: str) -> Value:
        """The value called *name*. *raises* `UnknownName`."""
        if name not in self.values:
            raise UnknownName("graph", kind="value", name=name, known=self.values)
        return self.values[name]

    @staticmethod
    def _is_tuple(node: fx.Node) -> bool:
        return any(u.op == "call_function" and u.target is operator.getitem for u in node.users)

    def _readers(self, node: fx.Node) -> tuple[Reader, ...]:
        found = []
        for user in node.users:
            if user.op != "call_module":
                continue
            op = self._op_at(user)
            found += [Reader(op.name, i, op.role(i)) for i, a in enumerate(user.args) if a is node]
        return tuple(found)

    def constant(self, name: str) -> Tensor:
        """The tensor of a constant value (weight, bias, buffer)."""
        path, _, last = str(self.value(name).node.target).rpartition(".")
        tensor = getattr(self.get_submodule(path), last)
        assert isinstance(tensor, Tensor)
        return tensor

    def refresh(self) -> None:
        """Forget cached look-ups and regenerate code; call after editing `graph`."""
        self._forget()
        self.graph.lint()
        self.recompile()

    # --- facts -----------------------------------------------------------------------------------------------

    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of each operator per sample (capture's example batch divided out)."""

        def shape(name: str | None) -> Shape | None:
            held = None if name is None else self.values.get(name)
            return None if held is None else held.info.shape

        return {
            op.name: op.macs([shape(v) for v in self.op_inputs(op.name)], [shape(v) for v in op.outputs])
            // max(1, self.info.example_batch)
            for op in self.ops
        }


def _restored(held: Mapping[str, Any], records: list[Record], info: GraphInfo) -> Graph:
    """The graph that `Graph.__reduce__` took apart."""
    return Graph.build(module_of(held), graph_of(records), info)

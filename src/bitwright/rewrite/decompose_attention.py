"""Attention taken apart into the operators that integer hardware has: two matrix products, a scale, a mask, a softmax."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import fx, nn

from bitwright.graph.graph import Graph, ValueInfo
from bitwright.graph.op import Op
from bitwright.ops.attention import Attention
from bitwright.ops.elementwise import Elementwise
from bitwright.ops.linear import MatMul
from bitwright.ops.shape import Transpose
from bitwright.ops.softmax import Softmax
from bitwright.ops.where import Where


def decompose_attention(graph: Graph) -> Graph:
    """A copy of *graph* in which every `Attention` became `<name>.k_transposed`, `.qk`, `.scale`, `.mask`, `.softmax`, `.av`.

    `.mask` is there only if there is a mask; `.av` makes the value that the attention made.
    """
    taken_apart = copy.deepcopy(graph)
    for name in graph.op_names:
        if isinstance(taken_apart.op(name), Attention):
            _Decomposition(taken_apart, name).run()
            taken_apart.refresh()
    return taken_apart


class _Decomposition:
    """Replaces one attention operator."""

    def __init__(self, graph: Graph, name: str) -> None:
        op = graph.op(name)
        assert isinstance(op, Attention)
        self._graph, self._op, self._node = graph, op, graph.op_node(name)
        self._target = str(self._node.target)
        self._output = graph.value(op.outputs[0]).info
        self._values = dict(graph.info.values)

    def run(self) -> None:
        q, k, v, mask = (*self._node.args, None)[:4]
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        queries, keys = self._shape(q), self._shape(k)
        self._make_room()
        rank = len(keys)
        order = [*range(rank - 2), rank - 1, rank - 2]
        turned_info = ValueInfo(tuple(keys[i] for i in order), self._output.dtype, self._info(k).batch_axis)
        turned = self._add("k_transposed", Transpose(order), (k,), turned_info)
        assert self._output.shape is not None
        scores = replace(self._output, shape=(*self._output.shape[:-1], keys[-2]))
        x = self._add("qk", MatMul(), (q, turned), scores)
        factor = self._op.factor(queries[-1])
        x = self._add("scale", self._times(factor), (x,), scores)
        x = self._masked(x, mask, queries[-2], keys[-2], scores)
        x = self._add("softmax", Softmax("Softmax", axis=-1), (x,), scores)
        result = self._add("av", MatMul(), (x, v), self._output, output=self._op.outputs[0])
        self._node.replace_all_uses_with(result)
        self._graph.graph.erase_node(self._node)
        self._graph.info = replace(self._graph.info, values=self._values)

    def _times(self, factor: float) -> Elementwise:
        dtype = self._output.dtype or torch.float32
        return Elementwise("Mul", scalar=factor, dtypes=(dtype,), computes_in=dtype)

    def _masked(self, x: fx.Node, mask: object, queries: int, keys: int, info: ValueInfo) -> fx.Node:
        if self._op.is_causal:
            visible = torch.ones(queries, keys, dtype=torch.bool).tril()
            self._graph.get_submodule(self._target).register_buffer("causal", visible, persistent=False)
            with self._graph.graph.inserting_before(self._node):
                mask = self._graph.graph.get_attr(f"{self._target}.causal")
            self._values[f"{self._target}.causal"] = ValueInfo((queries, keys), torch.bool)
        if mask is None:
            return x
        if self._op.is_causal or self._op.is_boolean:
            return self._add("mask", Where(b=float("-inf"), dtype=info.dtype), (mask, x), info)
        return self._add("mask", Elementwise("Add"), (x, mask), info)

    def _add(
        self, part: str, op: Op, args: tuple[object, ...], info: ValueInfo, *, output: str | None = None
    ) -> fx.Node:
        op.name = f"{self._op.name}.{part}"
        op.outputs = (output or op.name,)
        op.train(self._op.training)
        target = f"{self._target}.{part}"
        self._graph.add_submodule(target, op)
        self._values[op.outputs[0]] = info
        with self._graph.graph.inserting_before(self._node):
            return self._graph.graph.call_module(target, args)  # type: ignore[arg-type]

    def _make_room(self) -> None:
        """An empty module in the place of the operator, with what else was stored there."""
        room = nn.Module()
        room._parameters.update(self._op._parameters)
        room._buffers.update(self._op._buffers)
        room._modules.update(self._op._modules)
        path, _, leaf = self._target.rpartition(".")
        self._graph.get_submodule(path)._modules[leaf] = room

    def _info(self, node: fx.Node) -> ValueInfo:
        return self._graph.value(self._graph.value_name(node)).info

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        shape = self._info(node).shape
        assert shape is not None, "capture saw every tensor's shape"
        return shape

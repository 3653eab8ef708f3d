"""Attention taken apart into the operators that integer hardware has: two matrix products, a scale, a mask, a softmax."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import fx

from bitwright.graph.graph import Graph, ValueInfo
from bitwright.ops.attention import Attention
from bitwright.ops.dropout import Dropout
from bitwright.ops.elementwise import Elementwise
from bitwright.ops.linear import MatMul
from bitwright.ops.shape import Transpose
from bitwright.ops.softmax import Softmax
from bitwright.ops.where import Where
from bitwright.rewrite.parts import Parts


def decompose_attention(graph: Graph) -> Graph:
    """A copy of *graph* in which every `Attention` became `<name>.k_transposed`, `.qk`, `.scale`, `.mask`, `.softmax`,
    `.dropout`, `.av`.

    `.mask` is there only if there is a mask, `.dropout` if weights are dropped in training; `.av` makes the value that the
    attention made.
    """
    taken_apart = copy.deepcopy(graph)
    for name in graph.op_names:
        op = taken_apart.op(name)
        if isinstance(op, Attention):
            _take_apart(op, Parts(taken_apart, name))
    return taken_apart


def _take_apart(op: Attention, parts: Parts) -> None:
    q, k, v, mask = (*parts.node.args, None)[:4]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    queries, keys = parts.shape(q), parts.shape(k)
    rank = len(keys)
    order = [*range(rank - 2), rank - 1, rank - 2]
    turned_info = ValueInfo(tuple(keys[i] for i in order), parts.output.dtype, parts.info(k).batch_axis)
    turned = parts.add("k_transposed", Transpose(order), (k,), turned_info)
    assert parts.output.shape is not None
    scores = replace(parts.output, shape=(*parts.output.shape[:-1], keys[-2]))
    x = parts.add("qk", MatMul(), (q, turned), scores)
    dtype = parts.output.dtype or torch.float32
    factor = Elementwise("Mul", scalar=op.factor(queries[-1]), dtypes=(dtype,), computes_in=dtype)
    x = parts.add("scale", factor, (x,), scores)
    x = _masked(op, parts, x, mask, scores)
    x = parts.add("softmax", Softmax("Softmax", axis=-1), (x,), scores)
    if op.dropout:
        x = parts.add("dropout", Dropout(op.dropout), (x,), scores)
    parts.finish(parts.add("av", MatMul(), (x, v), parts.output))


def _masked(op: Attention, parts: Parts, x: fx.Node, mask: object, scores: ValueInfo) -> fx.Node:
    if op.is_causal:
        assert scores.shape is not None
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        mask = parts.constant("causal", visible)
    if mask is None:
        return x
    if op.is_causal or op.is_boolean:
        return parts.add("mask", Where(b=float("-inf"), dtype=scores.dtype), (mask, x), scores)
    return parts.add("mask", Elementwise("Add"), (x, mask), scores)

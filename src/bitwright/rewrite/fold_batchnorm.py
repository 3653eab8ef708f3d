"""Batch normalisation folded into the convolution or fully connected layer before it.

With scale = gamma / sqrt(var + epsilon) per channel, BN(W x + b) = (scale W) x + ((b - mean) scale + beta).
Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", eq. 14.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from bitwright.graph.graph import FoldedBatchNorm, Graph, ValueInfo
from bitwright.graph.op import Op
from bitwright.ops.batchnorm import BatchNorm, channels_of, times_channels
from bitwright.ops.conv import Conv, ConvTranspose
from bitwright.ops.linear import Linear


def fold_batchnorm(graph: Graph) -> Graph:
    """A copy of *graph* in which every batch normalisation that can be is part of the layer before it.

    The layer keeps its name and takes over the output name of the batch normalisation. Not folded: where the layer's
    result, its weight or its bias has another reader, or where a parameter is not constant. In evaluation mode the copy
    computes what *graph* does, up to rounding; in training it does not, so train the unfolded graph.
    """
    folded = copy.deepcopy(graph)
    for name in graph.op_names:
        if isinstance(folded.op(name), BatchNorm):
            pair = _find_pair(folded, name)
            if pair is not None:
                _fold(folded, pair)
                folded.refresh()
    return folded


@dataclass(frozen=True)
class _Pair:
    """A layer and the batch normalisation that alone reads it. *operands*: get_attr nodes of its weight and bias."""

    layer: Conv | ConvTranspose | Linear
    layer_node: fx.Node
    norm: BatchNorm
    norm_node: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def _find_pair(graph: Graph, norm_name: str) -> _Pair | None:
    norm, norm_node = graph.op(norm_name), graph.op_node(norm_name)
    x, *parameters = norm_node.args
    if not isinstance(x, fx.Node) or x.op != "call_module" or len(x.users) != 1:
        return None
    if any(p is not None and not _is_constant(p) for p in parameters):
        return None
    layer = graph.get_submodule(str(x.target))
    if not isinstance(layer, (Conv, ConvTranspose, Linear)) or not isinstance(norm, BatchNorm):
        return None
    if isinstance(layer, Linear) and not _is_matrix(graph, layer):
        return None  # batch normalisation works on axis 1, a fully connected layer on the last
    weight, bias = (*x.args[1:], None)[:2]
    for operand in (weight, bias):
        if operand is not None and not (_is_constant(operand) and len(operand.users) == 1):  # type: ignore[union-attr]
            return None
    if not isinstance(weight, fx.Node) or _is_stored_twice(graph, weight):
        return None
    return _Pair(layer, x, norm, norm_node, weight, bias)  # type: ignore[arg-type]


def _is_constant(operand: object) -> bool:
    return isinstance(operand, fx.Node) and operand.op == "get_attr"


def _is_matrix(graph: Graph, layer: Op) -> bool:
    shape = graph.value(layer.outputs[0]).info.shape
    return shape is not None and len(shape) == 2


def _is_stored_twice(graph: Graph, weight: fx.Node) -> bool:
    """True if another constant of the graph is the same tensor."""
    tensor = graph.constant(graph.value_name(weight))
    others = (v for v in graph.values.values() if v.is_constant and v.node is not weight)
    return any(graph.constant(v.name) is tensor for v in others)


def _fold(graph: Graph, pair: _Pair) -> None:
    scale, shift = _affine(graph, pair)
    weight = graph.constant(graph.value_name(pair.weight))
    bias = None if pair.bias is None else graph.constant(graph.value_name(pair.bias))
    with torch.no_grad():
        new_bias = (shift if bias is None else bias.double() * scale + shift).to(weight.dtype)
        weight.copy_(times_channels(weight.double(), scale, *channels_of(pair.layer, weight.dim())))
        if bias is not None:
            bias.copy_(new_bias)
    if pair.bias is None:
        node = _add_bias(graph, pair, new_bias)
        pair.layer_node.args = (*pair.layer_node.args[:2], node)
    _remove_norm(graph, pair)


def _affine(graph: Graph, pair: _Pair) -> tuple[Tensor, Tensor]:
    """The batch normalisation as y = x * scale + shift; both `[c]` float64."""

    def read(index: int) -> Tensor | None:
        node = pair.norm_node.args[index]
        return graph.constant(graph.value_name(node)).detach().double() if isinstance(node, fx.Node) else None

    gamma, beta, mean, var = (read(i) for i in (1, 2, 3, 4))
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + pair.norm.epsilon)
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale
    return scale, shift if beta is None else shift + beta


def _add_bias(graph: Graph, pair: _Pair, bias: Tensor) -> fx.Node:
    """The node of the new bias: for ONNX the batch normalisation's own bias, else `<layer>.bias`."""
    beta = pair.norm_node.args[2]
    if graph.info.source == "onnx" and isinstance(beta, fx.Node) and len(beta.users) == 1:
        with torch.no_grad():
            graph.constant(graph.value_name(beta)).copy_(bias)
        pair.layer_node.prepend(beta)  # constants stand before what reads them
        return beta
    key = "bias"
    while hasattr(pair.layer, key):
        key += "_"
    pair.layer.register_parameter(key, nn.Parameter(bias))
    with graph.graph.inserting_before(pair.layer_node):
        node = graph.graph.get_attr(f"{pair.layer_node.target}.{key}")
    values = {**graph.info.values, str(node.target): ValueInfo(tuple(bias.shape), bias.dtype)}
    graph.info = replace(graph.info, values=values)
    return node


def _remove_norm(graph: Graph, pair: _Pair) -> None:
    raw = pair.layer.outputs[0]
    parameters = [a for a in pair.norm_node.args[1:] if isinstance(a, fx.Node)]
    pair.norm_node.replace_all_uses_with(pair.layer_node)
    graph.graph.erase_node(pair.norm_node)
    gone = {raw}
    for node in dict.fromkeys(parameters):
        if not node.users:
            gone.add(graph.value_name(node))
            graph.graph.erase_node(node)
    target = str(pair.norm_node.target)
    if not any(
        str(n.target).startswith(f"{target}.")
        for n in graph.graph.nodes
        if n.op in ("get_attr", "call_module")
    ):
        graph.delete_submodule(target)
    pair.layer.outputs = pair.norm.outputs
    record = FoldedBatchNorm(pair.layer.name, pair.norm.name)
    values = {name: info for name, info in graph.info.values.items() if name not in gone}
    graph.info = replace(graph.info, values=values, folded=(*graph.info.folded, record))

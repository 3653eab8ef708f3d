"""Bodies of control flow, and putting the taken branch of an `If` in its place where the condition is constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs inside a node of control flow; none for other nodes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def names_in(graph: GraphProto) -> set[str]:
    """All names of nodes and values, those in bodies too."""
    found = {t.name for t in graph.initializer} | {v.name for v in (*graph.input, *graph.output)}
    for node in graph.node:
        found.update((node.name, *node.input, *node.output))
        for body in bodies(node):
            found |= names_in(body)
    return found


def inline_branches(model: ModelProto, arrays: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Replace every `If` whose condition is among the constants *arrays* by the branch it takes, in place.

    The branch's outputs take the names of the `If`'s. *returns*: whether there was one.
    """
    nodes = [NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    at = next((i for i, n in enumerate(nodes) if n.op_type == "If" and n.input[0] in arrays), None)
    if at is None:
        return False
    node = nodes.pop(at)
    _set_nodes(model.graph, nodes)
    side = "then_branch" if bool(arrays[node.input[0]].reshape(-1)[0]) else "else_branch"
    body = next(a.g for a in node.attribute if a.name == side)
    nodes[at:at] = _inlined(node, body, model.graph)
    _set_nodes(model.graph, nodes)
    inline_branches(model, arrays)
    return True


def _set_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


def _inlined(node: NodeProto, body: GraphProto, outer: GraphProto) -> list[NodeProto]:
    """The nodes of *body* as nodes of *outer*, which gets the body's initializers. Names are kept where they are free."""
    taken = names_in(outer) | set(node.output)
    made = [o for n in body.node for o in n.output if o]
    renamed = {name: _fresh(name, taken) for name in (*made, *(t.name for t in body.initializer))}
    copies: list[NodeProto] = []
    for inner, outside in zip(body.output, node.output, strict=True):
        if inner.name in made and renamed[inner.name] not in node.output:
            renamed[inner.name] = outside
        elif outside:  # a constant, or a value that is an output already
            copies.append(helper.make_node("Identity", [renamed[inner.name]], [outside], name=outside))
    for tensor in body.initializer:
        held = outer.initializer.add()
        held.CopyFrom(tensor)
        held.name = renamed[tensor.name]
    moved = [NodeProto.FromString(n.SerializeToString()) for n in body.node]
    names = {n.name for n in outer.node}
    for n in moved:
        n.name = _fresh(n.name, names)
        _rename(n, renamed)
    return [*moved, *copies]


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    for values in (node.input, node.output):
        renamed = [names.get(v, v) for v in values]
        del values[:]
        values.extend(renamed)
    for body in bodies(node):
        hidden = {t.name for t in body.initializer} | {o for n in body.node for o in n.output}
        outer = {k: v for k, v in names.items() if k not in hidden}
        for inner in body.node:
            _rename(inner, outer)
        for output in body.output:
            output.name = outer.get(output.name, output.name)


def _fresh(name: str, taken: set[str]) -> str:
    fresh, n = name, 1
    while fresh in taken:
        fresh, n = f"{name}_{n}", n + 1
    taken.add(fresh)
    return fresh

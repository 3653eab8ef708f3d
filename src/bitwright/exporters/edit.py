"""Small edits of ONNX graphs: which names are used, renaming what nodes read, dropping what nothing reads any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a control-flow node (`If`, `Loop`, `Scan`)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def reads_of(node: onnx.NodeProto) -> Iterator[str]:
    """Every value name that *node* reads, those that its bodies take from outside included."""
    yield from (name for name in node.input if name)
    for body in subgraphs(node):
        for inner in body.node:
            yield from reads_of(inner)
        yield from (output.name for output in body.output)


def rename_reads(node: onnx.NodeProto, rename: Callable[[str], str]) -> None:
    """Let *node* read `rename(name)` where it read *name*, its bodies included (inner names are unique in ONNX)."""
    for i, name in enumerate(node.input):
        if name:
            node.input[i] = rename(name)
    for body in subgraphs(node):
        for inner in body.node:
            rename_reads(inner, rename)
        for output in body.output:
            output.name = rename(output.name)


def used_names(graph: onnx.GraphProto) -> set[str]:
    """The names that a node reads or that are outputs of *graph*."""
    return {name for node in graph.node for name in reads_of(node)} | {o.name for o in graph.output}


def all_names(graph: onnx.GraphProto) -> set[str]:
    """Every value name of *graph*: inputs, initializers, node outputs and whatever bodies define."""
    names = {i.name for i in (*graph.input, *graph.output, *graph.initializer)}
    names |= {s.values.name for s in graph.sparse_initializer}
    for node in graph.node:
        names.update(node.input, node.output)
        for body in subgraphs(node):
            names |= all_names(body)
    return names - {""}


def fresh_name(wanted: str, taken: set[str]) -> str:
    """*wanted*, with a number appended if it is *taken*; the result is taken from then on."""
    name, n = wanted, 1
    while name in taken:
        n += 1
        name = f"{wanted}_{n}"
    taken.add(name)
    return name


def drop_unread(graph: onnx.GraphProto, candidates: set[str]) -> None:
    """Remove the constants and nodes among the producers of *candidates* that nothing reads, and so on upstream."""
    pending = set(candidates)
    while pending:
        used = used_names(graph)
        unread = pending - used
        pending = set()
        for i in reversed(range(len(graph.node))):
            node = graph.node[i]
            if unread.intersection(node.output) and not used.intersection(node.output):
                pending.update(reads_of(node))
                del graph.node[i]
        remove_initializers(graph, unread)


def remove_initializers(graph: onnx.GraphProto, names: set[str]) -> None:
    """Remove the initializers called *names*, also where old models repeat them as inputs."""
    constant = {t.name for t in graph.initializer} & names
    for field in (graph.initializer, graph.input, graph.value_info):
        for i in reversed(range(len(field))):
            if field[i].name in constant:
                del field[i]

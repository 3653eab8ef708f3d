"""Which output of a file holds the codes of which value: what an exporter writes and a proof reads.

The codes of value `v` are called `v_quantized`. Where that name was taken, the metadata of the node say whose codes it writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

#: What the name of a value's codes adds to the value's own.
SUFFIX = "_quantized"
#: Metadata of a node with codes of another name: the value. The number of the output follows, where it is not the first.
VALUE_KEY = "bitwright.value"


def say_whose_codes(node: onnx.NodeProto, output: str, value: str) -> None:
    """Let *node* say that its *output* holds the codes of *value*, unless the name says it."""
    if output != value + SUFFIX:
        index = list(node.output).index(output)
        node.metadata_props.add(key=f"{VALUE_KEY}.{index}" if index else VALUE_KEY, value=value)


def move_codes(nodes: Sequence[onnx.NodeProto], to: onnx.NodeProto) -> None:
    """Let *to*, which takes the place of *nodes*, say what they said."""
    for node in nodes:
        for index, value in _said(node):
            say_whose_codes(to, node.output[index], value)


def codes_in(model: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """Value -> name of its codes, and type of the node that writes them."""
    nodes = model.graph.node
    named = {
        name.removesuffix(SUFFIX): (name, node.op_type)
        for node in nodes
        for name in node.output
        if name.endswith(SUFFIX)
    }
    said = {value: (node.output[index], node.op_type) for node in nodes for index, value in _said(node)}
    return named | said


def _said(node: onnx.NodeProto) -> Iterator[tuple[int, str]]:
    for entry in node.metadata_props:
        key, _, index = entry.key.removeprefix(VALUE_KEY).partition(".")
        if entry.key.startswith(VALUE_KEY) and not key:
            yield int(index or 0), entry.value

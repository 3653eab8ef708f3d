"""The float model as ONNX: written by the operators themselves, or the user's own model where the graph came from one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from bitwright.errors import BitwrightError, ModelError, OutputError
from bitwright.exporters.edit import all_names, drop_unread, fresh_name, remove_initializers
from bitwright.exporters.writer import Writer, initializer, signed, to_numpy
from bitwright.files import write_bytes
from bitwright.graph.graph import Graph
from bitwright.graph.replay import Reads

#: Protocol buffers cannot be longer.
_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class FloatModel:
    """A float ONNX model and how it relates to its graph.

    *owners*: output name of a node -> the operator it belongs to; nodes that are no operator of the graph (folded shape
    computation) are absent. *names*: constant of the graph -> its name in *model*, where the two differ.
    """

    model: onnx.ModelProto
    owners: dict[str, str]
    names: dict[str, str]

    def name(self, value: str) -> str:
        """The name of the graph's *value* in the model."""
        return self.names.get(value, value)


def export_float(graph: Graph) -> onnx.ModelProto:
    """*graph* as a standard ONNX model (opset 21 or later), value names kept, batch dimension `N` where it is dynamic.

    A graph that came from ONNX gives the user's own model back, with folded batch normalisations and constants that were
    changed since. An output that is listed twice is written once. *raises* `ModelError` if an operator cannot be
    translated (all of them are listed).
    """
    return float_model(graph).model


def float_model(graph: Graph, reads: Reads | None = None) -> FloatModel:
    """As `export_float`, with what is needed to put Q/DQ pairs in. *reads*: see `Writer`."""
    if is_users_model(graph):
        return _users_model(graph)
    writer = Writer(graph, reads)
    _write_all(graph, writer)
    return FloatModel(writer.model(), writer.owners, {})


def check_exportable(graph: Graph) -> None:
    """*raises* `ModelError` listing every operator of *graph* that cannot be translated to ONNX."""
    if not is_users_model(graph):
        _write_all(graph, Writer(graph))


def is_users_model(graph: Graph) -> bool:
    """True if *graph* came from ONNX and still consists of that model's nodes (no operator was made by a rewrite)."""
    if graph.info.onnx_model is None:
        return False
    made = {name for node in graph.info.onnx_model.graph.node for name in node.output}
    return all(op.outputs[0] in made for op in graph.ops)


def _write_all(graph: Graph, writer: Writer) -> None:
    failed: dict[str, str] = {}
    for op in graph.ops:
        try:
            writer.write(op)
        except NotImplementedError:
            failed[op.name] = f"{op.kind} has no translation"
        except BitwrightError as e:
            failed[op.name] = f"{op.kind}: {e.found}"
    if failed:
        listed = "; ".join(f"{name} ({why})" for name, why in failed.items())
        raise ModelError(
            "export to ONNX",
            expected="operators that can be translated",
            found=f"{len(failed)} that cannot: {listed}",
            remedy="Replace them in the model, or use `prepare` and `sensitivity`, which do not export.",
        )


# --- graphs that came from ONNX ----------------------------------------------------------------------------------


def _users_model(graph: Graph) -> FloatModel:
    model = onnx.ModelProto()
    model.CopyFrom(graph.info.onnx_model)
    _hide_constants_from_inputs(model.graph)
    names = _constant_names(graph, model.graph)
    _fold_batch_norms(graph, model.graph, names)
    _store_changed_constants(graph, model.graph, names)
    owners = {name: op.name for op in graph.ops for name in op.outputs if name}
    return FloatModel(signed(model), owners, names)


def _hide_constants_from_inputs(graph: onnx.GraphProto) -> None:
    """Models before IR 4 list their initializers as inputs too, which makes them overridable: not constants."""
    constant = {t.name for t in graph.initializer}
    for i in reversed(range(len(graph.input))):
        if graph.input[i].name in constant:
            del graph.input[i]


def _constant_names(graph: Graph, model: onnx.GraphProto) -> dict[str, str]:
    """Constant of *graph* -> its name in *model*, where it had to be changed to become a module path."""
    known = all_names(model)
    by_path = {_as_path(name): name for name in known}
    found = {}
    for name, value in graph.values.items():
        if value.is_constant and name not in known and _as_path(name) in by_path:
            found[name] = by_path[_as_path(name)]
    return found


def _as_path(name: str) -> str:
    """What is left of a name after it was made a module path and freed of collisions (`Assembler`)."""
    parts = [p.rstrip("_") for p in name.replace('"', "'").replace("\\", "/").split(".") if p]
    return ".".join(parts)


def _fold_batch_norms(graph: Graph, model: onnx.GraphProto, names: dict[str, str]) -> None:
    """Remove the batch-norm nodes that were folded; the node before takes over name, weight and bias."""
    producers = {name: node for node in model.node for name in node.output if name}
    orphans: set[str] = set()
    taken = all_names(model)
    for conv in dict.fromkeys(f.conv for f in graph.info.folded):
        result = graph.op(conv).outputs[0]
        node = producers[result]
        while node.op_type == "BatchNormalization":
            orphans.update(node.input[1:])
            source = producers[node.input[0]]
            _remove_node(model, node)
            node = source
        node.output[0] = result
        orphans.update(name for name in node.input[1:] if name)
        operands = graph.op_inputs(conv)[1:]
        del node.input[1:]
        for value in operands:
            node.input.append("" if value is None else _constant_name(value, names, taken))
    drop_unread(model, orphans)


def _constant_name(value: str, names: dict[str, str], taken: set[str]) -> str:
    """The model's name of constant *value*; a new one if the rewrite made the constant."""
    known = names.get(value, value)
    return known if known in taken else fresh_name(known, taken)


def _remove_node(model: onnx.GraphProto, node: onnx.NodeProto) -> None:
    index = next(i for i, n in enumerate(model.node) if n.output == node.output)
    del model.node[index]


def _store_changed_constants(graph: Graph, model: onnx.GraphProto, names: dict[str, str]) -> None:
    """Write constants of the graph that differ from the model's (folded, equalized, trained), or are new."""
    read = {name for node in model.node for name in node.input}
    stored = {t.name: t for t in model.initializer}
    made_by_nodes = {name: n for n in model.node for name in n.output}
    for value in graph.values.values():
        name = names.get(value.name, value.name)
        if not value.is_constant or name not in read:
            continue
        array = to_numpy(graph.constant(value.name))
        if name in stored:
            held = numpy_helper.to_array(stored[name])
            if held.shape != array.shape or held.dtype != array.dtype or np.array_equal(held, array):
                continue
            remove_initializers(model, {name})
        elif name in made_by_nodes:
            node = made_by_nodes[name]
            if node.op_type != "Constant" or not _differs(node, array):
                continue
            _remove_node(model, node)
        model.initializer.append(initializer(name, array))


def _differs(node: onnx.NodeProto, array: np.ndarray) -> bool:  # type: ignore[type-arg]
    """True if the constant that *node* holds has the shape of *array* but other contents."""
    held = next((numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"), None)
    return held is not None and held.shape == array.shape and not np.array_equal(held, array)


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write *model* to *path*. *raises* `OutputError` if that is impossible; an older file then stays as it was."""
    if model.ByteSize() > _LONGEST:
        raise OutputError(
            str(path),
            expected="a model below 2 GB",
            found=f"{model.ByteSize() / 2**30:.1f} GB",
            remedy="Split the model; external data is not written.",
        )
    write_bytes(path, model.SerializeToString())

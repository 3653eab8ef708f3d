"""Reading an ONNX file and bringing it to one form: opset 21 or later, every node named, no local functions.

What leaves this file is still the user's own graph: node names and value names survive, and inserted nodes and
constants are named after the node they serve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx.checker
import onnx.defs
import onnx.inliner
import onnx.shape_inference
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, NodeProto, TensorProto

from bitwright.errors import ModelError
from bitwright.importers.onnx_branches import bodies
from bitwright.importers.onnx_upgrade import upgrade

OLDEST_OPSET = 9
NEWEST_OPSET = 23
#: Every model is brought to at least this opset: QuantizeLinear and DequantizeLinear take int16 from here on.
WORKING_OPSET = 21
_WORKING_IR = 10

_QUANTIZED = {
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
}
_OWN_DOMAINS = ("", "ai.onnx")


def read_model(source: str | Path | ModelProto) -> tuple[ModelProto, str]:
    """The model and what to call it in messages. A given `ModelProto` is copied.

    *raises* `ModelError` if the file is missing, is not ONNX, is damaged, or lacks its external data.
    """
    if isinstance(source, ModelProto):
        model, where = ModelProto(), f"model {source.graph.name!r}"
        model.CopyFrom(source)
    else:
        path, where = Path(source), str(source)
        model = read_file(path)
    _reject_absent_parts(model, where)
    _reject_external(model, where)
    return model, where


def read_file(path: Path) -> ModelProto:
    """The ONNX file *path*, whatever it holds. *raises* `ModelError` if it is missing, damaged, or lacks its weights."""
    where = str(path)
    if not path.is_file():
        what = "a directory" if path.is_dir() else "no such file"
        raise ModelError(where, expected="an ONNX file", found=what, remedy="Check the path.")
    try:
        return onnx.load(path)
    except DecodeError as error:
        raise ModelError(
            where,
            expected="an ONNX file",
            found=f"bytes that do not decode ({error})",
            remedy="The file is damaged, cut short, or not ONNX: copy or export it again.",
        ) from error
    except (OSError, onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(
            where,
            expected="the model and all files with its weights",
            found=str(error),
            remedy="Put the external data files beside the model, under the names it refers to.",
        ) from error


def _reject_absent_parts(model: ModelProto, where: str) -> None:
    missing = [
        what
        for what, present in (
            ("an IR version", model.ir_version),
            ("opset imports", model.opset_import),
            ("operators", model.graph.node),
            ("outputs", model.graph.output),
        )
        if not present
    ]
    if missing:
        raise ModelError(
            where,
            expected="a complete ONNX model",
            found=f"one without {', '.join(missing)}",
            remedy="The file is damaged, cut short, or not ONNX: copy or export it again.",
        )


def _reject_external(model: ModelProto, where: str) -> None:
    absent = [t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    if absent:
        raise ModelError(
            where,
            expected="weights that are part of the model",
            found=f"{len(absent)} weights that still point to files, e.g. {absent[0]!r}",
            remedy="Load the model with its external data (onnx.load does), or give its path.",
        )


def prepare_model(model: ModelProto, where: str) -> ModelProto:
    """Check *model* and bring it to the working opset, in place where possible.

    *raises* `ModelError` for opsets outside 9…23, for models that are quantized already, and for what ONNX's checker
    refuses. Unknown operators are left for the importer, which lists all of them at once.
    """
    opset = _default_opset(model, where)
    _reject_quantized(model.graph.node, where)
    _reject_sparse(model, where)
    _reject_shapeless_inputs(model, where)
    if not any(is_unknown(node, opset) for node in model.graph.node):
        _check(model, where)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _drop_constant_inputs(model)
    name_nodes(model.graph.node)
    if opset < WORKING_OPSET:
        upgrade(model, opset, where)
        opset = WORKING_OPSET
    _set_default_opset(model, opset)
    model.ir_version = max(model.ir_version, _WORKING_IR)
    return model


def _default_opset(model: ModelProto, where: str) -> int:
    versions = [o.version for o in model.opset_import if o.domain in _OWN_DOMAINS]
    if versions and OLDEST_OPSET <= max(versions) <= NEWEST_OPSET:
        return int(max(versions))
    raise ModelError(
        where,
        expected=f"an opset from {OLDEST_OPSET} to {NEWEST_OPSET}",
        found=f"opset {max(versions)}" if versions else "no import of the standard operators",
        remedy="Export the model again with an opset in that range (17 suits most exporters).",
    )


def _set_default_opset(model: ModelProto, opset: int) -> None:
    others = [(o.domain, o.version) for o in model.opset_import if o.domain not in _OWN_DOMAINS]
    del model.opset_import[:]
    for domain, version in [("", opset), *others]:
        model.opset_import.add(domain=domain, version=version)


def _reject_quantized(nodes: Iterable[NodeProto], where: str) -> None:
    found = Counter(n.op_type for n in nodes if n.op_type in _QUANTIZED or n.op_type.startswith("QLinear"))
    if found:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
        raise ModelError(
            where,
            expected="a float model",
            found=f"one that is quantized already ({listed})",
            remedy="Give the float model that it was made from.",
        )


def is_unknown(node: NodeProto, opset: int) -> bool:
    """True for operators that standard ONNX does not have at this opset."""
    if node.domain not in _OWN_DOMAINS:
        return True
    try:
        onnx.defs.get_schema(node.op_type, max_inclusive_version=opset)
    except onnx.defs.SchemaError:
        return True
    return False


def _reject_shapeless_inputs(model: ModelProto, where: str) -> None:
    for spec in model.graph.input:
        if spec.type.HasField("tensor_type") and not spec.type.tensor_type.HasField("shape"):
            raise ModelError(
                f"{where}, input {spec.name!r}",
                expected="a known rank",
                found="no shape",
                remedy=ask_for_shape(spec.name, 4),
            )


def ask_for_shape(name: str, rank: int) -> str:
    """The remedy for an input whose shape is not known."""
    shape = ",".join(["1", "3", "224", "224", *"1" * rank][:rank])
    return f"State it, for example --input-shape '{name}={shape}', in Python input_shapes={{{name!r}: [{shape}]}}."


def _shape_outputs(model: ModelProto) -> None:
    """Outputs without a shape, which runtimes accept and ONNX's checker does not, get the one that can be inferred."""
    bare = [o for o in model.graph.output if not o.type.tensor_type.HasField("shape")]
    if bare:
        inferred = {o.name: o for o in onnx.shape_inference.infer_shapes(model).graph.output}
        for output in bare:
            output.CopyFrom(inferred[output.name])


def _check(model: ModelProto, where: str) -> None:
    try:
        _shape_outputs(model)
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(
            where,
            expected="a model that ONNX's checker accepts",
            found=" ".join(str(error).split()),
            remedy="Export the model again, or repair the part that the checker names.",
        ) from error
    except ValueError:
        # More than 2 GB cannot be checked in memory; what is wrong in such a model shows up while it is imported.
        return


def _reject_sparse(model: ModelProto, where: str) -> None:
    if model.graph.sparse_initializer:
        raise ModelError(
            where,
            expected="dense weights",
            found=f"{len(model.graph.sparse_initializer)} sparse ones",
            remedy="Store the weights as ordinary initializers.",
        )


def _drop_constant_inputs(model: ModelProto) -> None:
    """Before IR version 4 every initializer was also an input; they are constants to us."""
    constants = {t.name for t in model.graph.initializer}
    kept = [i for i in model.graph.input if i.name not in constants]
    if len(kept) != len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(kept)


def name_nodes(nodes: Sequence[NodeProto]) -> None:
    """Give every node a name of its own: the first output's name where it has none or shares it. Bodies count apart."""
    for node in nodes:
        for body in bodies(node):
            name_nodes(body.node)
    taken: set[str] = set()
    counts = Counter(n.name for n in nodes if n.name)
    for node in nodes:
        if node.name and counts[node.name] == 1:
            taken.add(node.name)
    for node in nodes:
        if node.name and counts[node.name] == 1:
            continue
        base = next((o for o in node.output if o), node.op_type)
        name, n = base, 1
        while name in taken:
            name, n = f"{base}_{n}", n + 1
        node.name = name
        taken.add(name)


def fix_input_shapes(model: ModelProto, shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Write the user's *shapes* into the graph's inputs; -1 as first dimension keeps the batch dynamic.

    *raises* `ModelError` for an unknown input or a shape that contradicts the model's.
    """
    known = {i.name: i for i in model.graph.input}
    for name, shape in shapes.items():
        if name not in known:
            raise ModelError(
                where,
                expected=f"shapes for its inputs ({', '.join(known)})",
                found=f"one for {name!r}",
                remedy="Use the names listed.",
            )
        dims = known[name].type.tensor_type.shape.dim
        if not known[name].type.tensor_type.HasField("shape"):
            for _ in shape:
                dims.add()
        fits = len(dims) == len(shape) and all(
            not d.dim_value or d.dim_value == s for d, s in zip(dims, shape, strict=True)
        )
        if not fits or any(s < 1 and not (i == 0 and s == -1) for i, s in enumerate(shape)):
            raise ModelError(
                f"{where}, input {name!r}",
                expected=f"a shape that fits [{', '.join(d.dim_param or str(d.dim_value or '?') for d in dims)}]",
                found=str(list(shape)),
                remedy="Change the given shape; only symbolic dimensions can be chosen.",
            )
        for d, s in zip(dims, shape, strict=True):
            if s > 0:
                d.dim_value = s

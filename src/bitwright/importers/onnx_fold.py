"""What of an ONNX graph is constant: folded constants, symbolic shapes, and shape vectors known up to the batch size.

Two kinds of knowledge feed each other until nothing new appears: ONNX's shape inference says what shapes values have,
and the evaluator below works out integer vectors made from shapes (`Shape`, `Gather`, `Concat`, …). Entries of such a
vector are integers, dimension symbols (a name for one unknown length ≥ 0) or `UNKNOWN`. Everything concluded is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.shape_inference
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bitwright.importers.onnx_branches import bodies
from bitwright.importers.onnx_vectors import UNKNOWN, Entry, Symbol, Vector, evaluate

#: A dimension: a length, a symbol, or None where nothing is known.
Dims = tuple[Entry, ...]

_NOT_REPEATABLE = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
}
#: Initializers above this many elements are hidden from shape inference (they cannot be shape vectors).
_SMALL = 1024
#: A folded constant may have this many elements more than its inputs together; larger ones are left to run time.
_GROWTH = 1 << 24


@dataclass(frozen=True)
class Folded:
    """*arrays*: constants by value name. *dims*: shapes. *targets*: input vectors with -1 where the batch stands.

    A target belongs to (node name, input index): a Reshape target, or Expand and Resize sizes, in which one entry or
    those that keep the input's length are not known as numbers.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    dims: Mapping[str, Dims]
    targets: Mapping[tuple[str, int], npt.NDArray[np.int64]]

    def shape(self, value: str) -> tuple[int | None, ...] | None:
        """The shape of *value* with None for dynamic dimensions, None if unknown."""
        if value in self.arrays:
            return tuple(self.arrays[value].shape)
        dims = self.dims.get(value)
        return None if dims is None else tuple(d if isinstance(d, int) else None for d in dims)


def fold(model: ModelProto, batch: str | None) -> Folded:
    """Everything constant in *model* (opset 21 or later). *batch*: the symbol of dimension 0 of all inputs, or None."""
    arrays = {
        t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type != TensorProto.STRING
    }
    scratch = _scratch(model, arrays, batch)
    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    dims: dict[str, Dims] = {}
    types: dict[str, int] = {}
    vectors: dict[str, Vector] = {}
    while True:
        known = (len(arrays), _knowledge(dims.values()), _knowledge(v.reshape(-1) for v in vectors.values()))
        dims = _infer(scratch, dims, types)
        for node in model.graph.node:
            _fold_node(node, opset, arrays, vectors, dims, types)
        dims.update(_shapes_from_vectors(model.graph.node, arrays, vectors, dims))
        if known == (
            len(arrays),
            _knowledge(dims.values()),
            _knowledge(v.reshape(-1) for v in vectors.values()),
        ):
            return Folded(arrays, dims, _targets(model.graph.node, arrays, vectors, dims))
        _tell(scratch, arrays, dims, types)


def _knowledge(shapes: Iterable[Iterable[Any]]) -> tuple[int, int]:
    """How many entries are numbers, and how many are numbers or symbols: grows until nothing new is learnt."""
    flat = [e for shape in shapes for e in shape]
    return sum(isinstance(e, int) for e in flat), sum(e is not UNKNOWN for e in flat)


# --- shape inference -----------------------------------------------------------------------------------------


def _scratch(model: ModelProto, arrays: Mapping[str, npt.NDArray[Any]], batch: str | None) -> ModelProto:
    """A light copy for shape inference: large constants become inputs, and claims about shapes are dropped.

    Exporters sometimes leave shapes behind that are not true, e.g. a symbolic output of a model with fixed inputs.
    """
    scratch = ModelProto(ir_version=model.ir_version)
    scratch.opset_import.extend(model.opset_import)
    graph = scratch.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    if batch is not None:
        for value in graph.input:
            if value.type.tensor_type.shape.dim:
                value.type.tensor_type.shape.dim[0].dim_param = batch
    for name, array in arrays.items():
        if array.size <= _SMALL:
            graph.initializer.append(numpy_helper.from_array(array, name))
        else:
            elem = helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.input.append(helper.make_tensor_value_info(name, elem, array.shape))
    for value in model.graph.output:
        bare = ValueInfoProto(name=value.name)
        bare.type.tensor_type.elem_type = value.type.tensor_type.elem_type
        graph.output.append(bare)
    return scratch


def _infer(scratch: ModelProto, before: Mapping[str, Dims], types: dict[str, int]) -> dict[str, Dims]:
    try:
        graph = onnx.shape_inference.infer_shapes(scratch, data_prop=True).graph
    except (ValueError, onnx.shape_inference.InferenceError):
        graph = scratch.graph
    dims = dict(before)
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        types[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            found = tuple(_entry(d) for d in tensor.shape.dim)
            dims[value.name] = _merge(found, dims.get(value.name))
    for initializer in scratch.graph.initializer:
        dims[initializer.name] = tuple(initializer.dims)
    return dims


def _entry(dim: Any) -> Entry:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return Symbol(dim.dim_param) if dim.dim_param else UNKNOWN


def _merge(a: Dims, b: Dims | None) -> Dims:
    if b is None or len(a) != len(b):
        return a
    return tuple(_better(x, y) for x, y in zip(a, b, strict=True))


def _better(x: Entry, y: Entry) -> Entry:
    if isinstance(x, int) or y is UNKNOWN:
        return x
    return y


def _tell(
    scratch: ModelProto,
    arrays: Mapping[str, npt.NDArray[Any]],
    dims: Mapping[str, Dims],
    types: Mapping[str, int],
) -> None:
    """Hand what was learnt to the next round of shape inference."""
    graph = scratch.graph
    kept = [n for n in graph.node if not all(o in arrays for o in n.output if o)]
    if len(kept) != len(graph.node):
        held = {t.name for t in graph.initializer} | {i.name for i in graph.input}
        copies = [NodeProto.FromString(n.SerializeToString()) for n in kept]
        for node in graph.node:
            for o in node.output:
                if o in arrays and o not in held and arrays[o].dtype != object:
                    _declare(graph, o, arrays[o])
                    held.add(o)
        del graph.node[:]
        graph.node.extend(copies)
    produced = {o for n in graph.node for o in n.output}
    outputs = {o.name: o for o in graph.output}
    del graph.value_info[:]
    for name, shape in dims.items():
        if name in produced and name not in outputs:
            info = helper.make_tensor_value_info(
                name,
                types.get(name, TensorProto.UNDEFINED),
                [d if isinstance(d, int) else d.name if isinstance(d, Symbol) else None for d in shape],
            )
            graph.value_info.append(info)


def _declare(graph: Any, name: str, array: npt.NDArray[Any]) -> None:
    if array.size <= _SMALL:
        graph.initializer.append(numpy_helper.from_array(array, name))
    else:
        elem = helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.input.append(helper.make_tensor_value_info(name, elem, array.shape))


# --- values --------------------------------------------------------------------------------------------------


def _fold_node(
    node: NodeProto,
    opset: int,
    arrays: dict[str, npt.NDArray[Any]],
    vectors: dict[str, Vector],
    dims: Mapping[str, Dims],
    types: Mapping[str, int],
) -> None:
    if node.domain not in ("", "ai.onnx") or all(o in arrays for o in node.output if o):
        return
    if all(i in arrays for i in node.input if i) and node.op_type not in _NOT_REPEATABLE:
        found = _run(node, opset, arrays)
        if found is not None:
            arrays.update(found)
            return
    vector = evaluate(node, arrays, vectors, dims)
    if vector is None:
        return
    name = node.output[0]
    if all(isinstance(e, int) for e in vector.reshape(-1)):
        elem = types.get(name, TensorProto.UNDEFINED) or TensorProto.INT64
        arrays[name] = vector.astype(helper.tensor_dtype_to_np_dtype(elem))
        vectors.pop(name, None)
    else:
        vectors[name] = vector


def _run(
    node: NodeProto, opset: int, arrays: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]] | None:
    """The outputs of a node whose inputs are all constant, or None if they are better left to run time."""
    if any(True for _ in bodies(node)):
        return None
    feeds = {i: arrays[i] for i in node.input if i}
    if node.op_type in ("ConstantOfShape", "Expand", "Tile", "Range"):
        sizes = [a for a in feeds.values() if a.dtype == np.int64]
        if sizes and float(np.prod([float(max(1, v)) for v in sizes[-1].reshape(-1)])) > _GROWTH:
            return None
    try:
        results = ReferenceEvaluator(node, opsets={"": opset}).run(None, feeds)
    except Exception:  # the reference knows fewer forms than we do and raises anything; run time then decides
        return None
    named = zip(node.output, results, strict=False)
    return {o: np.asarray(r) for o, r in named if o and r is not None and np.asarray(r).dtype.kind in "biuf"}


# --- vectors back to shapes ----------------------------------------------------------------------------------


def _vector(
    name: str, arrays: Mapping[str, npt.NDArray[Any]], vectors: Mapping[str, Vector]
) -> list[Entry] | None:
    if name in arrays:
        return [int(v) for v in arrays[name].reshape(-1)]
    return list(vectors[name].reshape(-1)) if name in vectors else None


def _shapes_from_vectors(
    nodes: Sequence[NodeProto],
    arrays: Mapping[str, npt.NDArray[Any]],
    vectors: Mapping[str, Vector],
    dims: Mapping[str, Dims],
) -> dict[str, Dims]:
    found: dict[str, Dims] = {}
    for node in nodes:
        if node.op_type == "ConstantOfShape" and node.input[0] in vectors:
            target = _vector(node.input[0], arrays, vectors)
        elif node.op_type == "Expand" and node.input[0] not in arrays:
            target = _broadcast(dims.get(node.input[0]), _vector(node.input[1], arrays, vectors))
        elif node.op_type == "Reshape" and not any(a.name == "allowzero" and a.i for a in node.attribute):
            target = _reshaped(dims.get(node.input[0]), _vector(node.input[1], arrays, vectors))
        else:
            continue
        if target is not None:
            found[node.output[0]] = _merge(tuple(target), dims.get(node.output[0]))
    return found


def _broadcast(x: Dims | None, target: list[Entry] | None) -> list[Entry] | None:
    """The output shape of an Expand, as far as it can be told."""
    if x is None or target is None:
        return None
    rank = max(len(x), len(target))
    pairs = zip([1] * (rank - len(x)) + list(x), [1] * (rank - len(target)) + list(target), strict=True)
    return [
        b
        if a == 1
        else a
        if b == 1 or a == b or (isinstance(a, int) and a > 1)
        else b
        if isinstance(b, int) and b > 1
        else UNKNOWN
        for a, b in pairs
    ]


def _reshaped(x: Dims | None, target: list[Entry] | None) -> list[Entry] | None:
    """The output shape of a Reshape, as far as it can be told."""
    if target is None:
        return None
    shape = [
        x[i] if t == 0 and x is not None and i < len(x) else UNKNOWN if t == 0 else t
        for i, t in enumerate(target)
    ]
    if -1 not in shape:
        return shape
    at = shape.index(-1)
    shape[at] = UNKNOWN
    rest = [d for i, d in enumerate(shape) if i != at]
    if x is None or UNKNOWN in x or UNKNOWN in rest:
        return shape
    # Symbols that stand on both sides cancel (a length of 0 leaves both sides empty, and -1 undefined anyway).
    before = list(x)
    for d in [d for d in rest if isinstance(d, Symbol)]:
        if d not in before:
            return shape
        before.remove(d)
        rest.remove(d)
    numerator = int(np.prod([d for d in before if isinstance(d, int)], dtype=np.int64))
    denominator = int(np.prod([d for d in rest if isinstance(d, int)], dtype=np.int64))
    symbols = [d for d in before if isinstance(d, Symbol)]
    if denominator == 0 or numerator % denominator:
        return shape
    if not symbols:
        shape[at] = numerator // denominator
    elif len(symbols) == 1 and numerator == denominator:
        shape[at] = symbols[0]
    return shape


def _targets(
    nodes: Sequence[NodeProto],
    arrays: Mapping[str, npt.NDArray[Any]],
    vectors: Mapping[str, Vector],
    dims: Mapping[str, Dims],
) -> dict[tuple[str, int], npt.NDArray[np.int64]]:
    """Vectors that are not constant, but say no more than a constant one with -1, 0 or 1 does."""
    found: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
    for node in nodes:
        index = {"Reshape": 1, "Expand": 1, "Resize": 3}.get(node.op_type)
        if index is None or len(node.input) <= index or node.input[index] not in vectors:
            continue
        entries = _vector(node.input[index], arrays, vectors)
        x = dims.get(node.input[0])
        assert entries is not None
        if node.op_type == "Reshape":
            allow_zero = any(a.name == "allowzero" and a.i for a in node.attribute)
            static = None if allow_zero else _static_reshape(entries, x)
        elif node.op_type == "Expand":
            static = _kept(entries, x, 1)
        else:
            static = _kept(entries, x, -1)
        if static is not None:
            found[node.name, index] = np.array(static, dtype=np.int64)
    return found


def _static_reshape(entries: Sequence[Entry], x: Dims | None) -> list[int] | None:
    if sum(not isinstance(e, int) for e in entries) == 1 and -1 not in entries:
        return [e if isinstance(e, int) else -1 for e in entries]
    # Several unknown lengths: those equal to the input's at the same place are copied; one may be inferred.
    static = [
        e
        if isinstance(e, int)
        else 0
        if x is not None and i < len(x) and isinstance(e, Symbol) and x[i] == e
        else None
        for i, e in enumerate(entries)
    ]
    if static.count(None) == 1 and -1 not in static:
        static[static.index(None)] = -1
    return None if None in static else [s for s in static if s is not None]


def _kept(entries: Sequence[Entry], x: Dims | None, mark: int) -> list[int] | None:
    """*entries* with *mark* where the input's own length at that place (aligned at the end) is asked for."""
    if x is None:
        return None
    shift = len(entries) - len(x)
    static = [
        e
        if isinstance(e, int)
        else mark
        if i >= shift and isinstance(e, Symbol) and x[i - shift] == e
        else None
        for i, e in enumerate(entries)
    ]
    return None if None in static else [s for s in static if s is not None]

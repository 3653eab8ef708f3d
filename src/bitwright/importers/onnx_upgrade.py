"""Rewriting nodes of opsets 9 to 20 in the form of opset 21, without touching any name.

ONNX's own version converter is not used: it gives `Upsample` and `Resize` of opset 10 another meaning (it drops their
asymmetric coordinates), leaves `Hardmax` unconverted, renames nodes, and stops at 2 GB. The differences between these
opsets that are more than further data types are the few functions below, one per operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.shape_inference
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from bitwright.errors import ModelError
from bitwright.importers.onnx_branches import bodies, names_in

#: Rank (None if unknown) and dtype of a value.
_Type = tuple[int | None, npt.DTypeLike]


@dataclass
class _Rewrite:
    """The node under conversion and what its new form needs. *before*, *after*: nodes to insert around it."""

    node: NodeProto
    opset: int
    #: Rank and dtype of the first input, where known.
    rank: int | None
    dtype: npt.DTypeLike
    #: The contents of a constant.
    array: Callable[[str], npt.NDArray[Any] | None]
    taken: set[str]
    constants: list[TensorProto] = field(default_factory=list)
    before: list[NodeProto] = field(default_factory=list)
    after: list[NodeProto] = field(default_factory=list)

    def name(self, hint: str) -> str:
        """A fresh name derived from the node's."""
        base = name = f"{self.node.name}.{hint}"
        n = 1
        while name in self.taken:
            name, n = f"{base}_{n}", n + 1
        self.taken.add(name)
        return name

    def constant(self, array: npt.NDArray[Any], hint: str) -> str:
        """A new constant's name."""
        name = self.name(hint)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, values: Sequence[int], hint: str) -> str:
        """A new int64 vector's name."""
        return self.constant(np.array(values, dtype=np.int64), hint)

    def pop(self, attribute: str, default: Any = None) -> Any:
        """The value of an attribute, which is removed."""
        for a in self.node.attribute:
            if a.name == attribute:
                value = helper.get_attribute_value(a)
                self.node.attribute.remove(a)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def set(self, **attributes: Any) -> None:
        """Set attributes."""
        for name, value in attributes.items():
            self.pop(name)
            self.node.attribute.append(helper.make_attribute(name, value))

    def inputs(self, *names: str) -> None:
        """Replace the inputs; trailing absent ones are dropped."""
        kept = list(names)
        while kept and not kept[-1]:
            kept.pop()
        del self.node.input[:]
        self.node.input.extend(kept)


def upgrade(model: ModelProto, opset: int, where: str) -> None:
    """Convert all nodes of *model* from *opset* to opset 21, in place. All nodes must have names."""
    types = _types(model) if opset < 13 else {}
    _upgrade_graph(model.graph, opset, types, names_in(model.graph), where)


def _upgrade_graph(
    graph: GraphProto, opset: int, types: Mapping[str, _Type], taken: set[str], where: str
) -> None:
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    nodes: list[NodeProto] = []
    for node in list(graph.node):
        for body in bodies(node):
            _upgrade_graph(body, opset, types, taken, where)
        entry = _CONVERSIONS.get(node.op_type)
        if entry is None or opset >= entry[0]:
            nodes.append(node)
            continue
        rank, dtype = types.get(node.input[0], (None, np.float32)) if node.input else (None, np.float32)
        rewrite = _Rewrite(
            node,
            opset,
            rank,
            dtype,
            lambda name: numpy_helper.to_array(constants[name]) if name in constants else None,
            taken,
        )
        try:
            entry[1](rewrite)
        except _CannotConvert as error:
            raise ModelError(
                f"{where}, node {node.name!r}",
                expected=f"a {node.op_type} that can be converted from opset {opset} to 21",
                found=str(error),
                remedy="Export the model again with opset 21.",
            ) from error
        nodes += [*rewrite.before, rewrite.node, *rewrite.after]
        graph.initializer.extend(rewrite.constants)
    # Assigning to a repeated field frees the old messages: the new ones must not share memory with them.
    copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)


class _CannotConvert(Exception):
    """The reason why a node has no equivalent at opset 21."""


def _types(model: ModelProto) -> dict[str, _Type]:
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (ValueError, onnx.shape_inference.InferenceError):
        graph = model.graph
    found: dict[str, _Type] = {}
    for v in (*graph.input, *graph.output, *graph.value_info):
        tensor = v.type.tensor_type
        if tensor.elem_type not in (TensorProto.UNDEFINED, TensorProto.STRING):
            rank = len(tensor.shape.dim) if tensor.HasField("shape") else None
            found[v.name] = (rank, helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return found


# --- one function per operator -------------------------------------------------------------------------------


def _slice(r: _Rewrite) -> None:
    starts, ends, axes = r.pop("starts"), r.pop("ends"), r.pop("axes")
    names = [r.ints(starts, "starts"), r.ints(ends, "ends")]
    r.inputs(r.node.input[0], *names, "" if axes is None else r.ints(axes, "axes"))


def _top_k(r: _Rewrite) -> None:
    r.inputs(r.node.input[0], r.ints([r.pop("k")], "k"))


def _resize(r: _Rewrite) -> None:
    # Opset 10 and `Upsample`: x / scale without a shift, rounded down.
    r.node.op_type = "Resize"
    if r.opset < 11:
        r.inputs(r.node.input[0], "", r.node.input[1])
        scales = r.array(r.node.input[2])
        # ONNX Runtime rounds up where such a node shrinks, which the standard of that time left open.
        shrinks = scales is not None and bool((scales < 1).any())
        r.set(coordinate_transformation_mode="asymmetric", nearest_mode="ceil" if shrinks else "floor")
        return
    # Opset 11: roi and scales were mandatory, and empty where not meant.
    kept = list(r.node.input)
    mode = next((a.s for a in r.node.attribute if a.name == "coordinate_transformation_mode"), b"")
    if mode == b"tf_half_pixel_for_nn":
        raise _CannotConvert(
            "coordinate_transformation_mode=tf_half_pixel_for_nn, which later opsets dropped"
        )
    if len(kept) > 1 and mode != b"tf_crop_and_resize":
        kept[1] = ""
    if len(kept) > 3 and kept[3]:
        kept[2] = ""
    r.inputs(*kept)


def _pad(r: _Rewrite) -> None:
    pads, value = r.pop("pads"), r.pop("value", 0.0)
    names = [r.ints(pads, "pads")]
    if value:
        names.append(r.constant(np.array(value, dtype=r.dtype), "value"))
    r.inputs(r.node.input[0], *names)


def _clip(r: _Rewrite) -> None:
    lo, hi = r.pop("min"), r.pop("max")
    names = [
        "" if bound is None else r.constant(np.array(bound, dtype=r.dtype), hint)
        for bound, hint in ((lo, "min"), (hi, "max"))
    ]
    r.inputs(r.node.input[0], *names)


def _scatter(r: _Rewrite) -> None:
    r.node.op_type = "ScatterElements"


def _dropout(r: _Rewrite) -> None:
    # The ratio acts in training only; without `training_mode` the node passes its input on.
    r.pop("ratio")


def _batch_norm(r: _Rewrite) -> None:
    if any(r.node.output[1:]):
        raise _CannotConvert("its training form (more than one output)")
    del r.node.output[1:]
    r.pop("spatial")


def _flattening(r: _Rewrite) -> None:
    """Softmax & co. before opset 13: over all axes from *axis* on, flattened into one."""
    axis = r.pop("axis", 1)
    if axis == -1 or (r.rank is not None and axis % r.rank == r.rank - 1):
        r.set(axis=-1)
        return
    flat, inner, shape = r.name("flat"), r.name("result"), r.name("shape")
    x, y = r.node.input[0], r.node.output[0]
    r.before = [
        helper.make_node("Shape", [x], [shape], name=shape),
        helper.make_node("Flatten", [x], [flat], name=flat, axis=axis),
    ]
    r.after = [helper.make_node("Reshape", [inner, shape], [y], name=r.name("unflat"))]
    r.set(axis=-1)
    r.inputs(flat)
    r.node.output[0] = inner


def _axes_to_input(r: _Rewrite) -> None:
    axes = r.pop("axes")
    if axes is not None:
        r.inputs(r.node.input[0], r.ints(axes, "axes"))


def _reduce_sum(r: _Rewrite) -> None:
    if r.opset < 13:
        _axes_to_input(r)


def _reduce(r: _Rewrite) -> None:
    _axes_to_input(r)


def _split(r: _Rewrite) -> None:
    if r.opset < 13:
        sizes = r.pop("split")
        if sizes is not None:
            r.inputs(r.node.input[0], r.ints(sizes, "split"))
    if len(r.node.input) < 2:
        r.set(num_outputs=len(r.node.output))


def _roi_align(r: _Rewrite) -> None:
    r.set(coordinate_transformation_mode="output_half_pixel")


def _grid_sample(r: _Rewrite) -> None:
    old = r.pop("mode", "bilinear")
    r.set(mode={"bilinear": "linear", "bicubic": "cubic"}.get(old, old))


def _dft(r: _Rewrite) -> None:
    axis = r.constant(np.array(r.pop("axis", 1), dtype=np.int64), "axis")
    r.inputs(r.node.input[0], r.node.input[1] if len(r.node.input) > 1 else "", axis)


_FLATTENING = ("Softmax", "LogSoftmax", "Hardmax")
_REDUCTIONS = ("Max", "Min", "Mean", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
#: Operator -> (the opset from which on it needs no conversion, conversion).
_CONVERSIONS: dict[str, tuple[int, Callable[[_Rewrite], None]]] = {
    "Slice": (10, _slice),
    "TopK": (10, _top_k),
    "Upsample": (10, _resize),
    "Resize": (13, _resize),
    "Pad": (11, _pad),
    "Clip": (11, _clip),
    "Scatter": (11, _scatter),
    "Dropout": (12, _dropout),
    "BatchNormalization": (14, _batch_norm),
    "Squeeze": (13, _axes_to_input),
    "Unsqueeze": (13, _axes_to_input),
    "ReduceSum": (13, _reduce_sum),
    "Split": (18, _split),
    "RoiAlign": (16, _roi_align),
    "GridSample": (20, _grid_sample),
    "DFT": (20, _dft),
    **dict.fromkeys(_FLATTENING, (13, _flattening)),
    **{f"Reduce{name}": (18, _reduce) for name in _REDUCTIONS},
}

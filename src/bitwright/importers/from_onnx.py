"""`load_onnx`: an ONNX file as a `Graph`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from bitwright.errors import ModelError
from bitwright.graph.graph import Graph, GraphInfo, GraphInput
from bitwright.graph.op import Role
from bitwright.importers.assemble import Assembler, look_at_values
from bitwright.importers.onnx_branches import bodies, inline_branches
from bitwright.importers.onnx_check import check_against_runtime
from bitwright.importers.onnx_fold import Folded, fold
from bitwright.importers.onnx_prepare import (
    ask_for_shape,
    fix_input_shapes,
    name_nodes,
    prepare_model,
    read_model,
)
from bitwright.ops.spelling import ONNX, Built, OnnxCall, Unsupported

#: The symbol of dimension 0 of all inputs, if it is dynamic.
_BATCH = "N"
_TRAINED = (Role.WEIGHT, Role.BIAS, Role.PARAMETER)


def load_onnx(
    path: str | Path | ModelProto,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    check: bool = True,
) -> Graph:
    """The model in *path* as a graph whose operators are called as its nodes, its values as its tensors.

    *input_shapes*: shapes of inputs whose dimensions are symbolic or absent, by name; -1 as first entry keeps the batch dynamic.
    *check*: compare the graph with ONNX Runtime on random inputs. Opsets 9 to 23; `info.onnx_model` is the model at
    opset 21 or later. *raises* `ModelError` for unreadable files, for operators that cannot be executed (all of them
    listed), for dimensions that are not known, and if the graph computes something else than ONNX Runtime.
    """
    model, where = read_model(path)
    # The runtime is asked about the user's own file: with shapes fixed it may refuse a branch that is never taken.
    original = ModelProto()
    original.CopyFrom(model)
    name_nodes(original.graph.node)  # ONNX Runtime refuses repeated names
    if input_shapes:
        fix_input_shapes(model, input_shapes, where)
    model = prepare_model(model, where)
    inputs, dynamic = _inputs(model, where)
    batch = _BATCH if dynamic else None
    folded = fold(model, batch)
    while inline_branches(model, folded.arrays):
        folded = fold(model, batch)
    importer = _Importer(model, folded, where)
    graph = importer.build(inputs, dynamic)
    example = _example(inputs, dynamic)
    if check:
        check_against_runtime(graph, original, example, where)
    double = {name: torch.cat([x, x]) for name, x in example.items()} if dynamic else None
    graph.info = replace(graph.info, values=look_at_values(graph, example, double))
    graph.refresh()
    return graph


# --- inputs --------------------------------------------------------------------------------------------------


def _inputs(model: ModelProto, where: str) -> tuple[list[GraphInput], bool]:
    """The graph's inputs and whether their batch is dynamic. *raises* `ModelError` for other unknown dimensions."""
    tensors = {i.name: i.type.tensor_type for i in model.graph.input}
    for name, tensor in tensors.items():
        if tensor.elem_type not in _DTYPES:
            raise ModelError(
                f"{where}, input {name!r}",
                expected="a tensor of numbers",
                found="another type",
                remedy="Export the model with tensors of numbers as inputs.",
            )
    firsts = [t.shape.dim[0] for t in tensors.values() if t.shape.dim]
    dynamic = bool(firsts) and not any(d.HasField("dim_value") for d in firsts)
    found = []
    for name, tensor in tensors.items():
        shape = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        unknown = [i for i, d in enumerate(shape) if d is None and not (dynamic and i == 0)]
        if unknown:
            shown = ", ".join(d.dim_param or str(d.dim_value or "?") for d in tensor.shape.dim)
            raise ModelError(
                f"{where}, input {name!r}",
                expected="fixed dimensions (only a batch that all inputs share may vary)",
                found=f"[{shown}]",
                remedy=ask_for_shape(name, len(shape)),
            )
        found.append(GraphInput(name, tuple(shape), _DTYPES[tensor.elem_type]))
    return found, dynamic


def _example(inputs: Sequence[GraphInput], dynamic: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    example = {}
    for spec in inputs:
        shape = [1 if d is None else d for d in spec.shape]
        if spec.dtype.is_floating_point:
            example[spec.name] = (torch.randn(shape, generator=generator) * 0.5).to(spec.dtype)
        else:  # 0 and 1 are indices into almost any table
            example[spec.name] = torch.randint(0, 2, shape, generator=generator).to(spec.dtype)
    return example


# --- operators -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Obstacle:
    op_type: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op_type} {self.name!r} ({self.reason})"


class _Importer:
    """Turns the nodes that are not constant into operators of ours."""

    def __init__(self, model: ModelProto, folded: Folded, where: str) -> None:
        self.model, self.folded, self.where = model, folded, where
        self.opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.assembler = Assembler()
        self.initializers = {t.name for t in model.graph.initializer}
        self.extra: dict[str, npt.NDArray[Any]] = {}
        self.obstacles: list[_Obstacle] = []
        self.names = {n.name for n in model.graph.node} | {
            v for n in model.graph.node for v in (*n.input, *n.output)
        }

    def build(self, inputs: Sequence[GraphInput], dynamic: bool) -> Graph:
        for spec in inputs:
            self.assembler.add_input(spec)
        for node in self._needed_nodes():
            try:
                self._add(node)
            except Unsupported as reason:
                self.obstacles.append(_Obstacle(node.op_type, node.name, str(reason)))
        if self.obstacles:
            raise ModelError(
                self.where,
                expected="operators that can be executed",
                found=f"{len(self.obstacles)} that cannot: " + "; ".join(map(str, self.obstacles)),
                remedy="Export the model without them, or cut it before them.",
            )
        outputs = [o.name for o in self.model.graph.output]
        for name in outputs:
            self._ensure(name, trained=False)
        info = GraphInfo(
            source="onnx",
            inputs=(),
            outputs=(),
            dynamic_batch=dynamic,
            example_batch=1 if dynamic else _static_batch(inputs),
            onnx_model=self.model,
        )
        return self.assembler.finish(outputs[0] if len(outputs) == 1 else tuple(outputs), info)

    def _needed_nodes(self) -> list[NodeProto]:
        """The nodes that outputs depend on and that are not constant, in execution order."""
        wanted = {o.name for o in self.model.graph.output}
        needed = []
        for node in reversed(self.model.graph.node):
            outputs = [o for o in node.output if o]
            if not wanted.isdisjoint(outputs) and not all(o in self.folded.arrays for o in outputs):
                needed.append(node)
                wanted.update(self._reads(node))
        return needed[::-1]

    def _reads(self, node: NodeProto) -> list[str]:
        """The values a node reads, without those that a known vector stands for."""
        known = self.folded.targets
        reads = [i for k, i in enumerate(node.input) if i and (node.name, k) not in known]
        for body in bodies(node):  # they read outer values by name
            reads += [i for inner in body.node for i in inner.input]
        return reads

    def _add(self, node: NodeProto) -> None:
        if node.domain not in ("", "ai.onnx"):
            raise Unsupported(f"custom domain {node.domain}")
        if any(True for _ in bodies(node)):
            raise Unsupported("control flow")
        builder = ONNX.find(node.op_type)
        if builder is None:
            raise Unsupported("no such operator here")
        self._place(node, builder(self._call(node)))

    def _call(self, node: NodeProto) -> OnnxCall:
        inputs = list(node.input)
        for index in range(len(inputs)):
            target = self.folded.targets.get((node.name, index))
            if target is not None:
                inputs[index] = self._fresh(f"{node.name}.target")
                self.extra[inputs[index]] = target
        while inputs and not inputs[-1]:
            inputs.pop()
        return OnnxCall(
            node.op_type,
            node.name,
            tuple(inputs),
            tuple(node.output),
            {a.name: _attribute(a) for a in node.attribute},
            self.opset,
            lambda name: self.extra.get(name, self.folded.arrays.get(name)),
            self.folded.shape,
        )

    def _place(self, node: NodeProto, built: Built) -> None:
        for index, value in enumerate(built.inputs):
            if isinstance(value, str):
                self._ensure(value, trained=self._is_trained(node, value, index, built.op.role(index)))
        # A value that is missing belongs to a node that is listed as an obstacle already.
        if all(not isinstance(v, str) or v in self.assembler for v in built.inputs):
            outputs = list(node.output)
            while not outputs[-1]:
                outputs.pop()
            self.assembler.add_op(built.op, node.name, built.inputs, outputs)

    def _is_trained(self, node: NodeProto, value: str, index: int, role: Role) -> bool:
        """Whether training may change a constant: weights and what looks like them, but no batch-norm statistics."""
        if node.op_type == "BatchNormalization" and index >= 3:
            return False
        array = self.folded.arrays.get(value)
        return role in _TRAINED or (value in self.initializers and array is not None and array.size > 1)

    def _ensure(self, value: str, *, trained: bool) -> None:
        """Store *value* if it is a constant that is not stored yet."""
        if value in self.assembler:
            return
        array = self.extra.get(value, self.folded.arrays.get(value))
        if array is None:
            return
        tensor = _tensor(array)
        self.assembler.add_constant(value, tensor, parameter=trained and tensor.is_floating_point())

    def _fresh(self, name: str) -> str:
        fresh, n = name, 1
        while fresh in self.names:
            fresh, n = f"{name}_{n}", n + 1
        self.names.add(fresh)
        return fresh


def _static_batch(inputs: Sequence[GraphInput]) -> int:
    firsts = {spec.shape[0] for spec in inputs if spec.shape}
    first = firsts.pop() if len(firsts) == 1 else 1
    return first or 1


_DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


def _attribute(attribute: AttributeProto) -> Any:
    if attribute.type == AttributeProto.TENSOR:
        return numpy_helper.to_array(attribute.t)
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, tuple)) or hasattr(value, "extend"):
        return [v.decode() if isinstance(v, bytes) else v for v in value]
    return value


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array))  # a copy: arrays of a model may be read-only

"""`Writer`: collects the ONNX nodes that the operators of a torch-sourced graph write, and makes a model of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx

from bitwright.errors import ModelError
from bitwright.exporters.edit import fresh_name, used_names
from bitwright.graph.graph import Graph, ValueInfo
from bitwright.graph.op import Op, Role, Shape
from bitwright.graph.replay import Reads
from bitwright.numerics.affine import fake_quantize
from bitwright.version import __version__

#: The lowest opset whose QuantizeLinear knows int16; operators that need more raise `Writer.opset`.
OPSET = 21
#: The symbolic name of the batch dimension.
BATCH = "N"

_ELEMENT_TYPES: dict[torch.dtype, int] = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.int16: onnx.TensorProto.INT16,
    torch.int32: onnx.TensorProto.INT32,
    torch.int64: onnx.TensorProto.INT64,
    torch.bool: onnx.TensorProto.BOOL,
}


class Writer:
    """The `Emitter` of a whole graph. An operator may raise `opset` if it needs a newer one.

    *reads*: quantized reads; constants that an operator takes apart itself (`array`) are then handed out as it reads
    them, because no Q/DQ pair could be put in between.
    """

    def __init__(self, graph: Graph, reads: Reads | None = None) -> None:
        self.graph = graph
        self.opset = OPSET
        #: Output name of a node -> the operator that wrote the node.
        self.owners: dict[str, str] = {}
        self._reads: Reads = reads or {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, npt.NDArray[Any]] = {}
        self._taken = set(graph.values)
        self._op: Op | None = None
        self._first_node = 0

    # --- what an operator may ask ------------------------------------------------------------------------------

    def node(
        self, op_type: str, inputs: Sequence[str | None], outputs: Sequence[str], **attributes: Any
    ) -> None:
        """Append a node of the operator that is being written."""
        names = [name or "" for name in inputs]
        while names and not names[-1]:
            names.pop()
        given = {key: value for key, value in attributes.items() if value is not None}
        node = helper.make_node(op_type, names, list(outputs), **given)
        count = len(self._nodes) - self._first_node
        node.name = f"{self._current.name}/{op_type}_{count}" if count else self._current.name
        self._nodes.append(node)
        self.owners.update({name: self._current.name for name in outputs if name})

    def constant(self, array: npt.NDArray[Any], hint: str) -> str:
        """Register a constant and return its name, `<operator>/<hint>`."""
        name = self.temporary(hint)
        self._constants[name] = np.asarray(array)
        return name

    def temporary(self, hint: str) -> str:
        """A fresh inner value name, `<operator>/<hint>`."""
        return fresh_name(f"{self._current.name}/{hint}", self._taken)

    def shape(self, value: str) -> Shape | None:
        """The shape seen at capture, or None."""
        held = self.graph.values.get(value)
        return None if held is None else held.info.shape

    def array(self, value: str) -> npt.NDArray[Any] | None:
        """The contents of a constant value as the current operator reads it, or None."""
        if value in self._constants:
            return self._constants[value]
        held = self.graph.values.get(value)
        if held is None or not held.is_constant:
            return None
        tensor = self.graph.constant(value).detach()
        q = self._reads.get((value, self._current.name))
        return to_numpy(tensor if q is None else fake_quantize(tensor, q))

    # --- the whole graph ---------------------------------------------------------------------------------------

    def write(self, op: Op) -> None:
        """Let *op* write itself. *raises* whatever its `to_onnx` raises."""
        self._op, self._first_node = op, len(self._nodes)
        op.to_onnx(self, self._inputs(op))
        written = {name for node in self._nodes[self._first_node :] for name in node.output}
        read = {v.name for v in self.graph.values.values() if v.producer == op.name}
        if missing := sorted(read - written):
            raise ModelError(
                f"operator {op.name} ({op.kind})",
                expected=f"ONNX nodes that compute {', '.join(op.outputs)}",
                found=f"nothing for {', '.join(missing)}",
                remedy="This is a fault of the operator's to_onnx; please report it.",
            )

    def model(self) -> onnx.ModelProto:
        """The model of everything written so far."""
        info = self.graph.info
        inputs = [
            value_info(i.name, i.dtype, [BATCH if d is None else d for d in i.shape]) for i in info.inputs
        ]
        outputs = [self._output(name) for name in dict.fromkeys(info.outputs)]
        graph = helper.make_graph(self._nodes, "bitwright", inputs, outputs)
        used = used_names(graph)
        for name, value in self.graph.values.items():
            if value.is_constant and name in used:
                graph.initializer.append(initializer(name, to_numpy(self.graph.constant(name))))
        for name, array in self._constants.items():
            if name in used:
                graph.initializer.append(initializer(name, array))
        ir_version = 10 if self.opset < 23 else 11
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=ir_version
        )
        return signed(made)

    @property
    def _current(self) -> Op:
        assert self._op is not None, "no operator is being written"
        return self._op

    def _inputs(self, op: Op) -> list[str | None]:
        """Value names, with numbers in the call made constants of the type that the operator computes in."""
        node = self.graph.op_node(op.name)
        names = self.graph.op_inputs(op.name)
        real = any(n is not None and self.graph.value(n).info.is_float for n in names)
        for i, argument in enumerate(node.args):
            if not isinstance(argument, fx.Node) and isinstance(argument, bool | int | float):
                names[i] = self.constant(
                    _scalar(argument, real=real and op.role(i) is not Role.INDEX), f"operand_{i}"
                )
        return names

    def _output(self, name: str) -> onnx.ValueInfoProto:
        info = self.graph.value(name).info
        dtype = info.dtype or torch.int64  # a Python integer is an int64 scalar in ONNX
        return value_info(name, dtype, _dimensions(info, self.graph))


def _scalar(number: bool | int | float, *, real: bool) -> npt.NDArray[Any]:
    if isinstance(number, bool):
        return np.array(number)
    return np.array(number, np.float32 if real or isinstance(number, float) else np.int64)


def _dimensions(info: ValueInfo, graph: Graph) -> list[str | int | None]:
    """The shape with the batch left open; an axis that is a multiple of the batch has no name."""
    dimensions: list[str | int | None] = list(info.shape or ())
    axis = info.batch_axis
    if graph.info.dynamic_batch and axis is not None:
        dimensions[axis] = BATCH if dimensions[axis] == graph.info.example_batch else None
    return dimensions


def value_info(name: str, dtype: torch.dtype, shape: Sequence[str | int | None]) -> onnx.ValueInfoProto:
    """The ONNX description of a graph input or output. *raises* `ModelError` for a dtype that ONNX lacks."""
    if dtype not in _ELEMENT_TYPES:
        raise ModelError(
            f"value {name}",
            expected="a dtype that ONNX has",
            found=str(dtype),
            remedy="Cast it in the model.",
        )
    return helper.make_tensor_value_info(name, _ELEMENT_TYPES[dtype], list(shape))


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor's contents on the host."""
    return tensor.detach().cpu().numpy()


def initializer(name: str, array: npt.NDArray[Any]) -> onnx.TensorProto:
    """A stored constant. Zero-dimensional arrays stay so."""
    return numpy_helper.from_array(np.asarray(array, order="C"), name)


def signed(model: onnx.ModelProto, properties: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """*model*, marked as written by this version of Bitwright, with further metadata *properties*."""
    model.producer_name, model.producer_version = "bitwright", __version__
    held = {p.key: p.value for p in model.metadata_props} | dict(properties or {})
    helper.set_model_props(model, held)
    return model

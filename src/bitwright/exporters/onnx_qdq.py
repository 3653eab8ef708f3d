"""The quantized model as ONNX: QuantizeLinear/DequantizeLinear pairs at the values that a plan quantizes.

For a value V: `V_quantized` holds the codes, `V_dequantized` what quantized readers read, `V_scale` and `V_zero_point` the
parameters. Operator outputs and the graph's inputs and outputs keep their names, with one unavoidable exception: where a
graph output V is quantized, V must be what leaves the graph, so V is what DequantizeLinear writes and the operator's own
result is called `V_raw`. A name that the model already has is avoided by a number at the end.

A float node that only moves int8 codes about (`_MOVING`) has its result, exact as it is, put through a pair once more:
ONNX Runtime does that itself, and since 1.26 with a type that it then contradicts, so that it refuses the model.

The file says half-even rounding, because that is what QuantizeLinear means; a target that rounds otherwise cannot be
expressed (docs/numerics.md §7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from bitwright.errors import ModelError
from bitwright.exporters.edit import all_names, drop_unread, fresh_name, rename_reads
from bitwright.exporters.onnx_float import FloatModel, float_model
from bitwright.exporters.writer import initializer, signed, to_numpy
from bitwright.graph.graph import OUTPUT, Graph, Value
from bitwright.graph.replay import Reads
from bitwright.numerics.affine import quantize
from bitwright.numerics.dtype import DType
from bitwright.numerics.spec import QParams
from bitwright.plan.code_names import SUFFIX, say_whose_codes
from bitwright.plan.plan import Plan
from bitwright.plan.reads import is_made_quantized, quantized_reads

#: Nodes behind a DequantizeLinear that ONNX Runtime puts a pair of its own behind, unless there is one.
_MOVING = ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def export_qdq(graph: Graph, plan: Plan) -> onnx.ModelProto:
    """The ONNX model of *graph* in which every read that *plan* quantizes goes through a Q/DQ pair.

    Weights and biases are stored as codes; their float originals only where a float operator still reads them.
    *raises* `ModelError` if an operator cannot be translated, or a quantized value is not float32.
    """
    reads = quantized_reads(graph, plan)
    source = float_model(graph, reads)
    _Inserter(graph, plan, reads, source).run()
    return signed(source.model, {"bitwright.target": plan.target})


class _Inserter:
    """Puts the pairs into one float model, in place."""

    def __init__(self, graph: Graph, plan: Plan, reads: Reads, source: FloatModel) -> None:
        self.graph, self.plan, self.reads, self.source = graph, plan, reads, source
        self.model = source.model.graph
        self.taken = all_names(self.model)
        self.initializers: list[onnx.TensorProto] = []
        self.before: list[onnx.NodeProto] = []  # pairs of graph inputs and constants
        self.after: dict[str, list[onnx.NodeProto]] = {}  # model name of a produced value -> its pair
        self.everywhere: dict[str, str] = {}  # values whose every reader reads the copy -> its name
        self.raw: dict[str, str] = {}  # quantized graph outputs -> what their operator's result is called
        #: (model name of a value, operator) -> what the operator reads instead
        self.edges: dict[tuple[str, str], str] = {}
        #: What DequantizeLinear made of int8 codes with one scale -> the parameters
        self.int8: dict[str, QParams] = {}

    def run(self) -> None:
        for name in dict.fromkeys(value for value, _ in self.reads):
            q = self.plan.qparams(name)
            assert q is not None
            self._insert(self.graph.value(name), q)
        constants = {self.source.name(n) for n, _ in self.reads if self.graph.value(n).is_constant}
        nodes = [*self.before]
        for node in self.model.node:
            self._redirect(node)
            self._follow(node)
            nodes.append(node)
            for i, name in enumerate(node.output):
                nodes += self.after.get(name, [])
                node.output[i] = self.raw.get(name, name)
        rebuilt = [_copy(n) for n in nodes]
        del self.model.node[:]
        self.model.node.extend(rebuilt)
        self.model.initializer.extend(self.initializers)
        drop_unread(self.model, constants)

    # --- one value -------------------------------------------------------------------------------------------

    def _insert(self, value: Value, q: QParams) -> None:
        name = self.source.name(value.name)
        if value.info.dtype not in (torch.float32, None):
            raise ModelError(
                f"value {value.name}",
                expected="float32, the only type that QuantizeLinear pairs are written for",
                found=str(value.info.dtype),
                remedy="Convert the model to float32.",
            )
        if value.is_constant:
            for op in self._readers(value):
                self._insert_constant(value, op, name, q)
            return
        pair, result = self._pair(name, q, is_output=(value.name, OUTPUT) in self.reads)
        if is_made_quantized(self.plan, value):
            self.everywhere[name] = result
        self.edges |= {(name, op): result for op in self._readers(value)}
        say_whose_codes(pair[0], pair[0].output[0], value.name)
        if value.producer is None:
            self.before += pair
        else:
            self.after[name] = pair

    def _pair(self, name: str, q: QParams, *, is_output: bool) -> tuple[list[onnx.NodeProto], str]:
        """The two nodes behind *name*, and what the second one writes: *name* itself if that leaves the graph."""
        copy, source = fresh_name(f"{name}{SUFFIX}", self.taken), name
        if is_output:
            source = self.raw[name] = fresh_name(f"{name}_raw", self.taken)
            result = name
        else:
            result = fresh_name(f"{name}_dequantized", self.taken)
        parameters = self._parameters(name, q)
        quantize_node = helper.make_node("QuantizeLinear", [source, *parameters], [copy], name=copy)
        return [quantize_node, self._dequantize(copy, parameters, result, q)], result

    def _follow(self, node: onnx.NodeProto) -> None:
        """Put a pair behind a float *node* that moves int8 codes about."""
        q = self.int8.get(node.input[0]) if node.op_type in _MOVING else None
        name = node.output[0]
        if q is not None and name not in self.after:
            outputs = {o.name for o in self.model.output}
            self.after[name], result = self._pair(name, q, is_output=name in outputs)
            self.everywhere[name] = result

    def _readers(self, value: Value) -> list[str]:
        """The operators that read *value* quantized."""
        ops = dict.fromkeys(r.op for r in value.readers)
        return [op for op in ops if (value.name, op) in self.reads]

    def _insert_constant(self, value: Value, op: str, name: str, q: QParams) -> None:
        """Codes and DequantizeLinear of a constant for one reader.

        Each reader has codes of its own: ONNX Runtime (1.31, default level) does not load models in which two quantized
        operators share a weight.
        """
        copy = fresh_name(f"{name}{SUFFIX}", self.taken)
        result = self.edges[name, op] = fresh_name(f"{name}_dequantized", self.taken)
        codes = quantize(self.graph.constant(value.name).detach(), q)
        self.initializers.append(initializer(copy, to_numpy(codes).astype(_numpy_type(q.spec.dtype))))
        self.before.append(self._dequantize(copy, self._parameters(name, q, codes.shape), result, q))

    def _dequantize(self, copy: str, parameters: tuple[str, str], result: str, q: QParams) -> onnx.NodeProto:
        axis: dict[str, Any] = {} if q.spec.axis is None else {"axis": q.spec.axis}
        if q.spec.axis is None and q.spec.dtype.name == "int8":
            self.int8[result] = q
        if q.spec.axis is not None and q.spec.group:
            axis = {"axis": 1 - q.spec.axis, "block_size": q.spec.group}
        name = "_dequantized".join(copy.rsplit(SUFFIX, 1))
        return helper.make_node("DequantizeLinear", [copy, *parameters], [result], name=name, **axis)

    def _parameters(self, name: str, q: QParams, shape: Sequence[int] = ()) -> tuple[str, str]:
        """Names of the scale and zero point, stored as one number, one for each channel, or (of *shape*) for each group of a channel."""
        scale = np.array(q.scale, np.float32)
        zero = np.array(q.zero_point).astype(_numpy_type(q.spec.dtype))
        if q.spec.axis is None:
            scale, zero = scale.reshape(()), zero.reshape(())
        elif q.spec.group:
            scale, zero = (a.reshape(shape[q.spec.axis], -1) for a in (scale, zero))
            scale, zero = (scale, zero) if q.spec.axis == 0 else (scale.T, zero.T)
        names = fresh_name(f"{name}_scale", self.taken), fresh_name(f"{name}_zero_point", self.taken)
        self.initializers += [initializer(names[0], scale), initializer(names[1], zero)]
        return names

    # --- readers ---------------------------------------------------------------------------------------------

    def _redirect(self, node: onnx.NodeProto) -> None:
        """Let *node* read the copies that its operator reads quantized."""
        owner = next((self.source.owners[o] for o in node.output if o in self.source.owners), "")

        def rename(name: str) -> str:
            return self.edges.get((name, owner), self.everywhere.get(name, name))

        rename_reads(node, rename)


def _numpy_type(dtype: DType) -> np.dtype[Any]:
    """The array type that ONNX stores codes of *dtype* from; four bits have one of ONNX's own."""
    return helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(dtype.name.upper()))


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    made = onnx.NodeProto()
    made.CopyFrom(node)
    return made

"""Exporting a graph that came from ONNX: the user's own model, with what rewrites changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import torch
from export_cases import runs_alike, samples, solved
from onnx import helper, numpy_helper

from bitwright.exporters.onnx_float import export_float
from bitwright.exporters.onnx_qdq import export_qdq
from bitwright.graph.graph import FoldedBatchNorm, Graph, GraphInfo, GraphInput
from bitwright.importers.assemble import Assembler, look_at_values
from bitwright.ops.conv import Conv
from bitwright.ops.linear import MatMul
from bitwright.ops.shape import Flatten
from bitwright.ops.unary import Unary
from bitwright.runtime.verify import verify

_RANDOM = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return (_RANDOM.standard_normal(shape) * 0.4).astype(np.float32)


W, GAIN, SHIFT, MEAN = array(4, 3, 3, 3), 1 + array(4), array(4), array(4)
VARIANCE = 0.5 + np.abs(array(4))
TABLE = array(4 * 36, 5)


def users_model() -> onnx.ModelProto:
    """conv → bn → relu → flatten → matmul, its table in a Constant node, a weight that is also listed as an input."""
    nodes = [
        helper.make_node("Constant", [], ["table/value"], name="table", value=numpy_helper.from_array(TABLE)),
        helper.make_node("Conv", ["picture", "w:0"], ["conv out"], name="the conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv out", "g", "s", "m", "v"], ["bn out"], name="the bn"),
        helper.make_node("Relu", ["bn out"], ["relu out"], name="the relu"),
        helper.make_node("Shape", ["relu out"], ["size"], name="unread"),
        helper.make_node("Flatten", ["relu out"], ["flat"], name="the flatten"),
        helper.make_node("MatMul", ["flat", "table/value"], ["scores"], name="the matmul"),
    ]
    arrays = {"w:0": W, "g": GAIN, "s": SHIFT, "m": MEAN, "v": VARIANCE}
    inputs = [
        helper.make_tensor_value_info("picture", 1, ["batch", 3, 6, 6]),
        helper.make_tensor_value_info("w:0", 1, W.shape),
    ]
    outputs = [helper.make_tensor_value_info("scores", 1, ["batch", 5])]
    initializers = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "theirs", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, {"author": "somebody"})
    onnx.checker.check_model(model, full_check=True)
    return model


def folded_graph() -> Graph:
    """What capture and the batch-norm rewrite make of `users_model`."""
    factor = GAIN / np.sqrt(VARIANCE + 1e-5)
    a = Assembler()
    a.add_input(GraphInput("picture", (None, 3, 6, 6), torch.float32))
    w = a.add_constant("w:0", torch.tensor(W * factor[:, None, None, None]))
    b = a.add_constant("the conv.bias", torch.tensor(SHIFT - MEAN * factor))
    a.add_op(
        Conv((3, 3), stride=(1, 1), pads=[1] * 4, dilation=(1, 1), groups=1),
        "the conv",
        ["picture", w, b],
        ["bn out"],
    )
    a.add_op(Unary("Relu"), "the relu", ["bn out"], ["relu out"])
    a.add_op(Flatten(1), "the flatten", ["relu out"], ["flat"])
    a.add_op(MatMul(), "the matmul", ["flat", a.add_constant("table/value", torch.tensor(TABLE))], ["scores"])
    info = GraphInfo(
        source="onnx",
        inputs=(),
        outputs=(),
        dynamic_batch=True,
        example_batch=2,
        folded=(FoldedBatchNorm("the conv", "the bn"),),
        onnx_model=users_model(),
    )
    graph = a.finish("scores", info)
    values = look_at_values(graph, samples(graph, 2), samples(graph, 4))
    graph.info = replace(graph.info, values=values)
    graph.refresh()
    return graph


def test_a_folded_convolution_takes_over_name_weight_and_bias() -> None:
    graph = folded_graph()
    model = export_float(graph)
    onnx.checker.check_model(model, full_check=True)
    conv = model.graph.node[1]
    assert (conv.name, list(conv.input), list(conv.output)) == (
        "the conv",
        ["picture", "w:0", "the conv.bias"],
        ["bn out"],
    )
    assert "BatchNormalization" not in [n.op_type for n in model.graph.node]
    assert {t.name for t in model.graph.initializer} == {"w:0", "the conv.bias"}
    runs_alike(graph, model)


def test_everything_else_of_the_users_model_is_kept() -> None:
    model, theirs = export_float(folded_graph()), users_model()
    assert [n.name for n in model.graph.node] == [n.name for n in theirs.graph.node if n.name != "the bn"]
    assert model.graph.name == "theirs"
    assert model.graph.output == theirs.graph.output
    assert [i.name for i in model.graph.input] == ["picture"]
    assert {p.key: p.value for p in model.metadata_props} == {"author": "somebody"}


def test_the_users_model_itself_is_not_touched() -> None:
    graph = folded_graph()
    before = graph.info.onnx_model.SerializeToString(deterministic=True)
    export_float(graph)
    export_qdq(graph, solved(graph, "onnxruntime"))
    assert graph.info.onnx_model.SerializeToString(deterministic=True) == before


def test_constants_that_changed_since_are_written_wherever_they_were_stored() -> None:
    graph = folded_graph()
    with torch.no_grad():
        for name in ("w:0", "table/value"):
            graph.constant(name).mul_(1.5)
    runs_alike(graph, export_float(graph))


def test_a_quantized_constant_node_is_replaced_by_codes() -> None:
    graph = folded_graph()
    model = export_qdq(graph, solved(graph, "generic-int8"))
    onnx.checker.check_model(model, full_check=True)
    assert "Constant" not in [n.op_type for n in model.graph.node]
    assert next(n for n in model.graph.node if n.name == "the matmul").input[1] == "table/value_dequantized"
    assert {t.name for t in model.graph.initializer} >= {"table/value_quantized", "the conv.bias_quantized"}


def test_nodes_outside_the_graph_read_what_everybody_reads() -> None:
    graph = folded_graph()
    model = export_qdq(graph, solved(graph, "generic-int8"))
    assert next(n for n in model.graph.node if n.name == "unread").input[0] == "relu out_dequantized"


def test_an_operator_that_a_rewrite_made_is_written_by_the_graph() -> None:
    graph = folded_graph()
    theirs = users_model()
    theirs.graph.node[3].output[0] = theirs.graph.node[5].input[0] = theirs.graph.node[4].input[0] = "other"
    graph.info = replace(graph.info, onnx_model=theirs)
    model = export_float(graph)
    onnx.checker.check_model(model, full_check=True)
    assert [n.name for n in model.graph.node] == ["the conv", "the relu", "the flatten", "the matmul"]
    runs_alike(graph, model)


def test_the_quantized_model_is_proved() -> None:
    graph = folded_graph()
    plan = solved(graph, "onnxruntime")
    proof = verify(graph, plan, export_qdq(graph, plan), [samples(graph, 8)])
    assert [d.name for d in proof.per_op] == ["the conv", "the flatten", "the matmul"]

"""`load_onnx`: reading, upgrading, naming, refusing."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_cases import SMALL, assert_equals_reference, kinds, model_of

from bitwright.errors import ModelError
from bitwright.importers.from_onnx import load_onnx
from bitwright.ops.unary import Unary

# --- files that cannot be read -------------------------------------------------------------------------------


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_onnx(tmp_path / "none.onnx")


def test_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a directory"):
        load_onnx(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is no model", b"\x00" * 100, b"PK\x03\x04" + b"z" * 50]
)
def test_file_that_is_not_onnx_is_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not ONNX"):
        load_onnx(path)


@pytest.mark.parametrize("part", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_truncated_file_is_reported(tmp_path: Path, part: float) -> None:
    data = model_of(SMALL).SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ModelError, match=r"cut\.onnx"):
        load_onnx(path)


def external(tmp_path: Path) -> Path:
    model = model_of(SMALL)
    weight = numpy_helper.from_array(np.arange(1, 13, dtype=np.float32).reshape(4, 3), "w")
    model.graph.initializer[0].CopyFrom(weight)  # as bytes, which alone can be moved to a file
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_weights_are_read(tmp_path: Path) -> None:
    graph = load_onnx(external(tmp_path))
    assert graph.constant("w").shape == (4, 3)
    assert graph.constant("w")[3].tolist() == [10, 11, 12]


def test_missing_external_weights_are_reported(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match="external data"):
        load_onnx(path)


def test_model_whose_weights_were_not_loaded_is_reported(tmp_path: Path) -> None:
    model = onnx.load(external(tmp_path), load_external_data=False)
    with pytest.raises(ModelError, match="still point to files"):
        load_onnx(model)


def test_what_the_checker_refuses_is_reported() -> None:
    model = model_of(SMALL)
    model.graph.node[1].input[1] = "nowhere"
    with pytest.raises(ModelError, match="nowhere"):
        load_onnx(model)


@pytest.mark.parametrize("opset", [7, 8, 24])
def test_opset_outside_the_range_is_reported(opset: int) -> None:
    with pytest.raises(ModelError, match=f"opset {opset}"):
        load_onnx(model_of(SMALL, opset=opset))


def test_quantized_model_is_reported() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) <float s = {0.1}, int8 z = {0}> {
        q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"""
    with pytest.raises(ModelError, match="quantized already \\(1 DequantizeLinear, 1 QuantizeLinear\\)"):
        load_onnx(model_of(text))


def test_the_given_model_is_not_changed() -> None:
    model = model_of("g (float[N,6] x) => (float[N,6,1] y) { y = Unsqueeze<axes=[2]>(x) }", opset=11)
    before = model.SerializeToString()
    load_onnx(model)
    assert model.SerializeToString() == before


# --- what cannot be executed ---------------------------------------------------------------------------------


def test_all_obstacles_are_listed_at_once() -> None:
    text = """g (float[1,2,4,4] x) => (float[a,b,c,d] y) <float[4] s = {1,1,2,2}> {
        a = Resize<coordinate_transformation_mode="tf_crop_and_resize">(x, , s)
        b = Det(a)
        m, i = MaxPool<kernel_shape=[2,2]>(x)
        c = Cast<to=1>(i)
        d = Add(b, c)
        y = Sigmoid(d) }"""
    with pytest.raises(ModelError) as caught:
        load_onnx(model_of(text))
    message = str(caught.value)
    for part in (
        "found 3 that cannot",
        "Resize 'a'",
        "Det 'b'",
        "MaxPool 'm'",
        "Indices",
        "tf_crop_and_resize",
    ):
        assert part in message


def test_custom_operators_are_listed_with_their_domain() -> None:
    model = model_of(SMALL)
    model.opset_import.add(domain="com.microsoft", version=1)
    model.graph.node[0].op_type, model.graph.node[0].domain = "FusedConv", "com.microsoft"
    with pytest.raises(ModelError, match=r"FusedConv 'h' \(custom domain com.microsoft\)"):
        load_onnx(model)


def test_unknown_standard_operator_is_listed() -> None:
    model = model_of(SMALL)
    model.graph.node[0].op_type = "Frobnicate"
    with pytest.raises(ModelError, match=r"Frobnicate 'h' \(no such operator here\)"):
        load_onnx(model)


def test_control_flow_is_listed() -> None:
    text = """g (float[1,4] x, bool c) => (float[1,4] y) {
        y = If (c) <then_branch = a () => (float[1,4] t) { t = Relu(x) },
                    else_branch = b () => (float[1,4] e) { e = Neg(x) }> }"""
    with pytest.raises(ModelError, match=r"If 'y' \(control flow"):
        load_onnx(model_of(text))


# --- shapes of inputs ----------------------------------------------------------------------------------------

FREE = "g (float[N,C,4] x, float[N,2] z) => (float[N,C,4] y) { y = Relu(x) }"


def test_free_dimension_asks_for_input_shapes() -> None:
    with pytest.raises(ModelError, match="input_shapes=\\{'x'"):
        load_onnx(model_of(FREE))


def test_given_shapes_fix_free_dimensions() -> None:
    graph = load_onnx(model_of(FREE), input_shapes={"x": [-1, 5, 4]})
    assert graph.info.dynamic_batch
    assert graph.info.inputs[0].shape == (None, 5, 4)
    graph = load_onnx(model_of(FREE), input_shapes={"x": [2, 5, 4], "z": [2, 2]})
    assert not graph.info.dynamic_batch
    assert graph.info.example_batch == 2
    assert graph.value("y").info.shape == (2, 5, 4)
    assert graph.value("y").info.batch_axis is None


@pytest.mark.parametrize("shape", [[1, 5], [1, 5, 3], [1, 0, 4], [1, -1, 4]])
def test_shapes_that_do_not_fit_are_reported(shape: list[int]) -> None:
    with pytest.raises(ModelError, match="a shape that fits \\[N, C, 4\\]"):
        load_onnx(model_of(FREE), input_shapes={"x": shape})


def test_shape_for_an_unknown_input_is_reported() -> None:
    with pytest.raises(ModelError, match="one for 'q'"):
        load_onnx(model_of(FREE), input_shapes={"q": [1]})


def test_batch_is_fixed_where_one_input_fixes_it() -> None:
    graph = load_onnx(model_of("g (float[1,4] x, float[1,4] z) => (float[N,4] y) { y = Add(x, z) }"))
    assert not graph.info.dynamic_batch
    assert graph.info.example_batch == 1


# --- names ---------------------------------------------------------------------------------------------------


def test_nodes_and_values_keep_their_names() -> None:
    model = model_of(SMALL)
    model.graph.node[0].name, model.graph.node[1].name = "/stem/act.0/Relu", "head"
    graph = load_onnx(model)
    assert graph.op_names == ["/stem/act.0/Relu", "head"]
    assert set(graph.values) == {"x", "w", "h", "y"}
    assert graph.op_inputs("head") == ["h", "w"]
    assert graph.info.outputs == ("y",)


def test_unnamed_and_repeated_names_are_replaced_by_output_names() -> None:
    model = model_of("g (float[N,4] x) => (float[N,4] y) { a = Relu(x) b = Neg(a) c = Abs(b) y = Exp(c) }")
    for node, name in zip(model.graph.node, ["same", "same", "", "a"], strict=True):
        node.name = name
    graph = load_onnx(model)
    assert graph.op_names == ["a_1", "b", "c", "a"]
    assert [n.name for n in graph.info.onnx_model.graph.node] == graph.op_names


@pytest.mark.parametrize(
    "name", ["values", "ops", "graph", "forward", "weight", "a..b", ".", 'q"uote', "1", "training"]
)
def test_any_name_is_possible(name: str) -> None:
    model = model_of(SMALL)
    model.graph.initializer[0].name = model.graph.node[1].input[1] = name
    model.graph.node[0].name = name
    graph = copy.deepcopy(load_onnx(model))
    assert graph.op_names == [name, "y"]
    assert graph.op_inputs("y") == ["h", name]
    assert graph.constant(name).shape == (4, 3)
    assert_equals_reference(graph, model, 3)


def test_upgrading_keeps_names_and_derives_new_ones() -> None:
    text = """g (float[N,4,6] x) => (float[N,4,6] y, float[N,4,3] u, float[N,4,3] v) {
        c = Clip<min=0.0,max=6.0>(x) y = Softmax<axis=1>(c) u, v = Split<axis=2>(c) }"""
    model = model_of(text, opset=9, ir=4)
    for node, name in zip(model.graph.node, ["clip", "soft", "split"], strict=True):
        node.name = name
    upgraded = load_onnx(model).info.onnx_model
    assert upgraded.opset_import[0].version == 21
    onnx.checker.check_model(upgraded, full_check=True)
    assert {"clip", "soft", "split"} <= {n.name for n in upgraded.graph.node}
    assert {"c", "y", "u", "v"} <= {o for n in upgraded.graph.node for o in n.output}
    new = {t.name for t in upgraded.graph.initializer} | {n.name for n in upgraded.graph.node}
    assert all(name.startswith(("clip", "soft", "split")) for name in new)


def test_weights_can_be_trained_and_statistics_cannot() -> None:
    text = """g (float[N,3,4,4] x) => (float[N,3,4,4] y)
        <float[3] s = {1,2,3}, float[3] b = {1,2,3}, float[3] m = {1,2,3}, float[3] v = {1,2,3}, float k = {2}>
        { n = BatchNormalization(x, s, b, m, v) y = Mul(n, k) }"""
    graph = load_onnx(model_of(text))
    assert set(dict(graph.named_parameters())) == {"s", "b"}
    assert set(dict(graph.named_buffers())) == {"m", "v"}


@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 15, 17, 18, 19, 20, 21, 22, 23])
def test_one_network_at_every_opset(opset: int) -> None:
    squeeze = "q = Squeeze<axes=[2,3]>(g)" if opset < 13 else "q = Squeeze(g, axes)"
    weights = ", ".join(str(v) for v in np.linspace(-0.5, 0.5, 27 * 4).round(3))
    text = f"""g (float[N,3,8,8] x) => (float[N,4] y) <float[4,3,3,3] w = {{{weights}}}, int64[2] axes = {{2,3}}> {{
        c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(r)
        g = GlobalAveragePool(p) {squeeze} y = Softmax<axis=1>(q) }}"""
    model = model_of(text, opset=opset, ir=4 if opset < 10 else 8)
    graph = load_onnx(model)
    assert kinds(graph) == ["Conv", "Relu", "MaxPool", "GlobalAveragePool", "Squeeze", "Softmax"]
    assert graph.info.onnx_model.opset_import[0].version == max(21, opset)
    for batch in (1, 3):
        assert_equals_reference(graph, model, batch)
        assert_equals_reference(graph, graph.info.onnx_model, batch)


def test_half_precision_bounds_keep_their_type() -> None:
    model = model_of("g (float16[N,4] x) => (float16[N,4] y) { y = Clip<min=0.0,max=0.5>(x) }", opset=9)
    graph = load_onnx(model)
    assert graph.value("y").info.dtype is torch.float16


def test_values_know_their_batch_axis() -> None:
    text = "g (float[N,3,4] x) => (float[a,b,c] y) { y = Transpose<perm=[1,0,2]>(x) }"
    info = load_onnx(model_of(text)).value("y").info
    assert info.shape == (3, 1, 4)
    assert info.batch_axis == 1


def test_a_graph_that_computes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of defence: break an operator and see the check name the first wrong value."""
    text = "g (float[N,4] x) => (float[N,4] y) { a = Exp(x) b = Neg(a) y = Sigmoid(b) }"
    monkeypatch.setattr(Unary, "forward", _wrong_neg(Unary.forward))
    with pytest.raises(ModelError, match="value 'b' of Neg 'b'"):
        load_onnx(model_of(text))
    assert load_onnx(model_of(text), check=False).op_names == ["a", "b", "y"]


def _wrong_neg(forward):  # type: ignore[no-untyped-def]
    def wrong(self, x):  # type: ignore[no-untyped-def]
        return x if self.kind == "Neg" else forward(self, x)

    return wrong


def test_rounding_that_grows_is_not_an_error() -> None:
    # A variance as the difference of two large numbers: no two implementations agree on the result.
    text = """g (float[N,64] x) => (float[N,1] y) <float k = {1000}, float e = {1e-9}, int64[1] axes = {1}> {
        a = Add(x, k) m = ReduceMean<axes=[1]>(a) s = Mul(a, a) q = ReduceMean<axes=[1]>(s)
        mm = Mul(m, m) v = Sub(q, mm) y = Abs(v) }"""
    assert load_onnx(model_of(text)).op_names == ["a", "m", "s", "q", "mm", "v", "y"]


def test_small_arrays_survive_the_round_trip() -> None:
    """float64, integers and booleans arrive with their types."""
    arrays = {
        "d": np.array([1.5], dtype=np.float64),
        "i": np.array([3], dtype=np.int32),
        "b": np.array([True]),
        "h": np.array([0.5], dtype=np.float16),
    }
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in arrays]
    outputs = [
        helper.make_tensor_value_info(f"{n}_out", helper.np_dtype_to_tensor_dtype(a.dtype), [1])
        for n, a in arrays.items()
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])]
    initializers = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    graph_proto = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    model = helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = load_onnx(model)(torch.zeros(2))
    for tensor, array in zip(found, arrays.values(), strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert tensor.tolist() == array.tolist()


def test_sparse_weights_are_reported() -> None:
    model = model_of(SMALL)
    values = numpy_helper.from_array(np.ones(1, dtype=np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, dtype=np.int64), "sparse_indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3]))
    with pytest.raises(ModelError, match="1 sparse ones"):
        load_onnx(model)

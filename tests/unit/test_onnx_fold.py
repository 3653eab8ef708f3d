"""`load_onnx`: what becomes constant, and what follows the batch at run time."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, parser
from onnx_cases import SMALL, assert_equals_reference, kinds, model_of, run_reference

from bitwright.graph.replay import Replay
from bitwright.importers.from_onnx import load_onnx

# --- constants and shapes ------------------------------------------------------------------------------------


def test_constant_arithmetic_is_folded_in_the_graph_but_not_in_the_model() -> None:
    text = """g (float[N,4] x) => (float[N,3] y) <float[3,4] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float two = {2}> {
        t = Transpose<perm=[1,0]>(w) d = Mul(t, two) y = MatMul(x, d) }"""
    graph = load_onnx(model_of(text))
    assert kinds(graph) == ["MatMul"]
    assert graph.op_inputs("y") == ["x", "d"]
    assert graph.constant("d")[0].tolist() == [2, 10, 18]
    assert [n.op_type for n in graph.info.onnx_model.graph.node] == ["Transpose", "Mul", "MatMul"]


RESHAPES = {
    "batch from the shape": "s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, ax) t = Concat<axis=0>(u, rest) y = Reshape(x, t)",
    "batch through a slice": "s = Shape(x) u = Slice(s, ax, one) t = Concat<axis=0>(u, rest) y = Reshape(x, t)",
    "batch through casts": """s = Shape(x) f = Cast<to=6>(s) c = Cast<to=7>(f) n = Gather(c, zero) u = Unsqueeze(n, ax)
        t = Concat<axis=0>(u, rest) y = Reshape(x, t)""",
    "a division in a symbol's company": """s = Shape(x) n = Gather(s, zero) k = Gather(s, three) h = Div(k, two)
        u = Unsqueeze(n, ax) v = Unsqueeze(h, ax) t = Concat<axis=0>(u, six, minus, v) y = Reshape(x, t)""",
}


@pytest.mark.parametrize("name", RESHAPES)
def test_shape_computation_becomes_one_constant(name: str) -> None:
    text = f"""g (float[N,3,6,8] x) => (float[a,b,c,d] y)
        <int64 zero = {{0}}, int64 three = {{3}}, int64 two = {{2}}, int64[1] ax = {{0}}, int64[1] one = {{1}},
         int64[3] rest = {{6,6,4}}, int64[1] six = {{6}}, int64[1] minus = {{-1}}> {{ {RESHAPES[name]} }}"""
    model = model_of(text)
    graph = load_onnx(model)
    assert kinds(graph) == ["Reshape"]
    assert graph.value("y").info.shape == (1, 6, 6, 4)
    for batch in (1, 2, 5):
        assert_equals_reference(graph, model, batch)


def test_two_unknown_lengths_are_inferred_only_where_that_is_sound() -> None:
    text = """g (float[N,6] x) => (float[a,b] y) <int64 zero = {0}, int64[1] ax = {0}, int64[1] minus = {-1}, int64 three = {3}> {
        s = Shape(x) n = Gather(s, zero) m = Mul(n, three) u = Unsqueeze(m, ax) t = Concat<axis=0>(u, minus)
        y = Reshape(x, t) }"""
    model = model_of(text)
    graph = load_onnx(model)
    assert "Shape" in kinds(graph)  # 3 N and -1: cannot be told apart by a constant
    for batch in (1, 4):
        assert_equals_reference(graph, model, batch)


def test_expand_pattern_of_exporters_is_folded() -> None:
    # torch writes -1 for "keep" and replaces it at run time: Where(shape == -1, 1, shape).
    text = """g (float[N,1,4] x) => (float[a,b,c] y)
        <int64[3] wish = {-1,5,-1}, int64[1] three = {3}, int64[3] minus = {-1,-1,-1}> {
        ones = ConstantOfShape<value=int64[1] {1}>(three) e = Equal(wish, minus) t = Where(e, ones, wish)
        y = Expand(x, t) }"""
    model = model_of(text)
    graph = load_onnx(model)
    assert kinds(graph) == ["Expand"]
    assert_equals_reference(graph, model, 3)


def test_run_time_shapes_follow_a_repeated_batch() -> None:
    text = """g (float[N,2,4] x) => (float[a,b,c] y) <float[1,1,4] token = {1,2,3,4}, int64 zero = {0}, int64[1] ax = {0},
        int64[2] rest = {1,4}> {
        s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, ax) t = Concat<axis=0>(u, rest)
        e = Expand(token, t) r = Relu(x) y = Concat<axis=1>(e, r) }"""
    graph = load_onnx(model_of(text))
    assert graph.value("t").info.scaled_entries == (0,)
    replay = Replay(graph)
    x = torch.randn(2, 2, 4)
    cached = replay.run({"x": x}, keep=None)
    variants = torch.cat([cached["r"], cached["r"] * 2])
    again = replay.rerun(cached, {"r": variants}, {}, repeat=2)
    assert again["y"].shape == (4, 3, 4)
    torch.testing.assert_close(again["y"][:2], cached["y"])
    torch.testing.assert_close(again["y"][2:, 1:], cached["y"][:, 1:] * 2)


def test_wrong_claims_about_shapes_are_not_believed() -> None:
    model = model_of("g (float[N,4] x) => (float[7] y) <int64[1] m = {-1}> { h = Relu(x) y = Reshape(h, m) }")
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [9, "M"]))
    graph = load_onnx(model, check=False)
    assert graph.value("h").info.shape == (1, 4)
    assert graph(torch.randn(3, 4)).shape == (12,)


def test_outputs_may_be_inputs_or_constants_or_repeat_inner_values() -> None:
    text = """g (float[N,4] x) => (float[N,4] x, float[2] c, float[N,4] h, float[N,4] y) <float[2] c = {1,2}> {
        h = Relu(x) y = Neg(h) }"""
    graph = load_onnx(model_of(text))
    assert graph.info.outputs == ("x", "c", "h", "y")
    x = torch.randn(3, 4)
    first, second, third, fourth = graph(x)
    assert torch.equal(first, x)
    assert second.tolist() == [1, 2]
    assert torch.equal(third, x.relu())
    assert torch.equal(fourth, -x.relu())


def test_nodes_that_no_output_needs_may_be_unsupported() -> None:
    text = "g (float[1,4,4] x) => (float[1,4,4] y) { d = Det(x) y = Relu(x) }"
    assert kinds(load_onnx(model_of(text))) == ["Relu"]


def test_initializers_listed_as_inputs_are_constants() -> None:
    model = model_of(SMALL, opset=9, ir=3)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3]))
    graph = load_onnx(model)
    assert [i.name for i in graph.info.inputs] == ["x"]
    assert graph.value("w").is_constant


def test_local_functions_are_inlined() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float[N,4] x) => (float[N,4] y) { h = own.twice(x) y = Relu(h) }
        <opset_import: ["": 17], domain: "own"> twice (a) => (b) { b = Add(a, a) }"""
    graph = load_onnx(parser.parse_model(text))
    assert kinds(graph) == ["Add", "Relu"]


# --- branches with constant conditions ---

BRANCHES = """
    then_branch = a () => (float[u,v] t) <float k = {2}> { i = Squeeze<axes=[1]>(h) m = Mul(i, k) t = ReduceSum<axes=[1]>(m) },
    else_branch = b () => (float[u,v] e) { j = Neg(h) e = Flatten(j) }"""


@pytest.mark.parametrize("length, expected", [(1, ["Squeeze", "Mul", "ReduceSum"]), (2, ["Neg", "Flatten"])])
def test_branch_with_a_constant_condition_takes_the_place_of_its_if(length: int, expected: list[str]) -> None:
    # What torch's exporter writes for `squeeze(1)`.
    text = f"""g (float[N,L,4] x) => (float[u,v] y) <int64 one = {{1}}> {{
        h = Relu(x) s = Shape(h) n = Gather(s, one) c = Equal(n, one)
        q = If (c) <{BRANCHES}>
        y = Neg(q) }}"""
    model = model_of(text, opset=11)
    graph = load_onnx(model, input_shapes={"x": [-1, length, 4]})
    assert kinds(graph) == ["Relu", *expected, "Neg"]
    assert set(graph.values) >= ({"q", "i", "m"} if length == 1 else {"q", "j"})
    onnx.checker.check_model(graph.info.onnx_model)
    for batch in (1, 3):
        inputs = {"x": torch.randn(batch, length, 4)}
        (theirs,) = run_reference(model, inputs).values()
        np.testing.assert_allclose(Replay(graph).run(inputs)["y"].numpy(), theirs, rtol=1e-5)


def test_taken_branches_may_repeat_outputs_and_names() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) <bool c = {1}, float k = {3}> {
        h = Relu(x)
        q, r = If (c) <
            then_branch = a () => (float[N,4] t, float[N,4] t) <float w = {2}> { i = Neg(h) e = Exp(i) t = Mul(e, w) },
            else_branch = b () => (float[N,4] d, float[N,4] f) { d = Abs(h) f = Exp(h) }>
        z = Add(q, r) y = Mul(z, k) }"""
    model = model_of(text)
    body = next(a.g for a in model.graph.node[1].attribute if a.name == "then_branch")
    body.node[0].name = model.graph.node[0].name = "same"
    graph = load_onnx(model, check=False)  # ONNX Runtime fails on the repeated output
    assert graph.op_names == ["same", "same_1", "e", "t", "r", "z", "y"]
    x = torch.randn(2, 4)
    torch.testing.assert_close(graph(x), 12 * (-x.relu()).exp())

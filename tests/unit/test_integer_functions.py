"""What recurs in an integer model is a function of the file: written once, computed as before."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from onnx import helper
from tests.unit.integer_cases import lowered
from torch import Tensor, nn

from bitwright.exporters.integer.functions import DOMAIN, MEANING, Block, outlined
from bitwright.runtime.session import Session


class Layers(nn.Module):
    """The same few operators, again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return self.norm(x)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return lowered(Layers(), ((2, 16, 8, 8),), "journey6", "int8")[2].model


def test_every_layer_calls_the_same_functions(model: onnx.ModelProto) -> None:
    calls = [n.op_type for n in model.graph.node if n.domain == DOMAIN]
    functions = {f.name: f for f in model.functions}

    assert set(calls) == set(functions)
    assert calls.count("RescaleOf") == 4
    assert all(f.doc_string == MEANING[f.name.split("_")[0]] for f in model.functions)
    assert list(functions["RescaleOf"].input) == ["multiplier", "shift", "room", "zero", "unit"]
    assert list(functions["Rescale"].input) == ["x", "multiplier", "offset", "shift", "zero", "low", "high"]


def test_runtimes_without_functions_get_the_same_bits(model: onnx.ModelProto) -> None:
    flat = onnx.inliner.inline_local_functions(model)
    name = model.graph.input[0].name
    x = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0)) * 2
    (expected,), (found,) = (Session(m).run({name: x}).values() for m in (model, flat))

    assert not flat.functions
    assert len(flat.graph.node) > 3 * len(model.graph.node)
    assert np.array_equal(expected, found)


def test_bias_and_multipliers_are_stored_in_nine_bytes_a_channel(model: onnx.ModelProto) -> None:
    wide = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT64 and 16 in t.dims]

    assert not wide


# --- the nodes themselves ----------------------------------------------------------------------------------------


def chain(source: str, target: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Neg", [source], [f"{target}_1"]),
        helper.make_node("Mul", [f"{target}_1", "k"], [target]),
    ]


def outline(
    nodes: list[onnx.NodeProto], blocks: list[Block], outputs: list[str], **literals: int
) -> tuple[list[onnx.NodeProto], list[onnx.FunctionProto]]:
    constants = {name: np.array(value, np.int32) for name, value in literals.items()}
    return outlined(nodes, blocks, outputs=outputs, literals=constants, roles={"k": "factor"}, opset=21)


def test_equal_blocks_are_one_function() -> None:
    nodes, functions = outline(
        [*chain("a", "b"), *chain("b", "c")], [Block("Sum", 0, 2), Block("Sum", 2, 4)], ["c"]
    )

    assert [(n.op_type, list(n.input), list(n.output)) for n in nodes] == [
        ("Sum", ["a", "k"], ["b"]),
        ("Sum", ["b", "k"], ["c"]),
    ]
    assert [list(f.input) for f in functions] == [["x", "factor"]]


def test_a_literal_is_part_of_the_function_and_tells_two_apart() -> None:
    other = [helper.make_node("Neg", ["b"], ["c_1"]), helper.make_node("Mul", ["c_1", "l"], ["c"])]
    nodes, functions = outline(
        [*chain("a", "b"), *other], [Block("Sum", 0, 2), Block("Sum", 2, 4)], ["c"], k=3, l=4
    )

    assert [n.op_type for n in nodes] == ["Sum", "Sum_2"]
    assert [list(n.input) for n in nodes] == [["a"], ["b"]]
    assert [f.node[0].op_type for f in functions] == ["Constant", "Constant"]


def test_what_others_read_of_a_block_is_one_of_its_results() -> None:
    reader = helper.make_node("Abs", ["b_1"], ["d"])
    nodes, functions = outline([*chain("a", "b"), reader], [Block("Sum", 0, 2)], ["b", "d"])

    assert [list(n.output) for n in nodes] == [["b_1", "b"], ["d"]]
    assert list(functions[0].output) == ["y", "y_2"]


def test_what_a_body_of_control_flow_reads_is_one_of_its_results() -> None:
    bodies = {
        f"{branch}_branch": helper.make_graph(
            [helper.make_node(op_type, ["b_1"], [branch])],
            branch,
            [],
            [helper.make_tensor_value_info(branch, onnx.TensorProto.FLOAT, None)],
        )
        for branch, op_type in (("then", "Abs"), ("else", "Sqrt"))
    }
    reader = helper.make_node("If", ["condition"], ["d"], **bodies)
    nodes, _ = outline([*chain("a", "b"), reader], [Block("Sum", 0, 2)], ["b", "d"])

    assert list(nodes[0].output) == ["b_1", "b"]


def test_a_block_of_one_node_stays_a_node() -> None:
    nodes, functions = outline(chain("a", "b"), [Block("Sum", 0, 1)], ["b"])

    assert [n.op_type for n in nodes] == ["Neg", "Mul"]
    assert not functions

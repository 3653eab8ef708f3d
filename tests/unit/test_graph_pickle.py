"""A pickled graph is the graph: names, values, parameters and outputs."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from tests.networks import Block, Residual, pictures, randomised, ready, tokens
from tests.unit.onnx_cases import SMALL, example, model_of
from torch import Tensor, nn

from bitwright.graph.graph import Graph
from bitwright.graph.replay import Replay
from bitwright.importers.from_onnx import load_onnx
from bitwright.importers.from_torch import capture

#: An input, a value and an operator whose names are no Python identifiers; two outputs, one of them a constant's.
ODD = """g (float[N,4] "in/put:0") => (float[N,3] "0", float[N,3] "out/put")
<float[4,3] "w/1" = {1,2,3,4,5,6,7,8,9,10,11,12}>
{ "h.1" = Relu("in/put:0") "0" = MatMul("h.1", "w/1") "out/put" = Neg("0") }"""


class _Nested(nn.Module):
    """Outputs in a dict of a list and a tuple, one of them an input, one a number; chunks (a tuple value) inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, gain: Tensor) -> dict[str, object]:
        a, b = self.fc(x).chunk(2, -1)
        return {"parts": [a * gain, b], "given": (x, 3)}


class _Tied(nn.Module):
    """One matrix under two names, a buffer outside checkpoints, and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.back.weight = self.there.weight
        self.unread = nn.Parameter(torch.arange(3.0))
        self.register_buffer("offset", torch.ones(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.there(x)) + self.offset


class _Foreign(nn.Module):
    """An operator that is executed as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, 1)


def again(graph: Graph) -> Graph:
    made = pickle.loads(pickle.dumps(graph))
    assert isinstance(made, Graph)
    return made


def assert_same(made: Graph, graph: Graph) -> None:
    assert made.op_names == graph.op_names
    assert [made.op_inputs(n) for n in made.op_names] == [graph.op_inputs(n) for n in graph.op_names]
    assert [(o.kind, o.name, o.outputs, o.describe()) for o in made.ops] == [
        (o.kind, o.name, o.outputs, o.describe()) for o in graph.ops
    ]
    assert list(made.values) == list(graph.values)
    for name, value in graph.values.items():
        other = made.value(name)
        assert (other.producer, other.readers, other.is_constant, other.is_output, other.info) == (
            value.producer,
            value.readers,
            value.is_constant,
            value.is_output,
            value.info,
        )
    assert made.info == graph.info
    assert made.code == graph.code
    assert made.training == graph.training
    state = made.state_dict()
    assert list(state) == list(graph.state_dict())
    assert all(torch.equal(state[k], v) for k, v in graph.state_dict().items())


def assert_equal_outputs(made: Graph, graph: Graph, inputs: dict[str, Tensor]) -> None:
    found, expected = Replay(made).run(inputs), Replay(graph).run(inputs)
    assert all(torch.equal(found[o], expected[o]) for o in graph.info.outputs)


@pytest.mark.parametrize(("module", "data"), [(Residual, pictures), (Block, tokens)])
def test_a_torch_graph_survives_pickling(module, data) -> None:
    graph = ready(randomised(module()), data())

    made = again(graph)

    assert_same(made, graph)
    assert torch.equal(made(data()), graph(data()))


@pytest.mark.parametrize("text", [SMALL, ODD])
def test_an_onnx_graph_survives_pickling_with_the_user_s_model(text: str) -> None:
    graph = load_onnx(model_of(text))

    made = again(graph)

    assert_same(made, graph)
    assert_equal_outputs(made, graph, example(graph, 5))
    assert made.info.onnx_model == graph.info.onnx_model is not None


def test_a_graph_without_its_onnx_model_computes_the_same_on_the_same_parameters() -> None:
    graph = load_onnx(model_of(ODD))

    light = graph.without_onnx_model()

    assert light.info.onnx_model is None
    assert graph.info.onnx_model is not None
    assert_equal_outputs(light, graph, example(graph, 5))
    assert light.constant("w/1").data_ptr() == graph.constant("w/1").data_ptr()
    assert len(pickle.dumps(light)) < len(pickle.dumps(graph))


def test_outputs_keep_their_structure() -> None:
    x, gain = torch.randn(2, 16), torch.tensor([[2.0]]).repeat(2, 1)
    graph = capture(_Nested().eval(), (x, gain))

    found, expected = again(graph)(x, gain=gain), graph(x, gain)

    assert list(found) == list(expected)
    assert [type(found[k]) for k in found] == [list, tuple]
    assert all(torch.equal(a, b) for a, b in zip(found["parts"], expected["parts"], strict=True))
    assert found["given"][1] == 3


def test_shared_parameters_stay_shared_and_unread_ones_stay() -> None:
    graph = capture(_Tied().eval(), tokens(2))

    made = again(graph)

    assert_same(made, graph)
    parameters = dict(made.named_parameters(remove_duplicate=False))
    assert parameters["there.weight"] is parameters["back.weight"]
    assert torch.equal(parameters["unread"], torch.arange(3.0))
    assert "offset" not in made.state_dict()
    assert torch.equal(made(tokens()), graph(tokens()))


def test_an_operator_without_a_class_of_ours_survives() -> None:
    graph = capture(_Foreign().eval(), tokens(2))

    made = again(graph)

    assert made.info.opaque == graph.info.opaque != ()
    assert_same(made, graph)
    assert torch.equal(made(tokens()), graph(tokens()))


def test_a_graph_of_thousands_of_operators_needs_no_deep_stack() -> None:
    chain = "".join(f"h{i + 1} = Relu(h{i})" for i in range(1500))
    graph = load_onnx(model_of("g (float[N,4] h0) => (float[N,4] h1500) {" + chain + "}"), check=False)

    made = again(graph)

    assert made.op_names == graph.op_names


def test_torch_s_own_files_hold_graphs_too() -> None:
    graph = capture(_Tied().eval(), tokens(2))
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)

    made = torch.load(file, weights_only=False)

    assert_same(made, graph)
    assert made.there.weight is made.back.weight


def test_a_pickled_graph_can_be_edited_and_pickled_again() -> None:
    graph = ready(randomised(Residual()), pictures())

    made = again(again(graph))
    made.refresh()

    assert_same(made, graph)

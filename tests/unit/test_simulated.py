"""`SimulatedModel`: the graph as a plan makes it, as a module."""

from __future__ import annotations

import pickle

import pytest
import torch
from tests.networks import Block, Residual, pictures, randomised, ready, solved, tokens
from torch import Tensor, nn

from bitwright.errors import ModelError
from bitwright.graph.replay import Replay
from bitwright.importers.from_torch import capture
from bitwright.plan.reads import quantized_reads
from bitwright.search.simulated import SimulatedModel

CASES = [(Residual, pictures, "generic-int8"), (Block, tokens, "onnxruntime")]


class _Several(nn.Module):
    """Two inputs; outputs in a dict of a list and a tuple, one of them an input, one a number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, gain: Tensor) -> dict[str, object]:
        a, b = self.fc(x).chunk(2, -1)
        return {"parts": [a * gain, b], "given": (x, 3)}


@pytest.mark.parametrize(("module", "data", "target"), CASES)
def test_it_computes_what_the_executor_computes_under_the_plan(module, data, target) -> None:
    x = data()
    graph = ready(randomised(module()), x)
    _, plan = solved(graph, x, target)
    name, out = graph.info.inputs[0].name, graph.info.outputs[0]

    y = SimulatedModel(graph, plan)(x)

    assert torch.equal(y, Replay(graph).run({name: x}, quantized_reads(graph, plan))[out])
    assert not torch.equal(y, graph(x))
    assert not y.requires_grad


@pytest.mark.parametrize(("module", "data", "target"), CASES)
def test_without_a_plan_it_is_the_float_network(module, data, target) -> None:
    graph = ready(randomised(module()), data())

    assert torch.equal(SimulatedModel(graph, None)(data()), graph(data()))


def test_it_is_called_and_answers_like_the_graph() -> None:
    x, gain = torch.randn(2, 16), torch.tensor([[2.0], [3.0]])
    graph = capture(_Several().eval(), (x, gain)).eval()
    model = SimulatedModel(graph, None)

    for found in (model(x, gain), model(x, gain=gain), model(gain=gain, x=x)):
        expected = graph(x, gain)
        assert list(found) == list(expected) == ["parts", "given"]
        assert type(found) is dict
        assert [type(v) for v in found.values()] == [list, tuple]
        assert all(torch.equal(a, b) for a, b in zip(found["parts"], expected["parts"], strict=True))
        assert torch.equal(found["given"][0], x)
        assert found["given"][1] == 3
    with pytest.raises(TypeError, match="gain"):
        model(x)


def test_a_pickled_one_computes_the_same() -> None:
    graph = ready(randomised(Residual()), pictures())
    _, plan = solved(graph, pictures())
    model = SimulatedModel(graph, plan)

    again = pickle.loads(pickle.dumps(model))

    assert again.plan == plan
    assert torch.equal(again(pictures()), model(pictures()))


def test_it_evaluates_only() -> None:
    model = SimulatedModel(ready(randomised(Residual()), pictures()), None)

    assert not model.eval().training
    assert not any(m.training for m in model.modules())
    with pytest.raises(ModelError, match="a plan is only evaluated"):
        model.train()


def test_moving_it_moves_what_it_computes_with() -> None:
    model = SimulatedModel(ready(randomised(Residual()), pictures()), None)

    assert model.to(torch.float64)(pictures().double()).dtype == torch.float64

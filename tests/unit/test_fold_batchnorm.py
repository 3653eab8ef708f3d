"""Batch-norm folding and the decomposition of attention: the same answers, other operators."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.graph.graph import FoldedBatchNorm, Graph
from bitwright.importers.from_torch import capture
from bitwright.rewrite.decompose_attention import decompose_attention
from bitwright.rewrite.fold_batchnorm import fold_batchnorm

torch.manual_seed(0)


def lively(model: nn.Module) -> nn.Module:
    """*model* with batch-norm parameters that a wrong formula could not survive."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, lo, hi in ((module.running_mean, -1, 1), (module.running_var, 0.2, 2)):
                assert tensor is not None
                nn.init.uniform_(tensor, lo, hi)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.uniform_(module.bias, -1, 1)
    return model.eval()


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (3, 6, 6)),
    "conv with bias": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (3, 6, 6)),
    "depthwise conv": (nn.Sequential(nn.Conv1d(4, 8, 3, groups=4), nn.BatchNorm1d(8)), (4, 9)),
    "conv 3d": (nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, affine=False)), (2, 4, 4, 4)),
    "transposed conv": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), (4, 5, 5)),
    "grouped transposed conv": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)),
        (4, 5, 5),
    ),
    "linear": (nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh()), (5,)),
    "two in a row": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), (3, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_folding_keeps_the_answer(name: str) -> None:
    model, shape = LAYERS[name]
    x = torch.randn(3, *shape)
    graph = capture(lively(model), x)
    before = copy.deepcopy(graph.state_dict())
    folded = fold_batchnorm(graph)
    assert not any(op.kind == "BatchNorm" for op in folded.ops)
    torch.testing.assert_close(folded(x), graph(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(t, before[k]) for k, t in graph.state_dict().items())
    assert len(graph.op_names) > len(folded.op_names)


def test_the_layer_keeps_its_name_and_takes_over_the_output() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    folded = fold_batchnorm(capture(model, torch.randn(2, 3, 6, 6)))
    assert folded.op_names == ["0", "2"]
    assert folded.op("0").outputs == ("1",)
    assert folded.op_inputs("0") == ["input", "0.weight", "0.bias"]
    assert folded.info.folded == (FoldedBatchNorm("0", "1"),)
    assert set(folded.info.values) == set(folded.values) == {"input", "0.weight", "0.bias", "1", "2"}
    assert folded.value("0.bias").info.shape == (4,)
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}


class Branching(nn.Module):
    """A convolution followed by a batch norm, and something that forbids folding."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.conv, self.bn, self.why = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), why

    def forward(self, x: Tensor) -> object:
        if self.why == "weight read twice":
            return self.bn(self.conv(self.conv(x)))
        y = self.conv(x)
        if self.why == "result read twice":
            return self.bn(y) + y
        return (self.bn(y), y) if self.why == "result is an output" else self.bn(F.relu(y))


@pytest.mark.parametrize(
    "why", ["weight read twice", "result read twice", "result is an output", "something between"]
)
def test_what_others_read_is_not_folded(why: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    graph = capture(lively(Branching(why)), x)
    folded = fold_batchnorm(graph)
    assert folded.op_names == graph.op_names
    assert folded.info.folded == ()


def test_a_linear_layer_over_tokens_is_not_folded_into_a_norm_over_tokens() -> None:
    model = lively(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    assert fold_batchnorm(capture(model, torch.randn(2, 5, 4))).info.folded == ()


def test_a_batch_norm_called_twice_is_folded_into_both_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.b(self.bn(self.a(x)).relu()))

    x = torch.randn(2, 3, 4, 4)
    graph = capture(lively(Net()), x)
    folded = fold_batchnorm(graph)
    assert [op.kind for op in folded.ops] == ["Conv", "Relu", "Conv"]
    torch.testing.assert_close(folded(x), graph(x), rtol=1e-5, atol=1e-5)


# --- attention ---------------------------------------------------------------------------------------------------


class Attend(nn.Module):
    def __init__(self, mask: Tensor | None, **options: object) -> None:
        super().__init__()
        self.mask, self.options = mask, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask, **self.options)


MASKS = {
    "plain": Attend(None),
    "another scale": Attend(None, scale=0.3),
    "causal": Attend(None, is_causal=True),
    "boolean mask": Attend((torch.rand(4, 6) > 0.3) | (torch.arange(6) == 0)),
    "added mask": Attend(torch.randn(4, 6)),
}


def attention_graph(name: str) -> tuple[Graph, tuple[Tensor, Tensor, Tensor]]:
    inputs = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 5)
    return capture(MASKS[name], inputs), inputs


@pytest.mark.parametrize("name", MASKS)
def test_attention_taken_apart_answers_the_same(name: str) -> None:
    graph, inputs = attention_graph(name)
    (attention,) = graph.op_names
    apart = decompose_attention(graph)
    parts = [
        "k_transposed",
        "qk",
        "scale",
        *(["mask"] if "mask" in name or name == "causal" else []),
        "softmax",
        "av",
    ]
    assert apart.op_names == [f"{attention}.{part}" for part in parts]
    assert apart.info.outputs == graph.info.outputs
    torch.testing.assert_close(apart(*inputs), graph(*inputs), rtol=1e-5, atol=1e-6)
    doubled = [torch.cat([x, x]) for x in inputs]
    torch.testing.assert_close(apart(*doubled), graph(*doubled), rtol=1e-5, atol=1e-6)
    assert sum(apart.macs().values()) == sum(graph.macs().values()) == 3 * 4 * 6 * (8 + 5)


@pytest.mark.parametrize("name", MASKS)
def test_all_new_values_have_true_shapes(name: str) -> None:
    graph, inputs = attention_graph(name)
    apart = decompose_attention(graph)
    assert set(apart.info.values) == set(apart.values)
    interpreter = torch.fx.Interpreter(apart)
    for value in apart.values.values():
        if value.producer is None:
            continue
        found: list[Tensor] = []
        hook = apart.op(value.producer).register_forward_hook(lambda _m, _i, y, found=found: found.append(y))
        interpreter.run(*inputs)
        hook.remove()
        assert value.info.shape == tuple(found[0].shape), value.name
        assert value.info.batch_axis == 0

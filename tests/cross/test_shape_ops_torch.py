"""Shape, pooling, reduction, resizing and recurrent operators as PyTorch spells them.

The graph must equal the module, and the ONNX model written from the graph must equal it in ONNX Runtime, at the batch
size of capture and at another. No call may have stayed opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.exporters.onnx_float import export_float
from bitwright.graph.graph import Graph
from bitwright.importers.from_torch import capture
from bitwright.runtime.session import Session

torch.manual_seed(3)
IMAGE = torch.randn(2, 4, 6, 8)
TOKENS = torch.randn(2, 5, 8)
INDICES = torch.tensor([2, 0])


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Tensor) -> Any:
        return self.function(*xs)


class WithBuffer(nn.Module):
    """Calls *function* with x and an index buffer."""

    def __init__(self, function: Callable[..., Any], buffer: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("indices", buffer)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.indices)


def outputs(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, (tuple, list)) else [found]


def check(model: nn.Module, x: Tensor) -> Graph:
    model.eval()
    graph = capture(model, (x,))
    session = Session(export_float(graph), threads=1)
    for sample in (x, torch.cat([x, x.flip(0) * 0.5 if x.is_floating_point() else x, x])):
        expected = outputs(model(sample))
        ours = outputs(graph(sample))
        written = list(session.run({session.inputs[0]: sample}).values())
        for e, a, b in zip(expected, ours, written, strict=True):
            assert a.dtype == e.dtype
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(b, e.detach().numpy(), rtol=1e-4, atol=2e-5)
    return graph


#: name -> function of one tensor, example, the kind it must become
FORMS: dict[str, tuple[Callable[[Tensor], Any], Tensor, str]] = {
    "view": (lambda x: x.view(x.shape[0], -1), IMAGE, "Reshape"),
    "reshape": (lambda x: x.reshape(-1, 4, 48), IMAGE, "Reshape"),
    "reshape to heads": (lambda x: x.reshape(x.shape[0], 5, 2, 4), TOKENS, "Reshape"),
    "reshape across the batch": (lambda x: x.reshape(x.shape[0] * 5, 8), TOKENS, "Reshape"),
    "unflatten": (lambda x: x.unflatten(1, (2, 2)), IMAGE, "Reshape"),
    "flatten": (lambda x: x.flatten(1), IMAGE, "Flatten"),
    "flatten in the middle": (lambda x: x.flatten(2, 3), IMAGE, "Reshape"),
    "flatten all": (lambda x: x.flatten(), IMAGE, "Reshape"),
    "squeeze": (lambda x: x.mean(1, keepdim=True).squeeze(1), IMAGE, "Squeeze"),
    "squeeze two": (lambda x: x.mean((1, 3), keepdim=True).squeeze((1, 3)), IMAGE, "Squeeze"),
    "squeeze nothing": (lambda x: x.squeeze(1), IMAGE, "Squeeze"),
    "unsqueeze": (lambda x: x.unsqueeze(-2), IMAGE, "Unsqueeze"),
    "permute": (lambda x: x.permute(0, 2, -1, 1), IMAGE, "Transpose"),
    "transpose": (lambda x: x.transpose(1, -1), IMAGE, "Transpose"),
    "swapaxes": (lambda x: x.swapaxes(1, 2), IMAGE, "Transpose"),
    "mT": (lambda x: x.mT, IMAGE, "Transpose"),
    "t": (lambda x: x.flatten(1) @ x.flatten(1).t(), IMAGE, "Transpose"),
    "movedim": (lambda x: x.movedim((1, 2), (3, 1)), IMAGE, "Transpose"),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), IMAGE, "DepthToSpace"),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), IMAGE, "SpaceToDepth"),
    "expand": (lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1), IMAGE, "Expand"),
    "expand to the batch": (
        lambda x: torch.cat([x[:1, :1].expand(x.shape[0], -1, -1), x], 1),
        TOKENS,
        "Expand",
    ),
    "expand as": (lambda x: x.mean(2, keepdim=True).expand_as(x), IMAGE, "ExpandAs"),
    "repeat": (lambda x: x.repeat(1, 2, 1, 3), IMAGE, "Tile"),
    "repeat into more axes": (lambda x: x.mean(0).repeat(3, 1, 1, 2), IMAGE, "Tile"),
    "tile": (lambda x: x.tile((2, 1)), TOKENS, "Tile"),
    "broadcast to": (lambda x: x.mean(1, keepdim=True).broadcast_to(x.shape[0], 5, 8) + x, TOKENS, "Expand"),
    "flip": (lambda x: x.flip((1, 3)), IMAGE, "Flip"),
    "slice": (lambda x: x[:, 1:-1, ::2], IMAGE, "Slice"),
    "narrow": (lambda x: x.narrow(2, 1, 3), IMAGE, "Slice"),
    "narrow from the end": (lambda x: x.narrow(2, -3, 2), IMAGE, "Slice"),
    "select": (lambda x: x[:, -1], TOKENS, "Gather"),
    "split": (lambda x: x.split(3, 2), IMAGE, "Split"),
    "split with sizes": (lambda x: x.split([1, 5, 2], 3), IMAGE, "Split"),
    "chunk": (lambda x: x.chunk(3, 3), IMAGE, "Split"),
    "chunk into one": (lambda x: x.chunk(1, 3), IMAGE, "Split"),
    "unbind": (lambda x: x.unbind(1), TOKENS, "Split"),
    "gather": (lambda x: x.gather(1, (x > 0).long()), TOKENS, "GatherElements"),
    "scatter": (
        lambda x: x.scatter(1, (x > 9).long()[:, :1].repeat(1, 5, 1), x.exp()),
        TOKENS,
        "ScatterElements",
    ),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 3)), IMAGE, "Pad"),
    "pad with a value": (lambda x: F.pad(x, (1, -1), value=2.5), IMAGE, "Pad"),
    "reflect": (lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"), IMAGE, "Pad"),
    "reflect 1d": (lambda x: nn.ReflectionPad1d((2, 1))(x), TOKENS, "Pad"),
    "replicate": (lambda x: F.pad(x, (1, 2, 3, 0), mode="replicate"), IMAGE, "Pad"),
    "circular": (lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"), IMAGE, "Pad"),
    "cast": (lambda x: (x * 9).to(torch.int32), IMAGE, "Cast"),
    "double and back": (lambda x: x.double().float(), IMAGE, "Cast"),
    "type as": (lambda x: (x > 0).type_as(x), IMAGE, "CastLike"),
    "cat": (lambda x: torch.cat([x, x * 2], -1), IMAGE, "Concat"),
    "stack": (lambda x: torch.stack([x, x * 2, x + 1], -2), TOKENS, "Stack"),
    "einsum": (lambda x: torch.einsum("bij,bkj->bik", x, x), TOKENS, "Einsum"),
    "full like": (lambda x: x + torch.full_like(x, 0.5), TOKENS, "FillLike"),
    "zeros of the batch": (lambda x: torch.cat([x, torch.zeros(x.shape[0], 1, 8)], 1), TOKENS, "Fill"),
    "new zeros": (lambda x: torch.cat([x, x.new_zeros(x.shape[0], 2, 8)], 1), TOKENS, "Fill"),
    "new full": (lambda x: x + x.new_full((5, 8), 0.3), TOKENS, "Fill"),
    "full": (lambda x: x + torch.full((5, 8), 0.3), TOKENS, "Fill"),
    "zeros like": (lambda x: torch.zeros_like(x, dtype=torch.int32) + x, TOKENS, "FillLike"),
    "ones like": (lambda x: torch.ones_like(x) + x, TOKENS, "FillLike"),
    "new ones": (lambda x: x + x.new_ones(5, 8), TOKENS, "Fill"),
    "range": (lambda x: x + torch.arange(8), TOKENS, "Range"),
    "range of floats": (lambda x: x + torch.arange(0.0, 4.0, 0.5), TOKENS, "Range"),
    "range of the batch": (lambda x: x + torch.arange(x.shape[0]).view(-1, 1, 1), TOKENS, "Range"),
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE, "MaxPool"),
    "dilated max pool, ceil": (lambda x: F.max_pool2d(x, 2, 3, 1, 2, ceil_mode=True), IMAGE, "MaxPool"),
    "max pool 1d": (lambda x: F.max_pool1d(x, 2), TOKENS, "MaxPool"),
    "max pool 3d": (lambda x: F.max_pool3d(x.unsqueeze(1), (2, 3, 2)), IMAGE, "MaxPool"),
    "average pool 3d": (lambda x: F.avg_pool3d(x.unsqueeze(1), (2, 3, 2)), IMAGE, "AveragePool"),
    "adaptive 1d": (lambda x: F.adaptive_avg_pool1d(x, 4), TOKENS, "AveragePool"),
    "adaptive 3d": (lambda x: F.adaptive_avg_pool3d(x.unsqueeze(1), 1), IMAGE, "GlobalAveragePool"),
    "average pool": (lambda x: F.avg_pool2d(x, 3, 2, 1), IMAGE, "AveragePool"),
    "average pool, ceil": (
        lambda x: F.avg_pool2d(x, (2, 3), 2, (1, 0), ceil_mode=True),
        IMAGE,
        "AveragePool",
    ),
    "average pool without padding": (
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        IMAGE,
        "AveragePool",
    ),
    "average pool 1d": (lambda x: F.avg_pool1d(x, 3, 1, 1), TOKENS, "AveragePool"),
    "adaptive to one": (lambda x: F.adaptive_avg_pool2d(x, 1), IMAGE, "GlobalAveragePool"),
    "adaptive that divides": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), IMAGE, "AveragePool"),
    "mean": (lambda x: x.mean((2, 3)), IMAGE, "ReduceMean"),
    "sum": (lambda x: x.sum(-1, keepdim=True), IMAGE, "ReduceSum"),
    "sum over everything but the batch": (lambda x: x.sum((1, 2, 3)), IMAGE, "ReduceSum"),
    "amax": (lambda x: x.amax((1, 2)), IMAGE, "ReduceMax"),
    "amin": (lambda x: x.amin(3), IMAGE, "ReduceMin"),
    "prod": (lambda x: x.prod(1), TOKENS, "ReduceProd"),
    "log sum exp": (lambda x: x.logsumexp(2), TOKENS, "ReduceLogSumExp"),
    "norm 1": (lambda x: x.norm(1, 2), TOKENS, "ReduceL1"),
    "norm 2": (lambda x: torch.linalg.vector_norm(x, dim=2, keepdim=True), TOKENS, "ReduceL2"),
    "max with indices": (lambda x: x.max(2), TOKENS, "Extremum"),
    "min, values only": (lambda x: x.min(1, keepdim=True).values, TOKENS, "Extremum"),
    "max of two": (lambda x: torch.max(x, x.cos()), TOKENS, "Max"),
    "top k": (lambda x: x.topk(3, 1), TOKENS, "TopK"),
    "top k, values only": (lambda x: x.topk(2, largest=False)[0], TOKENS, "TopK"),
    "arg max": (lambda x: x.argmax(2), TOKENS, "ArgMax"),
    "arg min": (lambda x: x.argmin(1, keepdim=True), TOKENS, "ArgMin"),
    "one hot": (lambda x: F.one_hot((x > 0).long(), 3), TOKENS, "OneHot"),
    "running sum": (lambda x: x.cumsum(1), TOKENS, "CumSum"),
    "lower triangle": (lambda x: x.tril(1), TOKENS, "Trilu"),
    "upper triangle": (lambda x: x.triu(), TOKENS, "Trilu"),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), IMAGE, "Resize"),
    "nearest to a size": (lambda x: F.interpolate(x, size=(9, 5)), IMAGE, "Resize"),
    "nearest exact": (lambda x: F.interpolate(x, size=(9, 5), mode="nearest-exact"), IMAGE, "Resize"),
    "nearest 1d": (lambda x: F.interpolate(x, scale_factor=1.5), TOKENS, "Resize"),
    "nearest exact 1d": (lambda x: F.interpolate(x, size=3, mode="nearest-exact"), TOKENS, "Resize"),
    "nearest 3d": (lambda x: F.interpolate(x.unsqueeze(1), scale_factor=2), IMAGE, "Resize"),
    "trilinear": (lambda x: F.interpolate(x.unsqueeze(1), size=(3, 7, 9), mode="trilinear"), IMAGE, "Resize"),
    "linear 1d": (lambda x: F.interpolate(x, size=13, mode="linear"), TOKENS, "Resize"),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), IMAGE, "Resize"),
    "bilinear, corners": (
        lambda x: F.interpolate(x, size=(11, 3), mode="bilinear", align_corners=True),
        IMAGE,
        "Resize",
    ),
    "bilinear to one": (lambda x: F.interpolate(x, size=(1, 4), mode="bilinear"), IMAGE, "Resize"),
    "bicubic": (lambda x: F.interpolate(x, size=(9, 13), mode="bicubic"), IMAGE, "Resize"),
    "bicubic, corners": (
        lambda x: F.interpolate(x, size=(9, 13), mode="bicubic", align_corners=True),
        IMAGE,
        "Resize",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str) -> None:
    function, x, kind = FORMS[name]
    graph = check(Function(function), x)
    assert graph.info.opaque == ()
    assert kind in {op.kind for op in graph.ops}


INDEXED: dict[str, tuple[Callable[[Tensor, Tensor], Any], Tensor]] = {
    "index select": (lambda x, i: x.index_select(1, i), INDICES),
    "indexing": (lambda x, i: x[:, i], INDICES),
    "indexing by a matrix": (lambda x, i: x[:, :, i], torch.tensor([[1, -1, 0], [2, 2, 3]])),
}


@pytest.mark.parametrize("name", INDEXED)
def test_indexing_by_a_tensor(name: str) -> None:
    function, indices = INDEXED[name]
    graph = check(WithBuffer(function, indices), TOKENS)
    assert graph.info.opaque == ()
    assert [op.kind for op in graph.ops if op.kind != "Slice"] == ["Gather"]  # `:` is a slice


RECURRENT = {
    "LSTM": nn.LSTM(8, 6, batch_first=True),
    "deep LSTM": nn.LSTM(8, 6, num_layers=3, batch_first=True, bidirectional=True),
    "LSTM without bias": nn.LSTM(8, 6, num_layers=2, batch_first=True, bias=False),
    "GRU": nn.GRU(8, 6, batch_first=True, bidirectional=True),
    "RNN": nn.RNN(8, 6, num_layers=2, batch_first=True),
    "RNN with relu": nn.RNN(8, 6, batch_first=True, nonlinearity="relu", bidirectional=True),
}


class Flattened(nn.Module):
    """A recurrent layer whose outputs come as one flat tuple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, states = self.layer(x)
        return (y, *states) if isinstance(states, tuple) else (y, states)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layer(name: str) -> None:
    graph = check(Flattened(RECURRENT[name]), TOKENS)
    assert graph.info.opaque == ()
    kind = name.replace("deep ", "").split()[0]
    (layer,) = (op.name for op in graph.ops if op.kind == kind)
    assert graph.macs()[layer] > 0


def test_time_major_recurrent_layer() -> None:
    model = Flattened(nn.GRU(8, 6))
    graph = capture(model.eval(), (TOKENS,), dynamic_batch=False)
    session = Session(export_float(graph), threads=1)
    for e, b in zip(model(TOKENS), session.run({session.inputs[0]: TOKENS}).values(), strict=True):
        np.testing.assert_allclose(b, e.detach().numpy(), rtol=1e-4, atol=2e-5)

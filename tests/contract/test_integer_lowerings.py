"""Every kind that the integer model knows, lowered on every kind of target, and compared with the simulation code by code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from tests.unit.integer_cases import calibrated, lowered
from torch import Tensor, nn

from bitwright.calibrate.collect import collect
from bitwright.calibrate.solve import Solver
from bitwright.exporters.integer import LOWERINGS, lower
from bitwright.exporters.integer.lowering import TABLE
from bitwright.importers.from_onnx import load_onnx
from bitwright.plan.assign import assign
from bitwright.plan.target import Precision, load_target
from bitwright.runtime.verify import measure

PICTURE, ROWS, VOLUME = (2, 4, 6, 8), (2, 6, 10), (2, 4, 3, 5, 4)


class Family(nn.Module):
    """Functions of the same inputs, each an output. Layers are made by *layers*."""

    def __init__(self, functions: Callable[..., tuple[Tensor, ...]], **layers: nn.Module) -> None:
        super().__init__()
        self.functions = functions
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return self.functions(self, *xs)


def family(
    functions: Callable[..., tuple[Tensor, ...]], *shapes: tuple[int, ...], **layers: nn.Module
) -> tuple[Family, Any]:
    return Family(functions, **layers), shapes


FAMILIES: dict[str, tuple[Family, tuple[tuple[int, ...], ...]]] = {
    "convolution": family(
        lambda m, x, v: (
            F.relu(m.plain(x)), F.hardtanh(m.dilated(x), -1.0, 2.0), m.depthwise(x), m.grouped(x), m.line(x.flatten(2)), m.solid(v),
            m.up(x), m.up_grouped(x), m.up_line(x.flatten(2)),
        ),
        PICTURE, VOLUME,
        plain=nn.Conv2d(4, 6, 3, padding=1), dilated=nn.Conv2d(4, 5, 3, dilation=2, stride=(1, 2), padding=(2, 1)),
        depthwise=nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), grouped=nn.Conv2d(4, 8, 1, groups=2),
        line=nn.Conv1d(4, 3, 5, stride=2), solid=nn.Conv3d(4, 3, 2),
        up=nn.ConvTranspose2d(4, 5, 3, stride=2, padding=1, output_padding=1),
        up_grouped=nn.ConvTranspose2d(4, 6, 2, stride=(2, 3), groups=2, dilation=2),
        up_line=nn.ConvTranspose1d(4, 3, 4, stride=1, padding=3),
    ),
    "products": family(
        lambda m, x, y: (F.relu(m.fc(x)), x @ y.transpose(1, 2), x @ m.fc.weight.t() * 0.25, m.wide(x[:, 0])),
        ROWS, ROWS, fc=nn.Linear(10, 7), wide=nn.Linear(10, 300),
    ),
    "sums": family(
        lambda m, x, y: (
            x + y, F.relu(x - y), x + 0.7, 1.5 - x, x * y, x * -0.3, x / 3.0, torch.maximum(x, y), torch.minimum(x, y),
            torch.clamp_min(torch.maximum(x, torch.tensor(0.3)), 0.1), x + m.bias.weight, x * m.bias.weight, x / (m.bias.weight.abs() + 1),
        ),
        ROWS, ROWS, bias=nn.Linear(10, 1),
    ),
    "rectifiers": family(
        lambda m, x: (
            F.relu(x), F.relu6(3 * x), F.leaky_relu(x, 0.1), m.prelu(x), -x, x.abs(), x.square(), F.hardtanh(x, -0.5, 0.5),
            x.sign() * 0.5, x.floor(), x.ceil(), x.round(), x.trunc(), F.hardshrink(x, 0.4), F.threshold(x, 0.2, 0.0),
            F.leaky_relu(x - 4, 0.01),
        ),
        PICTURE, prelu=nn.PReLU(4),
    ),
    "pools": family(
        lambda m, x, v: (
            F.max_pool2d(x, 2), F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 2), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            F.avg_pool2d(x, (3, 2), 1, (1, 1)), F.adaptive_avg_pool2d(x, 1), F.max_pool1d(x.flatten(2), 3, 2, dilation=2),
            F.max_pool3d(v, 2), F.avg_pool3d(v, 2), F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
            F.avg_pool2d(x, 3, 2, ceil_mode=True), F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        ),
        PICTURE, VOLUME,
    ),
    "reductions": family(
        lambda m, x: (
            x.mean(1), x.sum((1, 2), keepdim=True), x.amax(2), x.amin(-1), x.norm(p=1, dim=1), x.cumsum(2), m.norm(x), x.topk(3, -1)[0],
            x.max(2)[0], x.max(2)[1],
        ),
        PICTURE, norm=nn.BatchNorm2d(4),
    ),
    "volumes": family(
        lambda m, v: (F.interpolate(v, size=(7, 9, 11), mode="trilinear"), F.interpolate(v, scale_factor=2, mode="trilinear")),
        VOLUME,
    ),
    "joins": family(
        lambda m, x, y: (
            torch.cat([x, 3 * y], 1), torch.stack([x, y], 2), torch.where(x[:, :1] > 0, x, y), x.masked_fill(y > 0.5, -1.0),
            F.pad(x, (1, 2)), F.pad(x, (1, 0, 2, 1), value=0.6), F.pad(x, (2, 1, 1, 1), mode="reflect"),
            F.interpolate(x, scale_factor=2), F.interpolate(x, scale_factor=2, mode="bilinear"),
            F.interpolate(x, (9, 5), mode="bicubic"), m.rows(torch.tensor([1, 3])) + x[:, :2, 0, :6],
        ),
        PICTURE, PICTURE, rows=nn.Embedding(5, 6),
    ),
    "moves": family(
        lambda m, x: (
            x.flatten(1), x.reshape(-1, 8, 24), x[:, :, 1:2].squeeze(2), x.unsqueeze(1), x.permute(0, 2, 3, 1), x[:, :1].expand(-1, 3, -1, -1),
            x.repeat(1, 2, 1, 1), x.flip(2), x[:, 1:3, ::2], *x.chunk(2, 1), x[:, 1], x.index_select(2, torch.tensor([2, 0])),
            x.gather(3, torch.zeros_like(x[..., :3], dtype=torch.long)), F.pixel_unshuffle(x, 2),
            F.pixel_shuffle(x, 2),
            x[:, :1].expand_as(x), x.tril(), F.dropout(x, 0.5, False),
        ),
        PICTURE,
    ),
    "tables": family(
        lambda m, x: (
            x.sigmoid(), x.tanh(), F.silu(x), F.gelu(x), F.hardswish(x), x.exp(), x.softmax(-1), m.norm(x), (x.abs() + 0.1).sqrt(), x.sin(),
        ),
        ROWS, norm=nn.LayerNorm(10),
    ),
}  # fmt: skip

#: Kinds that only ONNX spells.
ONNX_ONLY = {"Gemm", "Mean", "ReduceSumSquare", "GatherND", "GlobalMaxPool", "Identity"}

CASES: list[tuple[str, Precision]] = [
    *((name, "int8") for name in ("generic-int8", "onnxruntime", "bm1684x", "bm1684", "journey6")),
    *((name, "int16") for name in ("onnxruntime", "journey6")),
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("target, precision", CASES)
def test_integers_agree_with_the_simulation(name: str, target: str, precision: Precision) -> None:
    graph, _, model, proof = lowered(*FAMILIES[name], target, precision)
    refused = {
        n: why for n, why in model.islands.items() if "does not allow" not in why and "bm1684:" not in why
    }

    assert not {n: (graph.op(n).kind, why) for n, why in refused.items()}
    assert not [d for d in proof.per_op if not d.holds]
    assert max(d.steps for d in proof.per_op) <= 1
    assert not [d for d in proof.per_op if d.steps and graph.op(d.name).table_function() is not None]
    assert not proof.default.failure


def spelled_in_onnx() -> onnx.ModelProto:
    """Operators that torch does not capture as such, on x `[N, 4, 6]`."""
    row = np.random.default_rng(0).normal(size=6).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
    constants = {
        "row": row,
        "weight": weight,
        "places": np.array([[1], [3]], np.int64),
        "axis": np.array([2], np.int64),
    }
    nodes = [
        helper.make_node("GatherND", ["x", "places"], ["rows"]),
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Mean", ["x", "same", "row"], ["mean"]),
        helper.make_node("ReduceSumSquare", ["x", "axis"], ["squares"], keepdims=0),
        helper.make_node("GlobalMaxPool", ["x"], ["largest"]),
        helper.make_node("Gemm", ["squares", "weight", "c"], ["gemm"], alpha=0.5, beta=2.0, transA=1),
        helper.make_node("Flatten", ["gemm"], ["out"]),
    ]  # fmt: skip
    constants["weight"] = weight[:4, :5]
    constants["c"] = row[:5]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4, 6])
    outputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("rows", "mean", "largest", "out")
    ]
    graph = helper.make_graph(
        nodes, "g", [x], outputs, [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("target, precision", CASES)
def test_what_only_onnx_spells_agrees_too(target: str, precision: Precision, tmp_path: Path) -> None:
    onnx.save(spelled_in_onnx(), tmp_path / "m.onnx")
    graph = load_onnx(tmp_path / "m.onnx").eval()
    batch = {"x": torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(3))}
    rules = load_target(target)
    plan = assign(graph, rules, asked=dict.fromkeys(graph.op_names, precision))
    plan = Solver(graph, rules, collect(graph, [batch])).solve(plan)
    model = lower(graph, plan, rules, {})
    proof = measure(graph, plan, model.model, [batch])

    assert {op.kind for op in graph.ops} >= ONNX_ONLY
    assert set(model.islands) <= {n for n, e in plan.ops.items() if e.precision == "float"}
    assert not [d for d in proof.per_op if not d.holds]


def test_every_kind_has_a_case() -> None:
    seen = set(ONNX_ONLY)
    for module, shapes in FAMILIES.values():
        seen |= {op.kind for op in calibrated(module, shapes)[0].ops}

    assert set(LOWERINGS) - {TABLE} - seen == set()


def test_targets_cover_every_rounding_and_form_of_rescale() -> None:
    rules = [load_target(t) for t, _ in CASES]

    assert {r.rescale.form for r in rules} == {"float", "multiplier_shift", "shift"}
    assert {r.rounding.value for r in rules} >= {"half_even", "half_up"}

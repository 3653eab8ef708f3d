"""Every operator as torch spells it: captured, run by us, written as ONNX, run by ONNX Runtime. All must agree."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.exporters.onnx_float import export_float
from bitwright.graph.graph import Graph
from bitwright.importers.from_torch import capture
from bitwright.ops.elementwise import _FORMS as BINARY_FORMS
from bitwright.ops.opaque import Opaque
from bitwright.ops.unary import _FORMS as UNARY_FORMS
from bitwright.rewrite.decompose_attention import decompose_attention
from bitwright.rewrite.fold_batchnorm import fold_batchnorm


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Tensor) -> Any:
        return self.function(*xs)


def run_onnx(graph: Graph, *inputs: Tensor) -> list[np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(export_float(graph).SerializeToString(), options)
    return session.run(None, {i.name: x.numpy() for i, x in zip(graph.info.inputs, inputs, strict=True)})


def check(model: nn.Module, *inputs: Tensor, tolerance: float = 2e-5) -> Graph:
    """The module, its graph and the exported graph agree, at the captured batch size and at another."""
    graph = capture(model.eval(), inputs)
    other = tuple(torch.cat([x, x, x]) for x in inputs) if graph.info.dynamic_batch else inputs
    for xs in (inputs, other):
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(model(*(x.clone() for x in xs)))
            found = torch.utils._pytree.tree_leaves(graph(*xs))
        written = run_onnx(graph, *xs)
        for y, ours, theirs in zip(expected, found, written, strict=True):
            torch.testing.assert_close(ours, y, rtol=tolerance, atol=tolerance, equal_nan=True)
            torch.testing.assert_close(
                torch.from_numpy(theirs), y, rtol=tolerance, atol=tolerance, equal_nan=True
            )
    return graph


def only_kind(graph: Graph) -> str:
    (op,) = graph.ops
    return op.kind


# --- functions of one tensor -------------------------------------------------------------------------------------

ANY = torch.linspace(-3.3, 3.3, 40).reshape(4, 10)
SMALL = ANY / 4
POSITIVE = ANY.abs() + 0.1
ABOVE_ONE = ANY.abs() + 1.01

UNARY: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "Relu": (torch.relu, ANY),
    "LeakyRelu": (lambda x: F.leaky_relu(x, 0.2), ANY),
    "Elu": (lambda x: F.elu(x, 0.7), ANY),
    "Selu": (F.selu, ANY),
    "Celu": (lambda x: F.celu(x, 1.5), ANY),
    "Sigmoid": (torch.sigmoid, ANY),
    "HardSigmoid": (F.hardsigmoid, ANY * 2),
    "HardSwish": (F.hardswish, ANY * 2),
    "Silu": (F.silu, ANY),
    "Mish": (F.mish, ANY),
    "Gelu": (F.gelu, ANY),
    "Tanh": (torch.tanh, ANY),
    "Softplus": (F.softplus, ANY * 10),
    "LogSigmoid": (F.logsigmoid, ANY),
    "ThresholdedRelu": (lambda x: F.threshold(x, 0.5, 0.0), ANY),
    "Shrink": (F.softshrink, ANY),
    "Exp": (torch.exp, ANY),
    "Expm1": (torch.expm1, ANY),
    "Exp2": (torch.exp2, ANY),
    "Log": (torch.log, POSITIVE),
    "Log1p": (torch.log1p, POSITIVE),
    "Log2": (torch.log2, POSITIVE),
    "Log10": (torch.log10, POSITIVE),
    "Sqrt": (torch.sqrt, POSITIVE),
    "Rsqrt": (torch.rsqrt, POSITIVE),
    "Reciprocal": (torch.reciprocal, POSITIVE),
    "Square": (torch.square, ANY),
    "Abs": (torch.abs, ANY),
    "Neg": (torch.neg, ANY),
    "Sign": (torch.sign, ANY.round()),
    "Floor": (torch.floor, ANY),
    "Ceil": (torch.ceil, ANY),
    "Round": (torch.round, (ANY * 2).round() / 2),
    "Trunc": (torch.trunc, ANY),
    "Erf": (torch.erf, ANY),
    "Sin": (torch.sin, ANY),
    "Cos": (torch.cos, ANY),
    "Tan": (torch.tan, SMALL),
    "Asin": (torch.asin, SMALL),
    "Acos": (torch.acos, SMALL),
    "Atan": (torch.atan, ANY),
    "Sinh": (torch.sinh, ANY),
    "Cosh": (torch.cosh, ANY),
    "Asinh": (torch.asinh, ANY),
    "Acosh": (torch.acosh, ABOVE_ONE),
    "Atanh": (torch.atanh, SMALL),
    "IsNaN": (torch.isnan, ANY.log()),
    "IsInf": (torch.isinf, 1 / ANY.round()),
    "Not": (torch.logical_not, ANY > 0),
    "Identity": (torch.positive, ANY),
}


@pytest.mark.parametrize("kind", UNARY)
def test_functions_of_one_tensor(kind: str) -> None:
    function, x = UNARY[kind]
    graph = check(Function(function), x)
    assert only_kind(graph) == kind
    bounds = next(graph.ops).output_range()
    if bounds is not None:
        y = graph(x)
        assert bounds[0] <= y.min()
        assert y.max() <= bounds[1]


def test_no_kind_of_unary_function_is_left_out() -> None:
    # Softsign has no ATen operator of its own; its ONNX spelling is tested with the other ONNX spellings.
    assert set(UNARY) == set(UNARY_FORMS) - {"Softsign"}


OTHER_FORMS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "gelu, tanh form": (lambda x: F.gelu(x, approximate="tanh"), "Gelu"),
    "softplus, beta 2": (lambda x: F.softplus(x, beta=2.0), "Softplus"),
    "hard shrink": (lambda x: F.hardshrink(x, 0.8), "Shrink"),
    "in place": (lambda x: (x * 1).sigmoid_(), "Sigmoid"),
    "relu6": (F.relu6, "Clip"),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 2.0), "Clip"),
    "clamp": (lambda x: x.clamp(-1, 2), "Clip"),
    "clamp from below": (lambda x: x.clamp(min=0.3), "Clip"),
    "clamp from above": (lambda x: torch.clamp_max(x, 0.3), "Clip"),
    "clamp between tensors": (lambda x: x.clamp(x.cos(), x.cos() + 1), "Clip"),
    "bitwise not": (lambda x: ~(x > 0), "Not"),
    "scalar first": (lambda x: 2.0 - x, "Sub"),
    "scalar power": (lambda x: x**3, "Pow"),
    "power of a scalar": (lambda x: 2.0**x, "Pow"),
    "scalar over": (lambda x: 2.0 / (x + 9), "Reciprocal"),
    "floor division": (lambda x: x // 0.7, "FloorDiv"),
    "truncated remainder": (lambda x: torch.fmod(x, 0.7), "FMod"),
    "integer true division": (lambda x: x.round().long() / 3, "Div"),
    "integer floor division": (lambda x: x.round().long() // 3, "FloorDiv"),
    "integer remainder": (lambda x: x.round().long() % 3, "Mod"),
    "integer plus float": (lambda x: x.round().long() + x, "Add"),
    "integer times scalar float": (lambda x: x.round().long() * 0.5, "Mul"),
    "boolean times float": (lambda x: (x > 0) * x, "Mul"),
    "masked fill": (lambda x: x.masked_fill(x > 0, -7.0), "Where"),
    "where with a scalar": (lambda x: torch.where(x > 0, x, 0.5), "Where"),
    "where with two scalars": (lambda x: torch.where(x > 0, 1.0, 0.5), "Where"),
    "dropout": (lambda x: F.dropout(x, 0.5, False), "Dropout"),
    "channel dropout": (lambda x: F.dropout1d(x, 0.5, False), "Dropout"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_forms(name: str) -> None:
    function, kind = OTHER_FORMS[name]
    graph = check(Function(function), ANY.reshape(4, 5, 2) if name == "channel dropout" else ANY)
    assert kind in {op.kind for op in graph.ops}
    assert not graph.info.opaque


# --- functions of two tensors ------------------------------------------------------------------------------------

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Pow": lambda a, b: a.abs() ** b,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "FloorDiv": torch.floor_divide,
    "Mod": torch.remainder,
    "FMod": torch.fmod,
    "Equal": lambda a, b: a.round() == b.round(),
    "NotEqual": lambda a, b: a.round() != b.round(),
    "Less": torch.lt,
    "LessOrEqual": lambda a, b: a.round() <= b.round(),
    "Greater": torch.gt,
    "GreaterOrEqual": lambda a, b: a.round() >= b.round(),
    "And": lambda a, b: (a > 0) & (b > 0),
    "Or": lambda a, b: (a > 0) | (b > 0),
    "Xor": lambda a, b: torch.logical_xor(a > 0, b > 0),
}


@pytest.mark.parametrize("kind", BINARY)
def test_functions_of_two_tensors(kind: str) -> None:
    a, b = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)) * 2, ANY[:, :5].reshape(4, 1, 5)
    graph = check(Function(BINARY[kind]), a, b)
    assert list(graph.ops)[-1].kind == kind


def test_no_kind_of_binary_function_is_left_out() -> None:
    assert set(BINARY) == set(BINARY_FORMS)


# --- modules -----------------------------------------------------------------------------------------------------


def lively(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.3, 1.4, generator=generator)
    return model


def attention(mask: Tensor | None = None, **options: Any) -> nn.Module:
    return Function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, **options))


Q, K, V = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 5)
IMAGE, TOKENS = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 8)

MODULES: dict[str, tuple[nn.Module, tuple[Tensor, ...], str]] = {
    "batch norm": (nn.BatchNorm2d(4), (IMAGE,), "BatchNorm"),
    "batch norm without parameters": (nn.BatchNorm2d(4, affine=False), (IMAGE,), "BatchNorm"),
    "layer norm": (nn.LayerNorm(8), (TOKENS,), "LayerNorm"),
    "layer norm over two axes": (nn.LayerNorm((5, 8)), (TOKENS,), "LayerNorm"),
    "layer norm without parameters": (nn.LayerNorm(8, elementwise_affine=False), (TOKENS,), "LayerNorm"),
    "layer norm without bias": (nn.LayerNorm(8, bias=False), (TOKENS,), "LayerNorm"),
    "group norm": (nn.GroupNorm(2, 4), (IMAGE,), "GroupNorm"),
    "group norm without parameters": (nn.GroupNorm(2, 4, affine=False), (IMAGE,), "GroupNorm"),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), (IMAGE,), "InstanceNorm"),
    "instance norm without parameters": (nn.InstanceNorm2d(4), (IMAGE,), "InstanceNorm"),
    "rms norm": (nn.RMSNorm(8), (TOKENS,), "RMSNorm"),
    "rms norm over two axes": (nn.RMSNorm((5, 8), eps=1e-3, elementwise_affine=False), (TOKENS,), "RMSNorm"),
    "softmax": (nn.Softmax(1), (TOKENS,), "Softmax"),
    "log softmax": (nn.LogSoftmax(-1), (TOKENS,), "LogSoftmax"),
    "prelu": (nn.PReLU(4), (IMAGE,), "PRelu"),
    "prelu, one slope": (nn.PReLU(), (IMAGE,), "PRelu"),
    "prelu, matrix": (nn.PReLU(8), (TOKENS[:, 0],), "PRelu"),
    "embedding": (nn.Embedding(7, 3, padding_idx=1), (torch.randint(0, 7, (2, 5)),), "Embedding"),
    "dropout": (nn.Dropout2d(0.5), (IMAGE,), "Dropout"),
    "attention": (attention(), (Q, K, V), "Attention"),
    "scaled attention": (attention(scale=0.2), (Q, K, V), "Attention"),
    "causal attention": (attention(is_causal=True), (Q, K, V), "Attention"),
    "attention with boolean mask": (
        attention((torch.rand(4, 6) > 0.4) | (torch.arange(6) == 0)),
        (Q, K, V),
        "Attention",
    ),
    "attention with added mask": (attention(torch.randn(4, 6)), (Q, K, V), "Attention"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    model, inputs, kind = MODULES[name]
    graph = check(lively(model), *inputs)
    assert only_kind(graph) == kind


@pytest.mark.parametrize("name", [n for n in MODULES if "attention" in n])
def test_attention_taken_apart_is_written_as_what_it_computes(name: str) -> None:
    model, inputs, _ = MODULES[name]
    apart = decompose_attention(capture(model, inputs))
    (written,) = run_onnx(apart, *inputs)
    torch.testing.assert_close(torch.from_numpy(written), model(*inputs), rtol=1e-5, atol=1e-6)


def test_arithmetic_of_sizes_is_written() -> None:
    graph = check(Function(lambda x: x / (x.shape[0] * 2 + 1 - x.shape[0] // 2)), TOKENS)
    assert "IntArithmetic" in {op.kind for op in graph.ops}


# --- opaque operators --------------------------------------------------------------------------------------------

OPAQUE: dict[str, Callable[[Tensor], Any]] = {
    "aten.logcumsumexp": lambda x: torch.cumsum(x, 1) + torch.logaddexp(x, x * 2),
    "slice assignment": lambda x: torch.slice_scatter(x, x[:, :2] * 2, dim=1, start=1, end=3),
    "alpha": lambda x: torch.add(x, x.exp(), alpha=2),
    "glu": lambda x: F.glu(x, 2),
    "constants inside": lambda x: torch.nan_to_num(x / x.round(), nan=1.0, posinf=2.0, neginf=3.0),
    "several outputs": lambda x: torch.var_mean(x, dim=2),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_operators_are_written_by_torchs_own_exporter(name: str) -> None:
    graph = check(Function(OPAQUE[name]), TOKENS)
    assert graph.info.opaque
    assert all(graph.op(o).is_exportable() for o in graph.info.opaque if isinstance(graph.op(o), Opaque))


def test_what_torch_cannot_translate_is_found_out_before_it_is_written() -> None:
    graph = capture(Function(lambda x: torch.linalg.pinv(x)), torch.randn(2, 3, 3))
    (name,) = graph.info.opaque
    op = graph.op(name)
    assert isinstance(op, Opaque)
    assert not op.is_exportable()


# --- networks ----------------------------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
    "pre-norm encoder layer, gelu": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu"),
        (5, 8),
    ),
    "reflect padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)),
        (3, 6, 6),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    build, shape = NETWORKS[name]
    check(build(), torch.randn(2, *shape))


SHARED = {
    "mobilenetv2_torchvision": (3, 96, 96),
    "squeezenet1_1": (3, 96, 96),
    "cifar10_resnet": (3, 32, 32),
    "cifar10_cct": (3, 32, 32),
    "kws_dscnn": (1, 49, 10),
    "kwt1_fsdd10": (98, 40),
    "kwt1_speech_commands12": (98, 40),
    "deeplabv3_mnv2": (3, 65, 65),
}


@pytest.fixture(scope="module")
def builders() -> ModuleType:
    folder = Path(os.environ.get("BITWRIGHT_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not (folder / "load.py").exists():
        pytest.skip("needs the development models: set BITWRIGHT_DATA to their folder")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("load")
    finally:
        sys.path.remove(str(folder))


@pytest.mark.shared
@pytest.mark.parametrize("name", SHARED)
def test_development_models_capture_fold_and_export(name: str, builders: ModuleType) -> None:
    model = getattr(builders, name)()
    x = torch.randn(1, *SHARED[name])
    graph = capture(model, x)
    graph.load_state_dict(model.state_dict(), strict=True)
    ready = fold_batchnorm(decompose_attention(graph))
    assert graph.info.dynamic_batch
    assert not {op.kind for op in ready.ops} & {"BatchNorm", "Attention"}
    several = torch.randn(3, *SHARED[name])
    with torch.no_grad():
        expected = model(several)
        scale = expected.abs().max().item()
        torch.testing.assert_close(ready(several), expected, rtol=1e-4, atol=2e-5 * scale)
    (written,) = run_onnx(ready, several)
    torch.testing.assert_close(torch.from_numpy(written), expected, rtol=1e-4, atol=2e-5 * scale)

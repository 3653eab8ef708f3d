"""Real networks through ONNX Runtime: every operator proved against the simulation, on real data."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from bitwright.calibrate.collect import collect
from bitwright.calibrate.solve import Solver
from bitwright.exporters.onnx_float import check_exportable, export_float
from bitwright.exporters.onnx_qdq import export_qdq
from bitwright.graph.graph import Graph
from bitwright.importers.from_onnx import load_onnx
from bitwright.importers.from_torch import capture
from bitwright.plan.assign import assign
from bitwright.plan.plan import Plan
from bitwright.plan.target import load_target, target_names
from bitwright.rewrite.decompose_attention import decompose_attention
from bitwright.rewrite.fold_batchnorm import fold_batchnorm
from bitwright.runtime.session import Session
from bitwright.runtime.verify import verify

DATA = Path(os.environ.get("BITWRIGHT_DATA", Path(__file__).parents[3] / "shared" / "data"))
NETWORKS = ("mobilenetv2_torchvision", "cifar10_resnet20", "kwt1_fsdd10")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shared() -> ModuleType:
    """The readers of the development data."""
    if not (DATA / "load.py").is_file():
        pytest.skip(f"the development models and data are not at {DATA} (set BITWRIGHT_DATA)")
    spec = importlib.util.spec_from_file_location("bitwright_shared_load", DATA / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(shared: ModuleType, network: str) -> list[Tensor]:
    """Two batches of four real inputs: `[4, ...]` each."""
    if network.startswith("mobilenet"):
        archive = np.load(shared.data_path("imagenet_sample_even500.npz"))
        few = shared._jpegs({k: archive[k] for k in archive.files})[:: len(archive["labels"]) // 8][:8]
        x = shared.prep_imagenet_torch(np.stack([np.asarray(p)[16:240, 16:240] for p in few]))
    elif network.startswith("cifar"):
        x = shared.prep_cifar_resnet(shared.jpeg_set("cifar10_jpeg_test_even5k.npz")[0][:8])
    else:
        x = shared.fsdd("test", snr_db=0)[0][::37][:8]
    return list(torch.as_tensor(x, dtype=torch.float32).split(4))


def prepared(graph: Graph) -> Graph:
    graph = fold_batchnorm(decompose_attention(graph)).eval()
    check_exportable(graph)
    return graph


def planned(
    graph: Graph, batches: list[dict[str, Tensor]], target: str, asked: Callable[[Graph], dict] | None = None
) -> Plan:
    chosen = load_target(target)
    plan = assign(graph, chosen, asked=None if asked is None else asked(graph))
    return Solver(graph, chosen, collect(graph, batches)).solve(plan)


def prove(graph: Graph, batches: list[dict[str, Tensor]], plan: Plan) -> None:
    """Export and verify; nothing but ties may differ."""
    model = export_qdq(graph, plan)
    onnx.checker.check_model(model, full_check=True)
    proof = verify(graph, plan, model, batches)
    assert [d.name for d in proof.per_op] == [g for g in plan.groups if plan.precision(g) != "float"]
    assert max((d.steps for d in proof.per_op), default=0) <= 1
    assert sum(d.differing - d.ties for d in proof.per_op if d.dtype.bits == 8) == 0


# --- the shared networks -------------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize(
    ("network", "target"),
    [(n, "onnxruntime") for n in NETWORKS]
    + [("cifar10_resnet20", t) for t in target_names() if t != "onnxruntime"]
    + [("mobilenetv2_torchvision", "bm1684")],
)
def test_every_operator_of_a_real_onnx_network_is_proved(
    shared: ModuleType, network: str, target: str
) -> None:
    graph = prepared(load_onnx(DATA / "models" / f"{network}.onnx"))
    batches = [{graph.info.inputs[0].name: x} for x in pictures(shared, network)]
    prove(graph, batches, planned(graph, batches, target))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("network", "build"),
    [
        ("mobilenetv2_torchvision", "mobilenetv2_torchvision"),
        ("cifar10_resnet20", "cifar10_resnet"),
        ("kwt1_fsdd10", "kwt1_fsdd10"),
    ],
)
def test_every_operator_of_a_real_torch_network_is_proved(
    shared: ModuleType, network: str, build: str
) -> None:
    batches = pictures(shared, network)
    graph = prepared(capture(getattr(shared, build)().eval(), (batches[0][:2],)))
    named = [{graph.info.inputs[0].name: x} for x in batches]
    prove(graph, named, planned(graph, named, "onnxruntime"))


@pytest.mark.shared
@pytest.mark.parametrize("network", ["cifar10_resnet20", "kwt1_fsdd10"])
def test_a_network_with_int4_weights_is_proved(shared: ModuleType, network: str) -> None:
    graph = prepared(load_onnx(DATA / "models" / f"{network}.onnx"))
    batches = [{graph.info.inputs[0].name: x} for x in pictures(shared, network)]
    plan = planned(
        graph, batches, "onnxruntime", lambda g: dict.fromkeys(g.op_names[: len(g.op_names) // 2], "w4a8")
    )
    assert {e.precision for e in plan.ops.values() if e.quantizable} == {"w4a8", "int8"}
    prove(graph, batches, plan)


@pytest.mark.shared
@pytest.mark.parametrize("target", ["onnxruntime", "journey6"])
def test_a_network_of_mixed_precisions_is_proved(shared: ModuleType, target: str) -> None:
    def every_other(graph: Graph) -> dict[str, str]:
        return {n: ("int16", "int8", "float")[i // 3 % 3] for i, n in enumerate(graph.op_names)}

    graph = prepared(load_onnx(DATA / "models" / "cifar10_resnet20.onnx"))
    batches = [{graph.info.inputs[0].name: x} for x in pictures(shared, "cifar10_resnet20")]
    plan = planned(graph, batches, target, every_other)
    assert {e.precision for e in plan.ops.values() if e.quantizable} == {"int8", "int16", "float"}
    prove(graph, batches, plan)


@pytest.mark.shared
def test_an_onnx_network_keeps_its_names_and_gains_only_those_of_the_pairs(shared: ModuleType) -> None:
    path = DATA / "models" / "ultraface_rfb320.onnx"
    theirs = onnx.load(path)
    graph = prepared(load_onnx(path))
    assert graph.info.folded
    x = torch.rand(2, 3, 240, 320)
    batches = [{graph.info.inputs[0].name: x[:1]}, {graph.info.inputs[0].name: x[1:]}]
    model = export_qdq(graph, planned(graph, batches, "onnxruntime"))
    before = {n for node in graph.info.onnx_model.graph.node for n in node.output}
    before |= {t.name for t in graph.info.onnx_model.graph.initializer}
    after = {n for node in model.graph.node for n in node.output} | {t.name for t in model.graph.initializer}
    endings = ("_quantized", "_dequantized", "_scale", "_zero_point", "_raw")
    assert [n for n in after - before if not n.endswith(endings)] == []
    assert [o.name for o in model.graph.output] == [o.name for o in theirs.graph.output]
    assert [i.name for i in model.graph.input] == [i.name for i in graph.info.onnx_model.graph.input]
    kept = {n.name for n in model.graph.node}
    folded = {f.batchnorm for f in graph.info.folded}
    gone = [
        n.name for n in graph.info.onnx_model.graph.node if n.name not in kept and n.op_type != "Constant"
    ]
    assert set(gone) == folded


# --- modules of every family ---------------------------------------------------------------------------------


class First(nn.Module):
    """The first result of a recurrent layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)[0]
        return result


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return result


class Tied(nn.Module):
    """A table read as embedding and as weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(10, 8), nn.Linear(8, 10)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(torch.relu(self.table(x)))
        return result


class Mixed(nn.Module):
    """Einsum, reductions, slices, and an operator that Bitwright has no class for."""

    def forward(self, x: Tensor) -> Tensor:
        products = torch.einsum("nab,ncb->nac", x, x)
        return torch.special.entr(torch.sigmoid(x)) * products.mean((1, 2), keepdim=True) + x[:, :1].cumsum(2)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lstm": (lambda: First(nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)), (5, 6)),
    "gru": (lambda: First(nn.GRU(6, 8, batch_first=True)), (5, 6)),
    "attention": (Attend, (5, 8)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
    "mixed": (Mixed, (4, 6)),
    "upsampling": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.AvgPool2d(2),
            nn.MaxPool2d(2),
        ),
        (4, 5, 5),
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3),
            nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.InstanceNorm2d(8, affine=True),
            nn.Hardswish(),
            nn.PReLU(),
            nn.Softplus(),
            nn.Flatten(),
            nn.LayerNorm(288),
            nn.Linear(288, 5),
            nn.LogSoftmax(1),
        ),
        (4, 8, 8),
    ),
    "volume": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.SiLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()
        ),
        (2, 4, 4, 4),
    ),
}


@pytest.mark.parametrize("target", ["onnxruntime", "bm1684x"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_of_every_family_export_and_are_proved(name: str, target: str) -> None:
    torch.manual_seed(0)
    build, shape = MODULES[name]
    module = build().eval()
    graph = prepared(capture(module, (torch.randn(2, *shape),)))
    input_name = graph.info.inputs[0].name
    batches = [{input_name: torch.randn(4, *shape)} for _ in range(2)]
    theirs = Session(export_float(graph)).run(batches[0])[graph.info.outputs[0]]
    np.testing.assert_allclose(theirs, module(batches[0][input_name]).detach().numpy(), rtol=1e-4, atol=1e-5)
    prove(graph, batches, planned(graph, batches, target))


def test_a_tied_table_is_stored_as_floats_for_a_float_look_up_and_as_codes_for_the_product() -> None:
    torch.manual_seed(0)
    graph = prepared(capture(Tied().eval(), (torch.randint(0, 10, (2, 4)),)))
    batches = [{graph.info.inputs[0].name: torch.randint(0, 10, (4, 4))}]
    plan = planned(
        graph, batches, "onnxruntime", lambda g: {o.name: "float" for o in g.ops if o.kind == "Embedding"}
    )
    model = export_qdq(graph, plan)
    names = {t.name for t in model.graph.initializer}
    assert [n for n in names if "weight_quantized" in n] == ["table.weight_quantized"]
    assert "table.weight" in names
    verify(graph, plan, model, batches)

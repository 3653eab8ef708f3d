"""Dropout that torch hides inside one operator: of attention weights, and between recurrent layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.unit.qat_cases import calibrate
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright import (
    FakeQuantState,
    PreparedModel,
    default_qat_qconfig_setter,
    export,
    prepare,
    set_fake_quantize,
)
from bitwright.errors import ModelError
from bitwright.importers.from_torch import capture
from bitwright.runtime.session import Session

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*holds infinity"),  # of causal attention
]


class Attending(nn.Module):
    """`nn.MultiheadAttention`; torch drops weights in two different ways, with and without *weights* as an output."""

    def __init__(self, p: float, *, weights: bool) -> None:
        super().__init__()
        self.part, self.weights = nn.MultiheadAttention(6, 2, p, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, x, x, need_weights=self.weights)[0]  # type: ignore[no-any-return]


class Functional(nn.Module):
    """Attention as a function, as most networks call it."""

    def __init__(self, p: float, *, causal: bool = False) -> None:
        super().__init__()
        self.p, self.causal, self.scale = p, causal, nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        p = self.p if self.training else 0.0
        return F.scaled_dot_product_attention(x * self.scale, x, x + 0.5, dropout_p=p, is_causal=self.causal)


class ByShare(nn.Module):
    """Dropout that evaluation switches off by a share of 0, with or without saying the mode too."""

    def __init__(self, p: float, *, says: bool) -> None:
        super().__init__()
        self.p, self.says, self.part = p, says, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        p = self.p if self.training else 0.0
        x = F.dropout(x, p, training=self.training) if self.says else F.dropout(x, p)
        return self.part(x)  # type: ignore[no-any-return]


class Layered(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], p: float, **options: int) -> None:
        super().__init__()
        self.part = kind(6, 6, 2, dropout=p, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)[0]  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[float], nn.Module]] = {
    "attention with weights": lambda p: Attending(p, weights=True),
    "attention": lambda p: Attending(p, weights=False),
    "functional attention": Functional,
    "causal attention": lambda p: Functional(p, causal=True),
    "dropout by its share": lambda p: ByShare(p, says=False),
    "dropout by its share and mode": lambda p: ByShare(p, says=True),
    "LSTM": lambda p: Layered(nn.LSTM, p),
    "GRU": lambda p: Layered(nn.GRU, p),
    "RNN": lambda p: Layered(nn.RNN, p),
}
X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))


def network(name: str, p: float) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name](p).eval()


def prepared(name: str, p: float) -> PreparedModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="prepare: the dropout")
        return prepare(network(name, p), X)


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(5)
    return model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NETWORKS)
def test_in_training_the_same_is_dropped_as_by_the_authors_module(name: str) -> None:
    author, model = network(name, 0.4), prepared(name, 0.4)
    set_fake_quantize(model, FakeQuantState.FLOAT)
    alive, quiet = seeded(model.train(), X), seeded(model.eval(), X)

    torch.testing.assert_close(alive, seeded(author.train(), X))
    torch.testing.assert_close(quiet, author.eval()(X))
    assert not torch.allclose(alive, quiet)


@pytest.mark.parametrize("name", NETWORKS)
def test_while_quantized_calls_in_training_differ_and_gradients_flow(name: str) -> None:
    model = prepared(name, 0.4)
    calibrate(model, X)
    set_fake_quantize(model.train(), FakeQuantState.QAT)
    first, second = model(X), model(X)
    first.square().mean().backward()

    assert not torch.equal(first, second)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NETWORKS)
def test_in_evaluation_and_in_the_file_nothing_is_dropped(name: str, tmp_path: Path) -> None:
    outputs, files = [], []
    for p in (0.0, 0.4):
        model = prepared(name, p)
        calibrate(model, X)
        outputs.append(model(X))
        exported = export(model, tmp_path / f"{p}.onnx")
        files.append(next(iter(Session(exported.path).run({"x": X}).values())))

    assert torch.equal(*outputs)
    assert torch.equal(*(torch.as_tensor(f) for f in files))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_asked_for_share_of_weights_is_dropped_and_the_rest_scaled(p: float, causal: bool) -> None:
    class Weights(nn.Module):
        """All keys alike, and values that show the weights: outputs are the weights."""

        def forward(self, x: Tensor) -> Tensor:
            q = x * 0.0
            return F.scaled_dot_product_attention(
                q, q, x, dropout_p=p if self.training else 0.0, is_causal=causal
            )

    x = torch.eye(32).expand(8, 32, 32).contiguous()
    model = prepare(Weights(), x)
    set_fake_quantize(model, FakeQuantState.FLOAT)
    visible = model.eval()(x) > 0
    found = model.train()(x)[visible]
    spread = (p * (1 - p) / found.numel()) ** 0.5
    kept = (model.eval()(x)[visible] / (1 - p))[found > 0]

    assert abs((found == 0).double().mean().item() - p) < 5 * spread
    torch.testing.assert_close(found[found > 0], kept)


def test_behind_float_dropout_the_range_is_that_of_the_chip_which_drops_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    model[0].qconfig = model[1].qconfig = None  # type: ignore[assignment]
    ready = prepare(model, X, default_qat_qconfig_setter)
    calibrate(ready, X)
    quantizer = ready.get_submodule("1.activation_post_process")
    before = quantizer.scale.clone()
    set_fake_quantize(ready.train(), FakeQuantState.QAT)
    outputs = [ready(X) for _ in range(20)]

    torch.testing.assert_close(quantizer.scale, before)  # 1 / (1 - p) would have doubled what it sees
    assert not torch.equal(*outputs[:2])


def test_dropout_that_is_lost_is_said_to_be() -> None:
    with pytest.warns(UserWarning, match="the dropout inside part is left out"):
        prepare(Layered(nn.LSTM, 0.1, proj_size=3), X)


def test_a_subclass_with_a_forward_of_its_own_is_not_switched_to_training() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            y = super().forward(x, x, x)[0]
            return y.exp() if self.training else y

    with (
        pytest.warns(UserWarning, match="branches on self.training"),
        pytest.warns(UserWarning, match="the dropout inside Own is left out"),
    ):
        model = prepare(Own(6, 2, 0.1, batch_first=True), X)

    assert not any("dropout" in name for name, _ in model.named_modules())


def test_dropout_in_a_branch_on_training_is_reported() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (F.dropout(x, 0.3) if self.training else x) * 2

    with pytest.warns(
        UserWarning, match=r"branches on self.training \(differs in: aten.dropout.default, aten.mul.Tensor\)"
    ):
        capture(Branch(), X)


def test_dropout_that_stays_in_evaluation_is_refused() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.4)

    with pytest.raises(ModelError, match="depend on chance"):
        prepare(Always(), X)


@pytest.mark.parametrize("training", [True, False])
def test_capture_leaves_the_mode_of_every_module(training: bool) -> None:
    model = network("attention", 0.4).train(training)
    before = {path: m.training for path, m in model.named_modules()}
    capture(model, X)

    assert {path: m.training for path, m in model.named_modules()} == before

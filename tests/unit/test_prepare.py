"""`prepare`: names, checkpoints, what networks it takes, who gets which wish, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests.unit.qat_cases import (
    KINDS,
    Holder,
    calibrate,
    of_kind,
    pixels,
    prepared,
    small,
    train,
)
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright import FakeQuantState, freeze_batchnorm, prepare, set_fake_quantize
from bitwright.errors import ModelError, UnknownName
from bitwright.ops.batchnorm import BatchNorm

pytestmark = pytest.mark.usefixtures("one_thread")


def floating(model: nn.Module) -> nn.Module:
    """*model* in state FLOAT."""
    set_fake_quantize(model, FakeQuantState.FLOAT)
    return model


# --- names and checkpoints -------------------------------------------------------------------------------------


def test_parameters_keep_their_names_and_order() -> None:
    names = [name for name, _ in small().named_parameters()]

    assert [name for name, _ in prepared().named_parameters()] == names


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_checkpoint_loads_strictly(kind: str) -> None:
    model, trained = prepared(kind), small()
    torch.nn.init.normal_(trained.head.weight)
    result = model.load_state_dict(trained.state_dict(), strict=True)

    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(model.get_parameter("head.weight"), trained.head.weight)


def test_a_float_checkpoint_of_a_bigger_module_loads_strictly() -> None:
    checkpoint = Holder(small()).state_dict()
    result = Holder(prepared()).load_state_dict(checkpoint, strict=True)

    assert (result.missing_keys, result.unexpected_keys) == ([], [])


def test_a_bigger_module_misses_a_key_of_the_float_model() -> None:
    checkpoint = Holder(small()).state_dict()
    del checkpoint["net.head.weight"]

    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"net.head.weight\"\. \n?"):
        Holder(prepared()).load_state_dict(checkpoint)


def test_a_checkpoint_of_a_wrapped_model_names_the_prefix() -> None:
    checkpoint = {f"module.{key}": t for key, t in small().state_dict().items()}

    with pytest.raises(ModelError, match=r"strip the prefix 'module\.'"):
        prepared().load_state_dict(checkpoint)


def test_a_checkpoint_with_other_names_says_which() -> None:
    checkpoint = {key.replace("head", "classifier"): t for key, t in small().state_dict().items()}

    with pytest.raises(
        ModelError, match=r"2 missing \(head\.weight, head\.bias\) and 2 unexpected .*strict=False"
    ):
        prepared().load_state_dict(checkpoint)


def test_a_checkpoint_of_a_model_prepared_otherwise_says_so() -> None:
    checkpoint = prepared("lsq").state_dict()

    with pytest.raises(ModelError, match="prepared with another qconfig"):
        prepared("pact").load_state_dict(checkpoint)


def test_the_state_of_an_optimizer_of_the_float_model_fits() -> None:
    model = small().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(pixels()).sum().backward()
    optimizer.step()
    ours = prepared()
    continued = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    continued.load_state_dict(optimizer.state_dict())
    train(ours, pixels(), 1, continued)

    assert all(continued.state[p]["momentum_buffer"].shape == p.shape for p in ours.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind: str) -> None:
    losses = train(prepared(kind), pixels(), 12)

    assert losses[-1] < 0.7 * losses[0]


def test_the_model_that_was_given_is_not_changed() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    train(prepare(model, pixels(2)), pixels(), 2)

    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


# --- networks ----------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Functional code in a submodule, which is called twice."""

    class Squash(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x.abs() + 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = Functional.Squash(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(self.fc(self.a(x))), 0.5, training=self.training)


class Many(nn.Module):
    """Two inputs; a dictionary that holds a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
        z = self.fc(x) * y
        return {"sum": z + x, "pair": (z, torch.sigmoid(y)), "given": x}


class Attention(nn.Module):
    """Self-attention with a residual, and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm, self.drop = nn.LSTM(6, 4, batch_first=True), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (h, _) = self.lstm(x + self.drop(self.mha(x, x, x, need_weights=False)[0]))
        return y, h


Case = tuple[Callable[[], nn.Module], tuple[Tensor, ...]]
NETWORKS: dict[str, Case] = {
    "convolutions": (small, (pixels(3),)),
    "functional and shared": (Functional, (torch.randn(3, 6),)),
    "many inputs and outputs": (Many, (torch.randn(3, 6), torch.randn(3, 6))),
    "attention and lstm": (Attention, (torch.randn(3, 5, 6),)),
}


def tensors(result: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", NETWORKS)
def test_in_state_float_the_network_answers_as_before_and_in_the_same_structure(name: str) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    result, expected = floating(prepare(model, inputs))(*inputs), model(*inputs)

    assert torch.utils._pytree.tree_structure(result) == torch.utils._pytree.tree_structure(expected)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_finite_gradient(name: str, kind: str) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = prepare(make().train(), inputs, of_kind(kind))
    sum(t.square().sum() for t in tensors(model(*inputs))).backward()  # type: ignore[union-attr]

    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_calibration_brings_int8_outputs_near_the_float_ones(name: str) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    ours = calibrate(prepare(model, inputs), inputs)
    with torch.no_grad():
        pairs = zip(tensors(ours(*inputs)), tensors(model(*inputs)), strict=True)
        distances = [float((a - b).norm() / b.norm()) for a, b in pairs]

    assert max(distances) < 0.05


def test_operators_of_functional_code_have_stable_names() -> None:
    names = ["a._generated_abs_0", "a._generated_add_1", "a._generated_log_2"]
    for _ in range(2):
        model = prepare(Functional(), torch.randn(2, 6))

        assert [row["name"] for row in model.report.rows][:3] == names
        assert [model.get_submodule(name).kind for name in names] == ["Abs", "Add", "Log"]


def test_a_module_called_twice_has_one_weight_quantizer_and_two_for_its_results() -> None:
    found = [
        path for path, _ in prepare(Functional(), torch.randn(2, 6)).quantizers if path.startswith("fc.")
    ]

    assert sorted(found) == [
        "fc._call_1.activation_post_process",
        "fc.activation_post_process",
        "fc.weight_fake_quant",
    ]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", ["functional and shared", "attention and lstm"])
def test_dropout_is_alive_in_training_mode_alone_however_the_model_was_prepared(
    name: str, mode: bool
) -> None:
    make, inputs = NETWORKS[name]
    model = floating(prepare(make().train(mode), inputs))
    differs = {
        m: not torch.equal(*(tensors(model.train(m)(*inputs))[0] for _ in range(2))) for m in (True, False)
    }

    assert differs == {True: True, False: False}


@pytest.mark.parametrize("mode", [True, False])
def test_the_prepared_model_is_in_the_mode_of_the_float_model(mode: bool) -> None:
    model = prepare(small().train(mode), pixels(2))

    assert {m.training for m in model.modules()} == {mode}


# --- batch normalisation -----------------------------------------------------------------------------------------


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.named_buffers() if "running_" in name}


@pytest.mark.parametrize("mode, moves", [("trained", True), ("frozen", False)])
def test_batch_statistics_move_only_where_they_are_trained(mode: str, moves: bool) -> None:
    model = prepared(batchnorm=mode)
    before, gain = statistics_of(model), model.get_parameter("bn1.weight").detach().clone()
    train(model, pixels(), 2)

    assert [torch.equal(t, before[name]) for name, t in statistics_of(model).items()] == [not moves] * 4
    assert not torch.equal(model.get_parameter("bn1.weight"), gain)


def test_batch_normalisation_can_be_frozen_in_the_middle_of_training() -> None:
    model = prepared()
    train(model, pixels(), 1)
    freeze_batchnorm(model)
    before = statistics_of(model)
    train(model, pixels(), 1)
    freeze_batchnorm(model, frozen=False)

    assert all(torch.equal(t, before[name]) for name, t in statistics_of(model).items())
    assert not any(m.frozen for m in model.modules() if isinstance(m, BatchNorm))


def test_folded_batch_normalisation_is_part_of_the_weights() -> None:
    model = prepared(batchnorm="folded")
    names = {name for name, _ in model.named_parameters()}

    assert names == {f"{layer}.{p}" for layer in ("conv1", "conv2", "head") for p in ("weight", "bias")}
    torch.testing.assert_close(floating(model)(pixels()), small()(pixels()), rtol=1e-4, atol=1e-5)


def test_an_unknown_mode_of_batch_normalisation_is_explained() -> None:
    with pytest.raises(UnknownName, match="folded, frozen, trained"):
        prepared(batchnorm="fused")

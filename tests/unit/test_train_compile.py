"""`torch.compile`, mixed precision, gradient accumulation and checkpointing: the same steps as plain training."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.unit.qat_cases import (
    KINDS,
    calibrate,
    features,
    of_kind,
    pixels,
    plain,
    prepared,
    small,
    train,
    validated,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitwright import (
    FakeQuantState,
    PreparedModel,
    default_qat_fixed_act_qconfig_setter,
    load_observer_params,
    prepare,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def ready(kind: str) -> PreparedModel:
    """A small network with calibrated ranges, in training mode and state QAT."""
    model = prepare(plain(), features(2), of_kind(kind))
    calibrate(model, features())
    set_fake_quantize(model.train(), FakeQuantState.QAT)
    return model


def stepped(model: nn.Module, forward: nn.Module, x: Tensor, steps: int = 3) -> dict[str, Tensor]:
    """The state after *steps* through *forward*, which computes as *model* does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_training_steps_are_the_plain_ones(kind: str, backend: str) -> None:
    torch.compiler.reset()
    plainly = ready(kind)
    compiled = copy.deepcopy(plainly)
    expected = stepped(plainly, plainly, features())
    found = stepped(compiled, torch.compile(compiled, backend=backend), features())  # type: ignore[arg-type]

    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_validation_is_the_plain_one(kind: str, backend: str) -> None:
    torch.compiler.reset()
    model = calibrate(prepared(kind), pixels())
    expected = validated(model, pixels())
    with torch.no_grad():
        found = torch.compile(model, backend=backend)(pixels())

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_model_follows_a_change_of_state() -> None:
    torch.compiler.reset()
    model = calibrate(prepared(), pixels())
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(pixels())
        set_fake_quantize(model, FakeQuantState.FLOAT)
        found = compiled(pixels())

    torch.testing.assert_close(found, small()(pixels()).detach(), rtol=1e-4, atol=1e-5)


def test_many_compiled_steps_do_not_compile_again_and_again() -> None:
    torch.compiler.reset()
    model = ready("fake_quant")
    compilations = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal compilations
        compilations += 1
        return graph.forward

    forward = torch.compile(model, backend=backend)
    stepped(model, forward, features(), 3)
    before = compilations
    stepped(model, forward, features(), 12)

    assert compilations == before


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_bfloat16_learns_in_float32(kind: str) -> None:
    model = ready(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(features()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(t.isfinite().all() for t in model.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_are_trained_in_bfloat16_and_go_on_from_a_checkpoint(kind: str) -> None:
    def steps(model: PreparedModel, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        set_fake_quantize(model.train(), FakeQuantState.QAT)
        losses = []
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(pixels()).float().square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    model, resumed = prepared(kind), prepared(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    first = steps(model, optimizer, 6)
    again = torch.optim.SGD(resumed.parameters(), lr=0.002, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    later = steps(model, optimizer, 6)

    assert later[-1] < 0.8 * first[0]
    assert steps(resumed, again, 6) == later
    assert torch.equal(validated(model, pixels()), validated(resumed, pixels()))


def test_bfloat16_outputs_are_near_those_of_float32() -> None:
    model = calibrate(prepared(), pixels())
    expected = validated(model, pixels())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(pixels())

    assert float((found.float() - expected).norm() / expected.norm()) < 0.05


def test_accumulated_gradients_are_those_of_the_big_batch() -> None:
    model = prepare(small(), pixels(2), default_qat_fixed_act_qconfig_setter, batchnorm="frozen")
    load_observer_params(calibrate(prepared(), pixels()), model)
    set_fake_quantize(model.train(), FakeQuantState.QAT)
    x = pixels(16, seed=3)
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part in x.chunk(4):
        (model(part).square().mean() / 4).backward()

    assert len(expected) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_training_step_by_step_equals_training_at_once() -> None:
    at_once, in_parts = prepared("lsq"), prepared("lsq")
    optimizer = torch.optim.SGD(in_parts.parameters(), lr=0.02)
    losses = [train(in_parts, pixels(), 1, optimizer)[0] for _ in range(3)]

    assert losses == train(at_once, pixels(), 3)


class Recomputed(nn.Module):
    """A network whose forward pass is computed again in the backward pass."""

    def __init__(self, net: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()  # what the reentrant form needs
        return checkpoint(self.net, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing_not_even_ranges(kind: str, reentrant: bool) -> None:
    first = ready(kind)
    second = copy.deepcopy(first)
    expected = stepped(first, first, 2.0 * features(seed=4))
    found = stepped(second, Recomputed(second, reentrant=reentrant), 2.0 * features(seed=4))

    assert [name for name, t in expected.items() if not torch.equal(found[name], t)] == []

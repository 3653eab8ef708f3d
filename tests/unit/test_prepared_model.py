"""A prepared model is copied, saved and averaged as any module; what `prepare` refuses, and changes after it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from tests.unit.qat_cases import (
    KINDS,
    Holder,
    calibrate,
    everywhere,
    pixels,
    plain,
    prepared,
    small,
    train,
    validated,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bitwright import FakeQuantState, PreparedModel, prepare, set_fake_quantize
from bitwright.errors import ModelError
from bitwright.ops.batchnorm import BatchNorm

pytestmark = pytest.mark.usefixtures("one_thread")

# --- copies ------------------------------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_and_trains_as_the_original(
    kind: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = prepared(kind)
    train(model, pixels(), 2)
    other = copied(model)
    expected = train(model, pixels(), 3)

    assert isinstance(other, PreparedModel)
    assert train(other, pixels(), 3) == expected
    assert torch.equal(validated(other, pixels()), validated(model, pixels()))
    assert other.state_dict().keys() == model.state_dict().keys()
    assert other.report == model.report


def test_a_copy_keeps_states_modes_and_frozen_statistics() -> None:
    model = prepared(batchnorm="frozen").train()
    set_fake_quantize(model.get_submodule("head"), FakeQuantState.FLOAT)
    other = copy.deepcopy(model)

    assert {m.training for m in other.modules()} == {True}
    assert [q.state for _, q in other.quantizers] == [q.state for _, q in model.quantizers]
    assert all(m.frozen for m in other.modules() if isinstance(m, BatchNorm))


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_the_weights_that_was_begun_before_training_can_be_validated(
    kind: str, use_buffers: bool
) -> None:
    model = prepared(kind)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    for _ in range(3):
        train(model, pixels(), 1)
        average.update_parameters(model)
    outputs = validated(average, pixels())

    assert outputs.isfinite().all()
    assert not torch.equal(outputs, validated(model, pixels()))


# --- refusals ----------------------------------------------------------------------------------------------------


def test_example_inputs_are_needed() -> None:
    with pytest.raises(ModelError, match="Small: expected example inputs; found none"):
        prepare(small())


def test_example_inputs_that_do_not_fit_are_told_without_talk_of_leaving_parts_out() -> None:
    with pytest.raises(ModelError, match=r"expected input\[2, 2, 6, 6\] to have 3 channels") as caught:
        prepare(small(), torch.randn(2, 2, 6, 6))

    assert "leave that part out" not in str(caught.value)


class Deciding(nn.Module):
    """A branch on what a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.fc = plain(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x)
        if y.sum() > 0:
            return self.fc(y)  # type: ignore[no-any-return]
        return y


def test_control_flow_that_depends_on_data_says_where_and_how_to_leave_it_out() -> None:
    with pytest.raises(
        ModelError, match=r"test_prepared_model\.py:\d+.*model\.part = bitwright\.prepare"
    ) as caught:
        prepare(Deciding(), torch.randn(2, 6))

    assert "can trace" in caught.value.expected


def test_the_part_that_can_be_traced_is_prepared_by_itself() -> None:
    model = Deciding()
    model.part = prepare(model.part, torch.randn(2, 6))
    losses = train(model, torch.randn(8, 6), 5)
    calibrate(model, torch.randn(8, 6))

    assert losses[-1] < losses[0]
    assert model(torch.randn(2, 6)).shape == (2, 3)


@pytest.mark.parametrize("wrapped", [lambda model: model, Holder])
def test_a_model_is_prepared_once(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ModelError, match="prepared already"):
        prepare(wrapped(prepared()), pixels(2))


def replaced(model: PreparedModel) -> None:
    model.head = nn.Linear(36, 5)


def with_another_function(model: PreparedModel) -> None:
    model.relu = nn.GELU()


def unquantized(model: PreparedModel) -> None:
    model.get_submodule("head").weight_fake_quant = nn.Identity()


def removed(model: PreparedModel) -> None:
    del model.conv2


def edited(model: PreparedModel) -> None:
    node = next(n for n in model.graph.nodes if n.target == "pool")
    node.replace_all_uses_with(node.args[0])
    model.graph.erase_node(node)


@pytest.mark.parametrize("change", [replaced, with_another_function, unquantized, removed, edited])
def test_a_model_that_was_changed_after_preparing_is_refused(change: Callable[[PreparedModel], None]) -> None:
    model = prepared()
    change(model)

    with pytest.raises(ModelError, match="Change the float model, and prepare it again"):
        set_fake_quantize(model, FakeQuantState.CALIBRATION)


def test_a_model_without_any_quantizer_has_no_state_to_set() -> None:
    model = prepare(small(), pixels(2), everywhere(None))

    with pytest.raises(ModelError, match=r"every operator was left float: see model\.report"):
        set_fake_quantize(model, FakeQuantState.QAT)

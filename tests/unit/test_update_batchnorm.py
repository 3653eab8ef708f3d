"""Statistics of batch normalisation, taken anew after training."""

from __future__ import annotations

import pytest
import torch
from tests.unit.qat_cases import everywhere, pixels, prepared, small, train, validated
from torch import Tensor
from torch.optim.swa_utils import update_bn

from bitwright import FakeQuantState, freeze_batchnorm, prepare, set_fake_quantize, update_batchnorm
from bitwright.errors import DataError, ModelError
from bitwright.ops.batchnorm import BatchNorm
from bitwright.train.prepared import PreparedModel

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = [pixels(8, seed) for seed in range(5)]


def statistics(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n}


def test_without_quantizers_they_are_those_of_torch() -> None:
    model, expected = prepare(small(0.5), pixels(2), everywhere(None)), small()
    found = update_batchnorm(model, BATCHES)
    update_bn(BATCHES, expected)

    assert found == 2
    for name, x in statistics(expected).items():
        torch.testing.assert_close(statistics(model)[name], x)


def test_they_are_of_the_quantized_network_and_nothing_else_changes() -> None:
    model = prepared()
    train(model, pixels(8, 9), 3)
    model.bn2.train(False)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    seen: list[Tensor] = []
    (first,) = (m for n, m in model.named_modules() if n == "bn1")
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    update_batchnorm(model, BATCHES)
    hook.remove()

    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(model.get_buffer("bn1.running_mean"), means)
    changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert changed <= {
        f"bn{i}.{what}" for i in (1, 2) for what in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert modes == [m.training for m in model.modules()]
    assert {q.state for _, q in model.quantizers} == {FakeQuantState.QAT}
    assert {m.momentum for m in model.modules() if isinstance(m, BatchNorm)} == {0.1}


def test_taking_them_twice_gives_the_same() -> None:
    model = prepared()
    train(model, pixels(8, 9), 3)
    update_batchnorm(model, BATCHES)
    once = validated(model, pixels())
    update_batchnorm(model, [{"x": x} for x in BATCHES])
    assert torch.equal(once, validated(model, pixels()))


def test_frozen_ones_stay() -> None:
    model = prepared()
    train(model, pixels(8, 9), 3)
    freeze_batchnorm(model)
    before = statistics(model)
    assert update_batchnorm(model, BATCHES) == 0
    assert all(torch.equal(x, before[n]) for n, x in statistics(model).items())


@pytest.mark.parametrize(
    "batches, found",
    [([], "none"), ([pixels(4), torch.full((4, 3, 6, 6), torch.nan)], "statistics that are NaN")],
)
def test_bad_batches_change_nothing(batches: list[Tensor], found: str) -> None:
    model = prepared()
    train(model, pixels(8, 9), 3)
    before = {n: x.clone() for n, x in model.state_dict().items()}

    with pytest.raises(
        DataError, match=f"update_batchnorm: expected batches of finite numbers; found {found}"
    ):
        update_batchnorm(model, batches)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_an_interruption_changes_nothing() -> None:
    def interrupted() -> object:
        yield pixels(4)
        raise KeyboardInterrupt

    model: PreparedModel = prepared()
    train(model, pixels(8, 9), 3)
    before = statistics(model)
    with pytest.raises(KeyboardInterrupt):
        update_batchnorm(model, interrupted())  # type: ignore[arg-type]
    assert all(torch.equal(x, before[n]) for n, x in statistics(model).items())
    set_fake_quantize(model, FakeQuantState.QAT)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ModelError, match="expected a model that prepare"):
        update_batchnorm(small(), BATCHES)

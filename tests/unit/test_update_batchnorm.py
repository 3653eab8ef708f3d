"""Statistics of batch normalisation, taken anew after training."""

from __future__ import annotations

import pytest
import torch
from tests.unit.qat_cases import everywhere, features, pixels, prepared, small, train, validated
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from bitwright import (
    FakeQuantState,
    freeze_batchnorm,
    get_default_qconfig,
    prepare,
    set_fake_quantize,
    update_batchnorm,
)
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
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, BatchNorm))


def test_taking_them_twice_gives_the_same() -> None:
    model = prepared()
    train(model, pixels(8, 9), 3)
    update_batchnorm(model, BATCHES)
    once = validated(model, pixels())
    update_batchnorm(model, [{"x": x} for x in BATCHES])
    assert torch.equal(once, validated(model, pixels()))


@pytest.mark.parametrize("target", ["generic", "bm1684"])
def test_weights_that_statistics_are_a_part_of_follow_them(target: str) -> None:
    """The statistics moved within the pass, the weights with them, and their scales stayed: codes left their range."""
    model = prepare(small(), pixels(2), target=target)
    train(model, pixels(8, 9), 3)
    batches = [0.25 * x for x in BATCHES]
    update_batchnorm(model, batches)
    once = validated(model, 0.25 * pixels())
    update_batchnorm(model, batches)

    # Weights that are rounded anew have other statistics, by a fraction of a step.
    tolerance = 0.0 if target == "generic" else 0.05 * float(once.abs().max())
    torch.testing.assert_close(validated(model, 0.25 * pixels()), once, atol=tolerance, rtol=0.0)
    for path, quantizer in model.quantizers:
        if quantizer.is_weight and quantizer.is_folded:
            seen: list[Tensor] = []
            hook = quantizer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))  # noqa: B023
            validated(model, pixels())
            hook.remove()
            assert float(seen[0].abs().max() / quantizer.step().min()) <= quantizer.qmax + 0.5, path


@pytest.mark.parametrize("constant", [1.0, 0.01])
def test_ranges_of_such_weights_are_of_the_new_statistics_alone(constant: float) -> None:
    """A slow average left codes far outside of their range."""
    qconfig = get_default_qconfig(weight_qkwargs={"averaging_constant": constant})
    model = prepare(small(), pixels(2), everywhere(qconfig), target="bm1684")
    train(model, pixels(8, 9), 3)
    update_batchnorm(model, [0.05 * x for x in BATCHES])

    for path in ("conv1", "conv2"):
        weight = _folded_weight(model, path).detach()
        step = model.get_submodule(f"{path}.weight_fake_quant").step()
        assert 0.5 < float(weight.abs().max() / (127 * step)) <= 1.0  # scales are powers of two


@pytest.mark.parametrize(
    "kind, observer, options",
    [
        ("lsq", "min_max", {}),
        ("fake_quant", "min_max", {"averaging_constant": 0.0}),
        ("fake_quant", "fixed_scale", {"scale": 0.5}),
    ],
)
def test_scales_that_are_learned_or_given_stay(kind: str, observer: str, options: dict[str, float]) -> None:
    qconfig = get_default_qconfig("fake_quant", kind, weight_observer=observer, weight_qkwargs=options)
    model = prepare(small(), pixels(2), everywhere(qconfig), target="bm1684")
    train(model, pixels(8, 9), 3)
    weights = [q for _, q in model.quantizers if q.is_weight and q.is_folded]
    before = [q.step().clone() for q in weights]
    update_batchnorm(model, [0.05 * x for x in BATCHES])

    assert len(before) == 2
    assert all(torch.equal(q.step(), x) for q, x in zip(weights, before, strict=True))


def _folded_weight(model: nn.Module, path: str) -> Tensor:
    norm = model.get_submodule(path.replace("conv", "bn"))
    factor = norm.weight / torch.sqrt(norm.running_var + 1e-5)
    return model.get_parameter(f"{path}.weight") * factor.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("mode", ["frozen", "folded"])
def test_where_no_statistics_move_no_range_does(mode: str) -> None:
    model = prepare(small(), pixels(2), target="bm1684", batchnorm=mode)
    train(model, pixels(8, 9), 1)
    with torch.no_grad():
        model.get_parameter("conv1.weight").mul_(0.3)
    before = {n: x.clone() for n, x in model.state_dict().items()}

    assert update_batchnorm(model, BATCHES) == 0
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


class _Shared(nn.Module):
    """One normalisation for two inputs of different size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -torch.inf]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x) + self.norm(3.0 * x + 1.0)) + self.mask[:3]


def test_statistics_of_several_calls_are_counted_alike() -> None:
    """The later call of a batch overwrote the earlier one; a mask of -inf among the buffers was taken for bad data."""
    model, expected = prepare(_Shared().eval(), features(2), everywhere(None)), _Shared()
    batches = [features(8, seed) for seed in range(4)]
    assert update_batchnorm(model, batches) == 1
    update_bn(batches, expected)

    for name, x in statistics(expected).items():
        torch.testing.assert_close(statistics(model)[name], x)


def test_one_that_the_user_put_into_evaluation_mode_stays() -> None:
    model = prepared()
    train(model, pixels(8, 9), 3)
    model.get_submodule("bn2").eval()
    before = statistics(model)
    assert update_batchnorm(model, BATCHES) == 1
    changed = {n for n, x in statistics(model).items() if not torch.equal(x, before[n])}
    assert changed == {"bn1.running_mean", "bn1.running_var"}


def test_labels_among_the_inputs_are_explained() -> None:
    with pytest.raises(DataError, match=r"expected inputs that the model takes.*without labels"):
        update_batchnorm(prepared(), [(pixels(4), torch.zeros(4))])


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
        DataError, match=f"update_batchnorm: expected batches of finite numbers, .*; found {found}"
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

"""The four states, ranges carried from one model to another, and training that is interrupted."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tests.unit.qat_cases import (
    KINDS,
    calibrate,
    of_kind,
    pixels,
    plain,
    prepared,
    quantizer,
    small,
    train,
    validated,
)
from torch import Tensor, nn

from bitwright import (
    FakeQuantState,
    default_calibration_qconfig_setter,
    default_qat_fixed_act_qconfig_setter,
    default_qat_qconfig_setter,
    load_observer_params,
    prepare,
    set_fake_quantize,
)
from bitwright.errors import DataError, ModelError, PlanError, UnknownName
from bitwright.train.prepared import quantizers_of

pytestmark = pytest.mark.usefixtures("one_thread")

QAT, CALIBRATION = FakeQuantState.QAT, FakeQuantState.CALIBRATION
VALIDATION, FLOAT = FakeQuantState.VALIDATION, FakeQuantState.FLOAT


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


def states(model: nn.Module) -> set[FakeQuantState]:
    return {q.state for _, q in quantizers_of(model)}


# --- what each state does ------------------------------------------------------------------------------------------


def test_a_prepared_model_is_in_state_qat() -> None:
    assert states(prepared()) == {QAT}


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_computes_in_float_and_moves_ranges(kind: str) -> None:
    model = prepared(kind).eval()
    set_fake_quantize(model, FLOAT)
    expected, before = model(pixels()), buffers(model)
    set_fake_quantize(model, CALIBRATION)

    assert torch.equal(model(pixels()), expected)
    moved = changed(model, before)
    assert all(f"{path}.observer.steps" in moved for path, _ in model.quantizers)
    assert not any(name in before for name, _ in small().named_parameters() if name in moved)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_rounds_and_changes_nothing(kind: str) -> None:
    model = calibrate(prepared(kind), pixels())
    before, outputs = buffers(model), model(pixels(seed=2))

    assert changed(model, before) == set()
    assert torch.equal(model(pixels(seed=2)), outputs)
    set_fake_quantize(model, FLOAT)
    assert not torch.equal(model(pixels(seed=2)), outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_float_neither_rounds_nor_observes(kind: str) -> None:
    model = prepared(kind).eval()
    set_fake_quantize(model, FLOAT)
    before = buffers(model)

    torch.testing.assert_close(model(pixels()), small()(pixels()), rtol=1e-5, atol=1e-6)
    assert changed(model, before) == set()


def test_qat_observes_and_rounds() -> None:
    model = calibrate(prepared(batchnorm="frozen"), pixels())
    before = buffers(model)
    set_fake_quantize(model.train(), QAT)
    outputs = model(2.0 * pixels(seed=2))
    moved = changed(model, before)

    assert all(f"{path}.observer.steps" in moved for path, _ in model.quantizers)
    # The second step has half the weight: the mean of the first steps.
    assert torch.equal(validated(model, 2.0 * pixels(seed=2)), outputs.detach())


def test_qat_in_evaluation_mode_observes_and_rounds_too() -> None:
    model = calibrate(prepared(), pixels())
    before = buffers(model)
    set_fake_quantize(model.eval(), QAT)
    model(2.0 * pixels(seed=2))

    assert "conv1.weight_fake_quant.observer.steps" in changed(model, before)
    assert not any("running_" in name for name in changed(model, before))


@pytest.mark.parametrize("state", FakeQuantState)
def test_a_submodule_has_a_state_of_its_own(state: FakeQuantState) -> None:
    model = prepared().eval()
    set_fake_quantize(model.get_submodule("head"), state)

    assert states(model.get_submodule("head")) == {state}
    assert states(model.get_submodule("conv1")) == {QAT}


def test_what_is_no_state_is_explained() -> None:
    with pytest.raises(UnknownName, match=r"FakeQuantState\.CALIBRATION"):
        set_fake_quantize(prepared(), "calibration")  # type: ignore[arg-type]


def test_a_float_model_has_no_state_to_set() -> None:
    with pytest.raises(ModelError, match=r"Give the model that prepare\(\) returned"):
        set_fake_quantize(small(), QAT)


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [CALIBRATION, VALIDATION])
def test_a_state_that_wants_evaluation_mode_warns_in_training_mode(state: FakeQuantState) -> None:
    model = prepared().train()
    with pytest.warns(UserWarning, match=r"state " + state.name + r" .*model\.eval\(\)"):
        set_fake_quantize(model, state)


@pytest.mark.parametrize("state", [CALIBRATION, VALIDATION])
def test_going_into_training_mode_afterwards_warns_once_when_the_model_runs(state: FakeQuantState) -> None:
    model = calibrate(prepared(), pixels())
    set_fake_quantize(model, state)
    model.train()
    with pytest.warns(UserWarning, match=r"model\.eval\(\)"):
        model(pixels())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(pixels())


@pytest.mark.parametrize("state", [QAT, FLOAT])
def test_other_states_do_not_warn_in_training_mode(state: FakeQuantState) -> None:
    model = prepared().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_fake_quantize(model, state)
        model(pixels())


@pytest.mark.parametrize("kind", KINDS)
def test_validation_before_calibration_is_an_error_that_says_what_to_do(kind: str) -> None:
    model = prepared(kind).eval()
    set_fake_quantize(model, VALIDATION)

    with pytest.raises(
        PlanError, match=r"quantizer of \S+: .*Set FakeQuantState\.CALIBRATION, run some batches"
    ):
        model(pixels())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_calibration_data_that_are_not_finite_name_the_value(kind: str, bad: float) -> None:
    x = pixels()
    x[0, 0, 0, 0] = bad
    model = prepared(kind).eval()
    set_fake_quantize(model, CALIBRATION)

    with pytest.raises(
        DataError, match=r"value x: expected finite numbers to calibrate on; found NaN or infinity"
    ):
        model(x)


@pytest.mark.parametrize("observer", ["min_max", "percentile", "mse", "mix", "kl", "histogram", "clip_std"])
def test_bad_calibration_data_are_found_after_good_ones_and_spoil_no_range(observer: str) -> None:
    setter = of_kind("fake_quant")
    wish = copy.deepcopy(setter.qconfig)
    assert wish is not None
    object.__setattr__(wish.activation, "observer", observer)
    model = prepare(plain(), torch.randn(2, 6), type(setter)(wish, "one observer")).eval()
    set_fake_quantize(model, CALIBRATION)
    x = torch.randn(16, 6)
    model(x)
    before = buffers(model)
    with pytest.raises(DataError, match="value x"):
        model(torch.where(torch.arange(6) == 0, torch.nan, x))

    assert not any(name.endswith(("lo", "hi", "scale")) for name in changed(model, before))
    assert all(t.isfinite().all() for t in model.state_dict().values())


# --- ranges from another model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["generic", "onnxruntime", "bm1684x", "bm1684"])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_ranges_give_the_calibrated_outputs_bit_for_bit(kind: str, target: str) -> None:
    source = calibrate(prepare(small(), pixels(2), of_kind(kind), target=target), pixels())
    model = prepare(small(), pixels(2), of_kind(kind), target=target)
    table = load_observer_params(source, model)

    assert {row["result"] for row in table.rows} == {"loaded"}
    assert torch.equal(validated(model, pixels(seed=2)), validated(source, pixels(seed=2)))


@pytest.mark.parametrize("target", ["generic", "onnxruntime", "bm1684"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_of_plain_calibration_start_every_kind(kind: str, target: str) -> None:
    source = calibrate(
        prepare(small(), pixels(2), default_calibration_qconfig_setter, target=target), pixels()
    )
    model = prepare(small(), pixels(2), of_kind(kind), target=target)
    load_observer_params(source, model)
    found, start = validated(model, pixels(seed=2)), validated(source, pixels(seed=2))

    # Only PACT has another range: as wide on both sides of 0.
    tolerance = 0.1 if (kind, target) == ("pact", "onnxruntime") else 0.0
    assert float((found - start).norm()) <= tolerance * float(start.norm())


def test_int8_ranges_are_rescaled_for_int16() -> None:
    source = calibrate(prepared(), pixels())
    model = prepare(small(), pixels(2), of_kind("fake_quant", activation="int16"))
    results = {row["name"]: row["result"] for row in load_observer_params(source, model).rows}

    assert results["head.weight_fake_quant"] == "loaded"
    assert results["head.activation_post_process"] == "rescaled"
    narrow, wide = (quantizer(m, "head.activation_post_process").step() for m in (source, model))
    torch.testing.assert_close(wide * 32767, narrow * 127)


def test_quantizers_that_only_one_model_has_are_reported_with_a_warning() -> None:
    source = calibrate(prepared(), pixels())
    partly = small()
    partly.head.qconfig = None  # type: ignore[assignment]
    model = prepare(partly, pixels(2), default_qat_qconfig_setter)
    with pytest.warns(UserWarning, match=r"2 of \d+ quantizers got no range: head\.weight_fake_quant"):
        table = load_observer_params(source, model)
    with pytest.warns(UserWarning, match="quantizers got no range"):
        other_way = load_observer_params(calibrate(model, pixels()), prepared())

    assert {r["result"] for r in table.rows} == {"loaded", "only in the calibrated model"}
    assert {r["result"] for r in other_way.rows} == {"loaded", "only in the model to train"}


def test_a_part_that_was_not_calibrated_is_reported_with_a_warning() -> None:
    source = prepared().eval()
    set_fake_quantize(source, FLOAT)
    set_fake_quantize(source.get_submodule("conv1"), CALIBRATION)
    source(pixels())
    with pytest.warns(UserWarning, match="quantizers got no range"):
        table = load_observer_params(source, prepared())

    assert {r["name"] for r in table.rows if r["result"] == "loaded"} == {"conv1.weight_fake_quant"}
    assert {r["result"] for r in table.rows} == {"loaded", "not calibrated"}


def test_loading_from_a_model_that_never_ran_is_an_error() -> None:
    with pytest.raises(PlanError, match="observers never ran"):
        load_observer_params(prepared(), prepared())


def test_loading_from_a_float_model_is_an_error() -> None:
    with pytest.raises(PlanError, match="without quantizers"):
        load_observer_params(small(), prepared())


def test_loading_into_another_network_is_an_error() -> None:
    other = prepare(nn.Sequential(nn.Linear(6, 3)), torch.randn(2, 6))

    with pytest.raises(ModelError, match="no quantized value with the same name"):
        load_observer_params(calibrate(prepared(), pixels()), other)


# --- training ----------------------------------------------------------------------------------------------------


def test_fixed_ranges_and_frozen_statistics_stay_bit_equal_at_rate_zero() -> None:
    source = calibrate(prepare(small(0.5), pixels(2), default_calibration_qconfig_setter), pixels())
    model = prepare(small(0.5), pixels(2), default_qat_fixed_act_qconfig_setter, batchnorm="frozen")
    load_observer_params(source, model)
    expected, before = validated(model, pixels(seed=3)), buffers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for seed in range(20):
        train(model, 3.0 * pixels(seed=seed), 1, optimizer)

    assert torch.equal(validated(model, pixels(seed=3)), expected)
    assert torch.equal(validated(source, pixels(seed=3)), expected)
    assert {
        name for name in changed(model, before) if not name.endswith("weight_fake_quant.observer.steps")
    } == set()


def test_ranges_that_follow_move_at_rate_zero() -> None:
    model = prepared(batchnorm="frozen")
    load_observer_params(calibrate(prepared(), pixels()), model)
    before = validated(model, pixels(seed=3))
    train(model, 3.0 * pixels(seed=4), 20, torch.optim.SGD(model.parameters(), lr=0.0))

    assert not torch.equal(validated(model, pixels(seed=3)), before)


@pytest.mark.parametrize("batchnorm", ["trained", "folded"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(kind: str, batchnorm: str) -> None:
    model = prepared(kind, batchnorm=batchnorm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, pixels(), 3, optimizer)
    checkpoint, progress = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, pixels(seed=2), 4, optimizer)
    resumed = prepared(kind, batchnorm=batchnorm)
    resumed.load_state_dict(checkpoint)
    continued = torch.optim.SGD(resumed.parameters(), lr=0.05, momentum=0.9)
    continued.load_state_dict(progress)

    assert train(resumed, pixels(seed=2), 4, continued) == expected
    assert changed(resumed, model.state_dict()) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_nan_does_not_spoil_the_ranges(kind: str) -> None:
    model = prepared(kind, batchnorm="frozen")
    train(model, pixels(), 2)
    before = buffers(model)
    set_fake_quantize(model.train(), QAT)
    model(torch.full_like(pixels(), torch.nan))

    moved = {name for name in changed(model, before) if "weight_fake_quant" not in name}
    assert not any(name.endswith((".lo", ".hi", ".scale", ".alpha")) for name in moved)

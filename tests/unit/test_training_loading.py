"""Bugs that loading ranges and checkpoints once had, each by its symptom."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.qat_cases import (
    calibrate,
    everywhere,
    features,
    of_kind,
    pixels,
    plain,
    prepared,
    quantizer,
    small,
    train,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.utils import prune

from bitwright import (
    FakeQuantState,
    ModuleNameQconfigSetter,
    check_qat_model,
    get_default_qconfig,
    load_observer_params,
    prepare,
    reset_scale,
    set_fake_quantize,
)
from bitwright.errors import ModelError, NumericsError, PlanError, UnknownName
from bitwright.plan.qconfig import QconfigSetter
from bitwright.train.checkpoint import as_tensor
from bitwright.train.observers.histogram import Histogram

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_batch_moves_a_calibrated_range_by_the_averaging_constant() -> None:
    """The first batch after a calibration of ten weighed an eleventh, and 20 replaced two thirds of what was calibrated."""
    calibrated = calibrate(prepared(), *(pixels(4, seed) for seed in range(10)))
    model = prepared()
    load_observer_params(calibrated, model)
    model.train()
    observer = quantizer(model, "_inputs.x.activation_post_process").observer
    before = observer.hi.clone()

    set_fake_quantize(model, FakeQuantState.QAT)
    model(torch.full((1, 3, 6, 6), 9.0))

    assert torch.allclose(observer.hi, before + 0.01 * (9.0 - before))


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_scales_of_another_format_are_refused_before_anything_is_loaded(strict: bool) -> None:
    """Names matched, so scales of int8 were taken for int4 weights without a word."""
    calibrated = calibrate(prepared("lsq"), pixels(8))
    model = prepare(small(), pixels(2), of_kind("lsq", weight="int4"))
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(
        ModelError, match=r"expected a scale of int4, symmetric, per channel; found one of int8"
    ):
        model.load_state_dict(calibrated.state_dict(), strict=strict)

    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_part_with_scales_of_another_format_is_refused_too() -> None:
    part = calibrate(prepared("lsq"), pixels(8)).get_submodule("conv1")
    model = prepare(small(), pixels(2), of_kind("lsq", weight="int4"))

    with pytest.raises(ModelError, match=r"quantizer of conv1.weight: expected a scale of int4"):
        model.get_submodule("conv1").load_state_dict(part.state_dict())


def test_every_entry_of_a_checkpoint_can_be_asked_for_by_torch_itself(tmp_path: Path) -> None:
    """A key that was no attribute broke distributed checkpoints."""
    model = calibrate(prepared("lsq"), pixels(8))
    found = get_model_state_dict(model)
    assert found.keys() == model.state_dict().keys()
    torch.save(found, tmp_path / "model.pt")
    prepared("lsq").load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))


def test_a_checkpoint_whose_entries_were_averaged_as_numbers_still_loads() -> None:
    model = calibrate(prepared(), pixels(8))
    states = [model.state_dict()] * 3
    averaged = {k: sum(s[k] for s in states) / 3 for k in states[0]}  # also what is no number

    prepared().load_state_dict(averaged)


def test_a_fixed_scale_survives_a_checkpoint_of_another_range() -> None:
    fixed = get_default_qconfig(activation_observer="fixed_scale", activation_qkwargs={"scale": 1 / 128})
    model = prepare(small(), pixels(2), [ModuleNameQconfigSetter({"head": fixed}), of_kind("fake_quant")])
    model.load_state_dict(calibrate(prepared(), pixels(8)).state_dict())

    head = quantizer(model, "head.activation_post_process")
    assert head.step().tolist() == [1 / 128]
    assert quantizer(model, "_inputs.x.activation_post_process").has_range


def test_a_learned_scale_that_began_at_a_fixed_one_is_resumed() -> None:
    fixed = get_default_qconfig(
        "lsq", activation_observer="fixed_scale", activation_qkwargs={"scale": 1 / 16}
    )
    model, again = (prepare(small(), pixels(2), everywhere(fixed)) for _ in range(2))
    train(model, pixels(), 3)
    again.load_state_dict(model.state_dict())

    steps = [[q.step() for _, q in m.quantizers] for m in (model, again)]
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))
    assert any((s != 1 / 16).any() for s in steps[0])


def test_a_checkpoint_that_was_not_reset_undoes_a_reset() -> None:
    setter = everywhere(get_default_qconfig(activation_observer="histogram"))
    model, again = (calibrate(prepare(small(), pixels(2), setter), pixels(8)) for _ in range(2))
    reset_scale(again, "mse", percentile=np.float64(50.0))
    prepare(small(), pixels(2), setter).load_state_dict(again.state_dict())
    again.load_state_dict(model.state_dict())

    asked, found = (
        {
            (q.observer.method, q.observer.percentile)
            for _, q in m.quantizers
            if isinstance(q.observer, Histogram)
        }
        for m in (model, again)
    )
    assert found == asked
    assert len(asked) == 1


@pytest.mark.parametrize(
    "text, error", [("mse", ModelError), ("mse x", ModelError), ("nonsense 3", UnknownName)]
)
def test_a_method_that_cannot_be_read_is_refused_as_it_is_loaded(text: str, error: type[Exception]) -> None:
    setter = everywhere(get_default_qconfig(activation_observer="histogram"))
    observers = [q.observer for _, q in prepare(small(), pixels(2), setter).quantizers]
    observer = next(o for o in observers if isinstance(o, Histogram))
    with pytest.raises(error, match="checkpoint, observer 'histogram'"):
        observer.set_extra_state(as_tensor(text))


def test_a_reset_scale_goes_on_after_resuming() -> None:
    """The method was forgotten: one step after resuming, the range was by the old one again."""
    setter = everywhere(get_default_qconfig(activation_observer="histogram"))
    model, again = (prepare(small(), pixels(2), setter) for _ in range(2))
    calibrate(model, pixels(8))
    reset_scale(model, "percentile", percentile=90.0)
    again.load_state_dict(model.state_dict())

    for m in (model, again):
        train(m, pixels(8), 1)

    ranges = [[q.observer.hi for _, q in m.quantizers] for m in (model, again)]
    assert all(torch.equal(a, b) for a, b in zip(*ranges, strict=True))


class _WithUnused(nn.Module):
    """A part that evaluation does not use stands before one that it uses, in another order than that of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.aux, self.fc2, self.fc1 = nn.Linear(6, 5), nn.Linear(8, 3), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_parameters_keep_their_places_also_beside_unused_ones(how: Callable[[nn.Module], nn.Module]) -> None:
    """Optimizers know parameters by their place: momentum of one went to another."""
    model = _WithUnused()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(features()).sum().backward()
    optimizer.step()
    ours = how(prepare(model, features(2)))
    continued = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    continued.load_state_dict(optimizer.state_dict())

    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        momentum = continued.state[ours.get_parameter(name)].get("momentum_buffer")
        assert (momentum is None) == (p.grad is None)
        assert momentum is None or torch.equal(momentum, optimizer.state[p]["momentum_buffer"])


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setter, message",
    [
        (ModuleNameQconfigSetter({"fc1": "int8"}), "operator fc1: expected a QConfig .* found 'int8'"),  # type: ignore[dict-item]
        (lambda name, kind: get_default_qconfig, "expected a QConfig"),
        (lambda name: None, "expected a function of .name, kind.; found TypeError"),
    ],
)
def test_what_a_setter_must_return_is_explained(setter: QconfigSetter, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        prepare(plain(), features(2), setter)


@pytest.mark.parametrize(
    "observer, options",
    [
        ("min_max", {"averaging_constant": "1e-2"}),
        ("percentile", {"percentile": None}),
        ("clip", {"high": "6"}),
    ],
)
def test_an_option_that_is_no_number_is_explained(observer: str, options: dict[str, object]) -> None:
    setter = everywhere(get_default_qconfig(activation_observer=observer, activation_qkwargs=options))
    with pytest.raises(NumericsError, match=rf"observer '{observer}', option \w+: expected a number"):
        prepare(plain(), features(2), setter)


def test_a_fixed_scale_of_text_is_explained() -> None:
    fixed = get_default_qconfig(activation_observer="fixed_scale", activation_qkwargs={"scale": "small"})
    with pytest.raises(NumericsError, match="observer 'fixed_scale': expected numbers; found 'small'"):
        prepare(plain(), features(2), everywhere(fixed))


def test_inputs_that_the_model_does_not_accept_are_explained_by_the_check() -> None:
    with pytest.raises(
        ModelError, match="check_qat_model, example_inputs: expected inputs that the model accepts"
    ):
        check_qat_model(prepare(plain(), features(2)), torch.zeros(2, 7), verbose=False)


@pytest.mark.parametrize(
    "example, found",
    [({"y": torch.zeros(2, 6)}, "NoneType"), (torch.zeros(2, 7), "a tensor of 2x7"), ((torch.zeros(2, 6),) * 2, "NoneType")],
)  # fmt: skip
def test_example_inputs_that_do_not_fit_an_onnx_file_are_explained(
    tmp_path: Path, example: object, found: str
) -> None:
    float_file = tmp_path / "float.onnx"
    torch.onnx.export(
        plain().eval(),
        (features(2),),
        float_file,
        input_names=["x"],
        dynamic_axes={"x": {0: "n"}},
        dynamo=False,
    )
    with pytest.raises(
        ModelError, match=f"example inputs, x: expected a tensor of Nx6 for it.* found {found}"
    ):
        prepare(float_file, example)


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(6, 3))


@pytest.mark.parametrize(
    "make, take_away",
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight")),
        (_old_weight_norm, nn.utils.remove_weight_norm),
        (lambda: prune.l1_unstructured(nn.Linear(6, 3), "weight", 0.5), lambda m: prune.remove(m, "weight")),
    ],
)  # fmt: skip
def test_a_computed_weight_is_refused_with_the_call_that_mends_it(
    make: Callable[[], nn.Module], take_away: Callable[[nn.Module], object]
) -> None:
    """The remedy for the old weight norm was a call that fails on it; a pruned weight was not recognised."""
    model = nn.Sequential(make())
    with pytest.raises(ModelError, match="expected weights that are parameters") as caught:
        prepare(model, features(2))
    called = {"remove_parametrizations", "remove_weight_norm", "prune.remove"}
    assert sum(name in caught.value.remedy for name in called) == 1

    take_away(model[0])
    prepare(model, features(2))


def test_calibrating_with_constant_ranges_warns() -> None:
    model = prepare(small(), pixels(2), of_kind("fake_quant", constant=0.0)).eval()
    with pytest.warns(UserWarning, match="calibrating with averaging constant 0"):
        set_fake_quantize(model, FakeQuantState.CALIBRATION)


def test_a_part_whose_scales_are_reset_is_named_by_its_path() -> None:
    """`head` was also the beginning of `head2`; a part that there is not got the advice to calibrate."""
    setter = everywhere(get_default_qconfig(activation_observer="histogram"))
    model = calibrate(prepare(small(), pixels(2), setter), pixels(8))
    before = {name: q.observer.hi.clone() for name, q in model.quantizers}  # type: ignore[attr-defined]
    reset_scale(model, "percentile", percentile=50.0, prefix="head")

    changed = [n for n, q in model.quantizers if not torch.equal(q.observer.hi, before[n])]  # type: ignore[attr-defined]
    assert changed == ["head.activation_post_process"]
    with pytest.raises(UnknownName, match=r"reset_scale.*'hea'.*Did you mean 'head'"):
        reset_scale(model, prefix="hea")


class _Guarded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0 if x.sum() > 0 else x


def test_what_cannot_be_traced_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    """torch printed whole graphs before the error that names the line."""
    with pytest.raises(
        ModelError,
        match=r"_Guarded .*test_training_loading.py:\d+.: expected a forward that torch.export can trace",
    ):
        prepare(_Guarded(), features(2))
    assert capfd.readouterr() == ("", "")

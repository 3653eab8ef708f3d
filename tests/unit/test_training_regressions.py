"""Bugs that training once had, each by its symptom."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.qat_cases import (
    KINDS,
    calibrate,
    everywhere,
    pixels,
    prepared,
    quantizer,
    small,
    train,
    validated,
)
from torch import Tensor, nn

from bitwright import (
    FakeQuantState,
    ModuleNameQconfigSetter,
    PreparedModel,
    check_qat_model,
    convert,
    default_qat_qconfig_setter,
    get_default_qconfig,
    load_observer_params,
    prepare,
    reset_scale,
    sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter,
    set_fake_quantize,
)
from bitwright.errors import ModelError, NumericsError, PlanError
from bitwright.flow.convert import decided
from bitwright.numerics.dtype import INT8
from bitwright.numerics.rounding import Rounding
from bitwright.numerics.spec import QuantSpec
from bitwright.train.bins import Bins
from bitwright.train.fake_quants.fake_quant import StraightThrough

pytestmark = pytest.mark.usefixtures("one_thread")


def norm(channels: int) -> nn.BatchNorm2d:
    """A batch normalisation that is not the identity."""
    made = nn.BatchNorm2d(channels)
    nn.init.uniform_(made.weight, -1.5, 1.5)
    nn.init.uniform_(made.running_var, 0.3, 1.5)
    nn.init.uniform_(made.running_mean, -0.5, 0.5)
    return made


@pytest.mark.parametrize("target", ["generic", "bm1684x"])
def test_two_batch_normalisations_behind_one_convolution_are_both_folded(target: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model = calibrate(prepare(net, pixels(2), target=target), pixels(16))

    torch.testing.assert_close(convert(model)(pixels()), validated(model, pixels()))


def test_a_fixed_scale_survives_loading_other_ranges() -> None:
    fixed = get_default_qconfig(activation_observer="fixed_scale", activation_qkwargs={"scale": 1 / 128})
    setters = (ModuleNameQconfigSetter({"head": fixed}), default_qat_qconfig_setter)
    model = prepare(small(), pixels(2), setters)
    table = load_observer_params(calibrate(prepared(), pixels()), model)
    results = {row["name"]: row["result"] for row in table.rows}

    assert results["head.activation_post_process"] == "kept its fixed scale"
    assert float(quantizer(model, "head.activation_post_process").step()) == 1 / 128


def test_a_wish_for_a_convolution_is_about_its_output_behind_the_relu_not_about_its_input() -> None:
    clipped = get_default_qconfig("lsq", "lsq", "clip", activation_qkwargs={"high": 2.0})
    setters = (ModuleNameQconfigSetter({"conv1": clipped}), default_qat_qconfig_setter)
    model = prepare(small(), pixels(2), setters)
    output = quantizer(model, "relu.activation_post_process")
    read = quantizer(model, "_inputs.x.activation_post_process")
    row = next(r for r in model.report.rows if r["name"] == "relu")

    assert (type(output).__name__, type(output.observer).__name__) == ("Lsq", "Clip")
    assert (type(read).__name__, type(read.observer).__name__) == ("FakeQuant", "MinMax")
    assert row["activation"] == "lsq, clip (high=2.0)"


def test_inputs_have_a_wish_of_their_own() -> None:
    by_mse = get_default_qconfig(activation_observer="mse").activation
    model = prepare(small(), pixels(2), everywhere(replace(get_default_qconfig(), input=by_mse)))

    assert type(quantizer(model, "_inputs.x.activation_post_process").observer).__name__ == "Mse"


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_part_in_evaluation_mode_stays_so_in_copies(how: str) -> None:
    model = prepared().train()
    model.get_submodule("bn1").eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    made = copy.deepcopy(model) if how == "deepcopy" else torch.load(buffer, weights_only=False)

    assert not made.get_submodule("bn1").training
    assert made.get_submodule("bn2").training


def test_preparing_keeps_the_mode_of_every_part() -> None:
    net = small().train()
    net.bn1.eval()
    model = prepare(net, pixels(2))

    assert not model.get_submodule("bn1").training
    assert model.get_submodule("bn2").training


def test_other_float_weights_make_a_calibrated_model_forget_its_ranges() -> None:
    model, other = calibrate(prepared(), pixels()), small()
    with torch.no_grad():
        other.conv1.weight *= 20
    model.load_state_dict(small().state_dict())  # the weights that it has
    assert quantizer(model, "conv1.weight_fake_quant").has_range
    with pytest.warns(UserWarning, match="its ranges are forgotten; calibrate again"):
        model.load_state_dict(other.state_dict())

    with pytest.raises(PlanError, match="expected a range before fake quantization"):
        model(pixels())


@pytest.mark.parametrize("kind", ["lsq", "pact"])
def test_weight_scales_of_folded_weights_are_not_loaded_for_unfolded_ones(kind: str) -> None:
    source = calibrate(prepared(kind, batchnorm="folded"), pixels())
    model = prepared(kind)
    results = {row["name"]: row["result"] for row in load_observer_params(source, model).rows}

    assert results["conv1.weight_fake_quant"].startswith("taken anew")
    assert results["head.weight_fake_quant"] == "loaded"
    assert not quantizer(model, "conv1.weight_fake_quant").has_range


def test_ranges_are_loaded_into_a_wrapped_model() -> None:
    wrapped = torch.optim.swa_utils.AveragedModel(prepared())
    table = load_observer_params(calibrate(prepared(), pixels()), wrapped)

    assert {row["result"] for row in table.rows} == {"loaded"}


def test_more_than_two_to_the_twenty_fourth_equal_elements_are_counted() -> None:
    n = (1 << 24) + 1000
    bins = Bins(1, 8)
    bins.add(torch.zeros(1, n))
    bins.add(torch.ones(1, 1))
    bins.add(torch.full((1, n), 0.99))

    assert float(bins.counts.sum()) == 2 * n + 1


def test_a_relu_lets_no_gradient_through_at_zero_also_in_one_with_rounding() -> None:
    x = torch.tensor([-1.0, 0.0, 1e-3, 1.0], requires_grad=True)
    y = StraightThrough.apply(x, torch.tensor(0.1), (-128, 127), Rounding.HALF_EVEN, True)
    y.sum().backward()

    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert y.tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0])


def test_an_averaged_model_of_asymmetric_codes_has_whole_zero_points() -> None:
    model = prepare(small(), pixels(2), target="onnxruntime")
    average = torch.optim.swa_utils.AveragedModel(calibrate(model, pixels()), use_buffers=True)
    average.update_parameters(calibrate(prepare(small(), pixels(2), target="onnxruntime"), 3 * pixels() + 1))
    average.update_parameters(calibrate(prepare(small(), pixels(2), target="onnxruntime"), 2 * pixels() - 1))

    torch.testing.assert_close(convert(average)(pixels()), validated(average, pixels()))


def test_a_converted_model_can_be_pickled() -> None:
    model = convert(calibrate(prepared(), pixels()))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)

    assert torch.equal(torch.load(buffer, weights_only=False)(pixels()), model(pixels()))


def test_a_checkpoint_of_a_compiled_model_says_which_prefix_to_strip() -> None:
    state = {f"_orig_mod.{name}": x for name, x in prepared().state_dict().items()}

    with pytest.raises(ModelError, match=r"strip the prefix '_orig_mod\.'"):
        prepared().load_state_dict(state)


def test_biases_that_do_not_fit_sixteen_bits_are_told_and_simulated() -> None:
    net = nn.Sequential(nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[0].weight *= 0.01
        net[0].bias.copy_(torch.tensor([0.0, 1.0, 200.0]))
    x = torch.randn(16, 6)
    model = calibrate(prepare(net, x[:2], target="bm1684"), x)
    with pytest.warns(UserWarning, match=r"0\.bias \(\d of 3 saturate in int16\)"):
        converted = convert(model)

    step = quantizer(model, "0.activation_post_process").step()
    assert float(((converted(x) - validated(model, x)) / step).abs().max()) <= 1.01


def test_a_power_of_two_scale_that_is_learned_does_not_start_where_a_nudge_doubles_it() -> None:
    qconfig = get_default_qconfig(
        "lsq", "lsq", activation_qkwargs={"power_of_two": True}, weight_qkwargs={"power_of_two": True}
    )
    model = prepare(small(), pixels(2), everywhere(qconfig))
    calibrate(model, pixels())
    for path, q in model.quantizers:
        before = q.step().clone()
        with torch.no_grad():
            q.scale.mul_(1.01)  # type: ignore[operator, union-attr]

        assert torch.equal(before, q.step()), path


def test_a_learned_scale_below_zero_has_the_gradient_of_its_magnitude() -> None:
    positive, negative = prepared("lsq"), prepared("lsq")
    for model, sign in ((positive, 1.0), (negative, -1.0)):
        calibrate(model, pixels())
        with torch.no_grad():
            quantizer(model, "head.weight_fake_quant").scale.mul_(sign)  # type: ignore[operator, union-attr]
        train(model, pixels(), 1, torch.optim.SGD(model.parameters(), lr=0.0))
    one, other = (quantizer(m, "head.weight_fake_quant").scale.grad for m in (positive, negative))  # type: ignore[union-attr]

    torch.testing.assert_close(one, -other)  # type: ignore[operator]


def test_parametrized_weights_are_refused_with_the_way_out() -> None:
    net = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))

    with pytest.raises(ModelError, match="remove_parametrizations"):
        prepare(net, torch.randn(2, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_is_not_float32_is_refused_before_anything_is_trained(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match="expected float32 parameters"):
        prepare(small().to(dtype), pixels(2).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_does_not_round_by_other_scales(dtype: torch.dtype) -> None:
    """It ran, two percent off, without a word."""
    model = calibrate(prepared(), pixels(8)).to(dtype)
    set_fake_quantize(model.eval(), FakeQuantState.VALIDATION)
    with pytest.raises(ModelError, match=r"expected a range in float32; found torch\..*float16"):
        model(pixels(2).to(dtype))


def test_a_prepared_model_that_was_made_bfloat16_is_not_converted() -> None:
    with pytest.raises(ModelError, match=r"Call model\.float\(\)"):
        convert(calibrate(prepared(), pixels()).bfloat16())


def test_only_two_samples_of_the_example_stay_in_the_model() -> None:
    model = prepare(small(), pixels(200))

    assert [len(x) for x in model.facts.example.values()] == [2]


def test_a_reset_scale_stays_in_later_steps() -> None:
    qconfig = get_default_qconfig(activation_observer="histogram")
    model = prepare(small(), pixels(2), everywhere(qconfig))
    calibrate(model, pixels(64))
    reset_scale(model, "percentile", percentile=80.0)
    narrow = float(quantizer(model, "_inputs.x.activation_post_process").step())
    train(model, pixels(64), 1)

    assert float(quantizer(model, "_inputs.x.activation_post_process").step()) == pytest.approx(
        narrow, rel=0.1
    )


def test_a_qconfig_without_effect_is_told() -> None:
    net = small()
    net.qconfig, net.bn1.qconfig = get_default_qconfig(), None  # type: ignore[assignment]

    with pytest.warns(UserWarning, match="the qconfig of bn1 has no effect"):
        prepare(net, pixels(2))


def test_a_range_that_a_mask_made_is_pointed_out() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 1e4 * (x > 0)).softmax(-1)

    model = calibrate(prepare(Masked(), torch.randn(2, 6)), torch.randn(8, 6))
    messages = [r["message"] for r in check_qat_model(model, verbose=False)["please_check"].rows]

    assert any("may be too large for quantization" in m for m in messages)


# --- groups of weights ---------------------------------------------------------------------------------------------


def grouped(kind: str, size: int = 4, dtype: str = "int4", **options: str) -> PreparedModel:
    qconfig = get_default_qconfig(kind, kind, weight_qkwargs={"dtype": dtype, "group_size": size})
    return prepare(small(), pixels(2), everywhere(qconfig), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["generic", "onnxruntime"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_groups_of_weights_are_trained_and_computed_by_onnx_runtime(
    kind: str, dtype: str, target: str
) -> None:
    model = grouped(kind, dtype=dtype, target=target)
    train(model, pixels(16), 3)
    expected = validated(model, pixels())

    assert quantizer(model, "head.weight_fake_quant").qparams().spec.group == 4
    assert quantizer(model, "head.weight_fake_quant").groups == 5 * 9
    step = quantizer(model, "head.activation_post_process").step()
    assert float(((convert(model)(pixels()) - expected) / step).abs().max()) <= 1.01


def test_a_group_has_the_scale_of_its_own_largest_weight() -> None:
    model = grouped("fake_quant")
    calibrate(model, pixels())
    weight = small().head.weight.detach()

    torch.testing.assert_close(
        quantizer(model, "head.weight_fake_quant").step(), weight.reshape(-1, 4).abs().amax(1) / 7
    )


def test_groups_that_do_not_divide_a_row_are_refused_with_the_reason_in_the_plan() -> None:
    plan = grouped("fake_quant", size=5).facts.plan

    assert plan.values["head.weight"].why == "one scale per channel: groups of 5 do not divide a row of 36"
    assert "only matrices" in plan.values["conv1.weight"].why


def test_a_bias_beside_groups_of_weights_stays_float_with_the_reason(tmp_path: Path) -> None:
    model = grouped("fake_quant")
    plan = decided(calibrate(model, pixels())).plan
    plan.save(tmp_path / "plan.json")
    entry = plan.values["head.bias"]

    assert entry.qparams is None
    assert "accumulators of their own" in entry.why
    assert (
        json.loads((tmp_path / "plan.json").read_text())["values"]["head.weight"]["qparams"]["spec"]["group"]
        == 4
    )
    assert type(plan).load(tmp_path / "plan.json") == plan


def test_groups_along_either_axis_broadcast_to_the_matrix() -> None:
    x = torch.arange(24.0).reshape(4, 6)
    rows, columns = (QuantSpec(INT8, True, axis, group=2) for axis in (0, 1))

    assert (rows.scales(x.shape), columns.scales(x.shape)) == (12, 12)
    for spec in (rows, columns):
        maxima = spec.rows(x).amax(1)
        assert bool((spec.broadcast(maxima, x) >= x).all())
        assert bool((spec.broadcast(maxima, x) - x < (2 if spec is rows else 7)).all())


def test_groups_of_activations_are_an_error() -> None:
    with pytest.raises(PlanError, match="Move it to weight_qkwargs"):
        get_default_qconfig(activation_qkwargs={"group_size": 4})


def test_a_list_of_fixed_scales_of_the_wrong_length_is_an_error() -> None:
    qconfig = get_default_qconfig(
        weight_observer="fixed_scale", weight_qkwargs={"scale": torch.tensor([0.1, 0.2])}
    )
    with pytest.raises(NumericsError, match=r"expected one scale, or \d; found 2"):
        prepare(small(), pixels(2), everywhere(qconfig))


def test_an_empty_sensitivity_table_is_an_error() -> None:
    with pytest.raises(PlanError, match="an empty one"):
        sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter([], topk=1)

"""`convert` and `export` against the outputs that the trained model shows in state VALIDATION."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import onnx
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

from bitwright import (
    FakeQuantState,
    PreparedModel,
    QuantizedModel,
    Replay,
    capture,
    convert,
    export,
    export_float,
    prepare,
    quantized_reads,
    set_fake_quantize,
)
from bitwright.errors import DataError, ModelError, PlanError
from bitwright.flow.convert import decided
from bitwright.numerics.rounding import Rounding
from bitwright.train.fake_quants import Quantizer

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ("generic", "onnxruntime", "bm1684x", "bm1684", "journey6")


def simulated(model: nn.Module, x: Tensor) -> Tensor:
    """What the plan of the converted model computes in simulation, with the target's rounding."""
    found = decided(model)
    reads = quantized_reads(found.graph, found.plan)
    return Replay(found.graph).run({found.graph.info.inputs[0].name: x}, reads)[found.graph.info.outputs[0]]


def in_steps(model: nn.Module, x: Tensor, path: str = "head.activation_post_process") -> Tensor:
    """*x* in steps of the quantizer at *path*."""
    quantizer = model.get_submodule(path)
    assert isinstance(quantizer, Quantizer)
    return x / quantizer.step()


def difference(
    model: nn.Module, x: Tensor, path: str = "head.activation_post_process"
) -> tuple[float, float]:
    """How many steps the converted *model* differs from its VALIDATION outputs at most, and on which share of the elements."""
    steps = in_steps(model, convert(model)(x) - validated(model, x), path).round().abs()
    return float(steps.max()), float((steps > 0).float().mean())


def trained(model: PreparedModel, x: Tensor) -> PreparedModel:
    """*model* after three steps."""
    train(model, x, 3)
    return model


def rounding_as_the_file(model: PreparedModel) -> PreparedModel:
    """*model* rounding half-even, the only way a file can say; where all scales are powers of two, ties are frequent."""
    for _, quantizer in model.quantizers:
        quantizer.spec = replace(quantizer.spec, rounding=Rounding.HALF_EVEN)
    return model


CASES = [
    *((target, kind, "trained") for target in TARGETS for kind in KINDS),
    *((target, "fake_quant", mode) for target in TARGETS for mode in ("frozen", "folded")),
    *((target, kind, "folded") for target in ("generic", "bm1684") for kind in ("lsq", "pact")),
]


@pytest.mark.parametrize("target, kind, batchnorm", CASES)
def test_the_converted_model_computes_what_validation_shows(target: str, kind: str, batchnorm: str) -> None:
    model = prepare(small(), pixels(2), of_kind(kind), target=target, batchnorm=batchnorm)  # type: ignore[arg-type]
    trained(model, pixels(16))
    apart = in_steps(model, simulated(model, pixels()) - validated(model, pixels())).abs()
    most, share = difference(rounding_as_the_file(model), pixels(32, seed=2))

    # The order of float32 sums decides what is within rounding error of a tie.
    assert (apart > 1e-3).float().mean() <= (0.1 if target == "bm1684" else 0.0)
    assert apart.max() <= 1.001
    assert most <= 1
    assert share <= 0.02


@pytest.mark.parametrize("target", ["generic", "onnxruntime"])
@pytest.mark.parametrize("kind", KINDS)
def test_int4_weights_are_converted(kind: str, target: str) -> None:
    model = prepare(small(), pixels(2), of_kind(kind, weight="int4"), target=target)
    most, share = difference(trained(model, pixels(16)), pixels(32, seed=2))

    torch.testing.assert_close(simulated(model, pixels()), validated(model, pixels()))
    assert most <= 1
    assert share <= 0.02


@pytest.mark.parametrize("target", ["generic", "onnxruntime", "journey6"])
@pytest.mark.parametrize("kind", KINDS)
def test_int16_activations_are_converted(kind: str, target: str) -> None:
    model = prepare(small(), pixels(2), of_kind(kind, activation="int16"), target=target)
    most, share = difference(trained(model, pixels(16)), pixels(32, seed=2))

    # Sums in float32 are worth a fraction of a 16-bit step in every layer.
    assert most <= 1
    assert share <= 0.05


class Upsampling(nn.Module):
    """Transposed convolutions, one of them grouped, with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.up1, self.bn1 = nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6)
        self.up2, self.bn2 = nn.ConvTranspose2d(6, 4, 2, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 3, 1)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.uniform_(norm.running_var, 0.3, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.up1(x)))
        return self.head(torch.relu(self.bn2(self.up2(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("target", ["generic", "onnxruntime", "bm1684"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_normalisation_behind_grouped_transposed_convolutions_is_folded(kind: str, target: str) -> None:
    torch.manual_seed(0)
    model = prepare(Upsampling(), torch.randn(2, 4, 3, 3), of_kind(kind), target=target)
    x = torch.randn(8, 4, 3, 3)
    trained(model, torch.randn(8, 4, 3, 3))
    torch.testing.assert_close(simulated(model, x), validated(model, x))
    most, share = difference(rounding_as_the_file(model), x)

    assert most <= 1
    assert share <= 0.02


class Structured(nn.Module):
    """Two inputs; a dictionary with a tuple, and an input that is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, object]:
        y = self.fc(x)
        return {"sum": y * scale, "pair": (y, torch.sigmoid(y)), "given": x}


def test_a_converted_model_is_called_as_the_float_one_and_gives_the_same_structure() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, 6), torch.rand(5, 4)
    model = calibrate(prepare(Structured().eval(), inputs), inputs)
    expected, made = model(*inputs), convert(model)

    assert torch.utils._pytree.tree_structure(made(*inputs)) == torch.utils._pytree.tree_structure(expected)
    torch.testing.assert_close(made(*inputs), expected, rtol=0, atol=0.05)
    torch.testing.assert_close(made(inputs[0], scale=inputs[1]), made(*inputs), rtol=0, atol=0)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y = self.net(x)
        return y, [torch.relu(y)]


class Named(NamedTuple):
    """An output of two fields."""

    logits: Tensor
    features: Tensor


class WithNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Named:
        y = self.net(x)
        return Named(y, y.relu())


def test_named_tuples_stay_named_tuples_also_of_copies() -> None:
    model = calibrate(prepare(WithNames(), features(2)), features())
    expected = model(features())
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), convert(model)]

    for other in others:
        found = other(features())
        assert isinstance(found, Named)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.features, expected.features)


def test_tuples_and_lists_stay_tuples_and_lists() -> None:
    made = convert(calibrate(prepare(Pair().eval(), features(2)), features()))
    first, rest = made(features())

    assert type(rest) is list  # not the list of fx, which cannot be appended to
    assert torch.equal(rest[0], first.relu())


@pytest.mark.parametrize("n", [1, 3, 16])
def test_a_converted_model_takes_any_batch_size(n: int) -> None:
    model = calibrate(prepare(plain().eval(), features(2)), features())

    torch.testing.assert_close(convert(model)(features(n)), validated(model, features(n)), rtol=0, atol=0.05)


def test_parts_that_were_kept_float_are_computed_in_float() -> None:
    net = small()
    net.head.qconfig = None  # type: ignore[assignment]
    model = prepare(net, pixels(2), of_kind("fake_quant"))
    train(model, pixels(16), 3)
    made = convert(model)

    torch.testing.assert_close(made(pixels()), validated(model, pixels()), rtol=1e-3, atol=0.02)
    stored = {i.name: i.data_type for i in made.model.graph.initializer}
    assert stored["head.weight"] == onnx.TensorProto.FLOAT


def test_converting_leaves_the_model_and_its_mode_alone() -> None:
    model = trained(prepared("lsq"), pixels())
    before = copy.deepcopy(model.state_dict())
    convert(model)

    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {q.state for _, q in model.quantizers} == {FakeQuantState.QAT}


def test_a_model_can_be_converted_after_calibration_alone_or_through_a_wrapper() -> None:
    model = calibrate(prepared(), pixels())
    wrapped = torch.optim.swa_utils.AveragedModel(model)

    assert torch.equal(convert(model)(pixels()), convert(wrapped)(pixels()))


def test_a_network_of_which_only_a_part_is_prepared_is_not_converted_in_part() -> None:
    whole = nn.Sequential(calibrate(prepared(), pixels()), nn.Softmax(-1))

    with pytest.raises(ModelError, match=r"only 0 is prepared\. Give the prepared part itself"):
        convert(whole)


def test_a_converted_model_has_no_parameters_and_can_be_copied() -> None:
    made = convert(calibrate(prepared(), pixels()))

    assert list(made.parameters()) == []
    assert torch.equal(copy.deepcopy(made)(pixels()), made(pixels()))


@pytest.mark.parametrize("name", ["convert", "export"])
def test_biases_that_do_not_fit_are_told_at_the_users_own_line(name: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 3)).eval()
    nn.init.constant_(net[0].weight, 0.01)
    nn.init.constant_(net[0].bias, 200.0)
    model = calibrate(prepare(net, features(2), target="bm1684"), features())

    with pytest.warns(UserWarning, match=r"biases do not fit into the chip's format: 0\.bias") as told:
        convert(model) if name == "convert" else export(model, tmp_path / "net.onnx")
    assert [w.filename for w in told] == [__file__]


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> QuantizedModel:
    return convert(calibrate(prepared(), pixels()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8, torch.uint8])
def test_an_input_of_another_dtype_says_that_the_model_quantizes_it_itself(
    made: QuantizedModel, dtype: torch.dtype
) -> None:
    with pytest.raises(DataError, match=rf"input x .*torch\.float32: the model quantizes .*found {dtype}"):
        made(pixels().to(dtype))


def test_a_quantized_tensor_of_torch_is_refused(made: QuantizedModel) -> None:
    with pytest.warns(UserWarning, match="quantize_per_tensor"):
        x = torch.quantize_per_tensor(pixels(), 0.1, 0, torch.quint8)

    with pytest.raises(DataError, match=r"found torch\.quint8"):
        made(x)


@pytest.mark.parametrize("arguments, keywords", [((), {}), ((1, 2), {}), ((), {"y": 1})])
def test_missing_and_superfluous_inputs_are_told(
    made: QuantizedModel, arguments: tuple[int, ...], keywords: dict[str, int]
) -> None:
    with pytest.raises(DataError, match=r"converted model: expected the inputs x; found"):
        made(*[pixels()] * len(arguments), **dict.fromkeys(keywords, pixels()))


def test_something_else_than_a_tensor_is_refused(made: QuantizedModel) -> None:
    with pytest.raises(DataError, match="found ndarray"):
        made(pixels().numpy())


def test_a_shape_that_does_not_fit_is_told(made: QuantizedModel) -> None:
    with pytest.raises(ModelError, match=r"invalid dimensions for input: x.*Check the shapes"):
        made(torch.randn(2, 2, 6, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_observers_that_never_ran_are_an_error(kind: str) -> None:
    with pytest.raises(PlanError, match=r"found \d+ observers that never ran.*Run some batches"):
        convert(prepared(kind))


def test_a_part_that_was_never_calibrated_is_named() -> None:
    model = calibrate(prepared(), pixels())
    other = prepared().eval()
    set_fake_quantize(other, FakeQuantState.FLOAT)
    set_fake_quantize(other.get_submodule("head"), FakeQuantState.CALIBRATION)
    other(pixels())

    assert convert(model) is not None
    with pytest.raises(PlanError, match=r"^(?!head)\S+: expected a calibrated or trained model"):
        convert(other)


def test_a_float_model_cannot_be_converted() -> None:
    with pytest.raises(ModelError, match=r"Small: .*Call bitwright\.prepare"):
        convert(small())


def test_a_model_that_was_changed_after_preparing_cannot_be_converted() -> None:
    model = calibrate(prepared(), pixels())
    model.head = nn.Linear(36, 5)

    with pytest.raises(ModelError, match=r"head\S*: .*Change the float model, and prepare it again"):
        convert(model)


def test_learned_numbers_that_are_not_finite_are_an_error() -> None:
    model = calibrate(prepared("lsq"), pixels())
    model.get_parameter("head.activation_post_process.scale").data.fill_(torch.nan)

    with pytest.raises(Exception, match="quantization parameters: expected finite scales") as caught:
        convert(model)
    assert type(caught.value).__name__ == "NumericsError"


def test_a_model_from_an_onnx_file_is_trained_and_exported(tmp_path: Path) -> None:
    onnx.save(export_float(capture(small(), pixels(2))), tmp_path / "float.onnx")
    model = prepare(tmp_path / "float.onnx")
    losses = train(model, pixels(), 12)
    most, _ = difference(
        model, pixels(), next(p for p, _ in model.quantizers if p.startswith("head.activation"))
    )

    assert losses[-1] < losses[0]
    assert most <= 1

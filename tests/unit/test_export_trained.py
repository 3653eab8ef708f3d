"""Trained models as files: what is written, and what is proven of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tests.unit.qat_cases import calibrate, features, of_kind, pixels, prepared, small, train, validated
from torch import Tensor, nn

from bitwright import FakeQuantState, Plan, PreparedModel, convert, export, prepare, set_fake_quantize
from bitwright.errors import OutputError
from bitwright.flow.export import agreement
from bitwright.numerics.rounding import Rounding
from bitwright.runtime.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ("generic", "onnxruntime", "bm1684x", "bm1684", "journey6")


def trained(model: PreparedModel, x: Tensor) -> PreparedModel:
    """*model* after three steps."""
    train(model, x, 3)
    return model


# --- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_exported_file_is_proven_and_its_plan_can_be_read(target: str, tmp_path: Path) -> None:
    model = trained(prepare(small(), pixels(2), of_kind("fake_quant"), target=target), pixels())
    exported = export(model, tmp_path / "net.onnx")

    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.plan.json"]
    assert Plan.load(tmp_path / "net.plan.json") == exported.plan == convert(model).plan
    assert exported.plan.target == target
    assert all(op.holds for op in exported.proof.per_op)


def test_onnx_runtime_computes_from_the_file_what_the_module_computes(tmp_path: Path) -> None:
    model = trained(prepared(), pixels())
    export(model, tmp_path / "net.onnx")
    file = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(file, full_check=True)
    found = Session(file).run({"x": pixels()})
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options, ["CPUExecutionProvider"])
    (plain_session,) = session.run(None, {"x": pixels().numpy()})

    assert np.array_equal(next(iter(found.values())), convert(model)(pixels()).numpy())
    np.testing.assert_allclose(plain_session, convert(model)(pixels()).numpy(), atol=0.05)


def test_the_module_saves_the_file_that_export_writes(tmp_path: Path) -> None:
    model = trained(prepared(), pixels())
    export(model, tmp_path / "exported.onnx")
    convert(model).save(tmp_path / "saved.onnx")

    assert (tmp_path / "saved.onnx").read_bytes() == (tmp_path / "exported.onnx").read_bytes()


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError):
        export(calibrate(prepared(), pixels()), tmp_path / "file" / "net.onnx")


# --- the proof ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_file_is_compared_with_what_validation_shows(target: str, tmp_path: Path) -> None:
    model = trained(prepare(small(), pixels(2), of_kind("fake_quant"), target=target), pixels())
    modes, states = [m.training for m in model.modules()], [q.state for _, q in model.quantizers]
    exported = export(model, tmp_path / "net.onnx")

    assert (modes, states) == ([m.training for m in model.modules()], [q.state for _, q in model.quantizers])
    x = model.facts.example["x"]
    expected, found = validated(model, x), Session(exported.path).run({"x": x})
    (cosine,) = exported.validation.values()
    assert cosine == pytest.approx(
        float(
            torch.cosine_similarity(
                expected.flatten(), torch.tensor(next(iter(found.values()))).flatten(), dim=0
            )
        ),
        abs=1e-5,
    )
    # bm1684 rounds half away from zero, which a file cannot say.
    assert cosine > (0.999 if target != "bm1684" else 0.98)


def test_a_file_that_is_not_what_was_validated_shows_in_the_cosine(tmp_path: Path) -> None:
    model = trained(prepared(), pixels())
    for _, quantizer in model.quantizers:
        quantizer.spec = replace(quantizer.spec, rounding=Rounding.HALF_EVEN)
    right = export(model, tmp_path / "net.onnx").validation

    hook = model.register_forward_hook(lambda module, inputs, output: output + 0.5)
    wrong = export(model, tmp_path / "net.onnx").validation
    hook.remove()
    assert all(wrong[name] < right[name] - 1e-3 for name in right)


def test_a_model_whose_example_was_zeros_is_proven_on_something_that_moves(tmp_path: Path) -> None:
    """Most model functions return zeros: every difference of the file would have been hidden."""
    model = calibrate(prepare(small(), torch.zeros(2, 3, 6, 6), of_kind("fake_quant")), pixels(16))
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    export(model, tmp_path / "net.onnx")
    hook.remove()

    assert len(seen) == 1
    assert seen[0].shape == (2, 3, 6, 6)
    assert seen[0].std() > 0.5
    assert seen[0].abs().max() <= pixels(16).abs().max()


class _Outputs(nn.Module):
    """A number, minus infinity and nothing among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf]))

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.fc(x)
        return {"y": y, "masked": [y + self.mask, None], "count": x.shape[0], "codes": y.argmax(1)}


def test_outputs_of_any_kind_are_compared_where_they_are_numbers(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="holds infinity"):
        model = calibrate(prepare(_Outputs().eval(), features(2)), features())
    validation = export(model, tmp_path / "net.onnx").validation

    assert len(validation) == 2
    assert min(validation.values()) > 0.999


def test_infinity_on_one_side_alone_is_no_agreement() -> None:
    a, b = torch.tensor([1.0, 2.0, -torch.inf]), torch.tensor([1.0, 2.0, 3.0])
    assert agreement(a, a) == pytest.approx(1.0)
    assert agreement(a, b) == agreement(b, a) == 0.0
    assert agreement(torch.zeros(3), torch.zeros(3)) == 1.0
    assert agreement(torch.zeros(3), b) == 0.0


# --- in integers alone -------------------------------------------------------------------------------------------


def test_a_trained_model_is_exported_in_integers_with_its_tables(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8), nn.Softmax(-1))
    x = torch.randn(64, 5, 8)
    model = calibrate(prepare(module, x, of_kind("lsq"), target="generic"), x)
    written = export(model, tmp_path / "net_integer.onnx", integers=True)

    assert written.islands == {}
    assert max(d.steps for d in written.proof.per_op) <= 1
    tables = {n: e.table for n, e in written.plan.ops.items() if e.table is not None}
    assert {n.rpartition(".")[2] for n in tables} >= {"rsqrt", "exp", "reciprocal"}
    set_fake_quantize(model.eval(), FakeQuantState.VALIDATION)
    session = Session(written.path)
    found = torch.from_numpy(session.run({session.inputs[0]: x})[session.outputs[0]])
    torch.testing.assert_close(found, model(x).detach(), atol=2 / 127, rtol=0)


def test_what_has_no_integer_form_is_named(tmp_path: Path) -> None:
    module, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(64, 8)
    model = calibrate(prepare(module, x, of_kind("fake_quant"), target="onnxruntime"), x)

    islands = export(model, tmp_path / "net.onnx", integers=True).islands
    assert islands == {"1": "LayerNorm has no integer form"}

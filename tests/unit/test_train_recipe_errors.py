"""What `bitwright train` says of bad input, and what it keeps."""

from __future__ import annotations

import importlib.util
import json
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.cli_cases import Command
from tests.unit.recipe_cases import recipe, written
from torch import nn

import bitwright.flow.training as training
from bitwright.errors import NumericsError
from bitwright.flow.model_source import import_object, read_weights
from bitwright.flow.progress import Silence

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": None}, "model: Field required"),
        ({"epoch": 3}, "epoch: Extra inputs are not permitted"),
        ({"epochs": 0}, "epochs: Input should be greater than 0"),
        ({"target": "chip"}, "expected a known target"),
        ({"device": "cuda:7"}, "device: expected a device that torch can use"),
        ({"weight": {"fake_quant": "lsqq"}}, "Did you mean 'lsq'?"),
        ({"activation": {"observer": "minmax"}}, "Did you mean 'min_max'?"),
        ({"activation": {"options": {"percent": 3}}}, "expected a known option"),
        ({"leave_float": ["haed"]}, "Did you mean 'head'?"),
        ({"optimizer": {"decays": [1.5]}}, "optimizer.decays.0: Input should be less than 1"),
        ({"loss": "CODE:vector"}, "expected a loss that is one number; found Tensor [16]"),
        ({"loss": "CODE:detached"}, "training, epoch 1, step 1: expected a loss that has a gradient; found a tensor of torch.float32"),
        ({"loss": "CODE:hits"}, "expected a loss that has a gradient; found a tensor of torch.int64"),
        ({"model": "CODE:empty"}, "expected logits [n, classes] as the first output of the model; found NoneType"),
        ({"model": "CODE:greedy"}, "memory: expected enough for this job"),
        ({"model": "CODE:doubled", "calibration": {"batches": 0}}, "calibration.batches: expected 1 or more, since the model computes other"),
        ({"device": "meta"}, "device: expected a device that torch can use"),
        ({"seed": 2**70}, "seed: Input should be less than"),
        ({"checkpoint": "no.safetensors"}, "expected weights in .safetensors"),
        ({"data": {"train": "CODE:broken", "validation": "CODE:data"}}, "expected finite numbers to calibrate on"),
        ({"data": {"train": "CODE:uneven", "validation": "CODE:data"}}, "48 samples, 47 labels"),
        ({"data": {"train": "CODE:generator", "validation": "CODE:data"}}, "a generator is used up after one pass"),
        ({"data": {"train": "CODE:unlabelled", "validation": "CODE:data"}}, "expected batches (inputs, labels)"),
        ({"data": {"train": "CODE:wide", "validation": "CODE:data"}}, "calibrating: expected a model that takes this batch; found RuntimeError"),
        ({"data": {"train": "CODE:wide", "validation": "CODE:data"}, "calibration": {"batches": 0}}, "training, epoch 1, step 1: expected a model that takes"),
        ({"data": {"train": "CODE:data", "validation": "CODE:bytes"}}, "measuring float: expected a model that takes this batch; found RuntimeError"),
        ({"data": {"train": "CODE:data", "validation": "CODE:one_hot"}}, "expected one class index for each of 48 samples; found labels [48, 3]"),
        ({"data": {"train": "CODE:torn", "validation": "CODE:data"}}, "expected samples that can be read and stacked; found OSError: no picture"),
        ({"model": "CODE:without_example"}, "expected example inputs"),
        ({"data": {"train": "CODE:nothing", "validation": "CODE:data"}}, "expected file.py:name"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    bitwright: Command, folder: Path, changes: dict[str, object], message: str
) -> None:
    changes = json.loads(json.dumps(changes).replace("CODE", f"net_{folder.name}.py"))

    outcome = bitwright("train", recipe(folder, **changes), "-o", folder / "out", "-q")

    assert message in outcome.error
    assert not (folder / "out").exists()


def test_a_checkpoint_of_another_network_is_refused(bitwright: Command, folder: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3, 4)}, folder / "other.pt")

    outcome = bitwright("train", recipe(folder, checkpoint="other.pt"), "-o", folder / "out", "-q")

    assert "expected the weights of" in outcome.error
    assert "Give the checkpoint of this very network." in outcome.error


def test_without_tensorboard_the_missing_extra_is_named(bitwright: Command, folder: Path) -> None:
    if importlib.util.find_spec("tensorboard") is not None:
        pytest.skip("tensorboard is installed")
    outcome = bitwright("train", recipe(folder, tensorboard=True, epochs=1), "-o", folder / "out", "-q")

    assert "pip install 'bitwright[tensorboard]'" in outcome.error


@pytest.mark.parametrize(
    "held, found",
    [
        ([torch.zeros(2)], "list"),
        (torch.zeros(2), "Tensor"),
        ({0: torch.zeros(2)}, "0: Tensor"),
        ({"fc.weight": torch.zeros(2), "epoch": 3}, "'epoch': int"),
    ],
)
def test_weights_that_are_no_state_dict_are_refused(
    bitwright: Command, folder: Path, held: Any, found: str
) -> None:
    """It was called a defect of ours."""
    torch.save(held, folder / "odd.pt")

    outcome = bitwright("train", recipe(folder, checkpoint="odd.pt"), "-o", folder / "out", "-q")

    assert f"odd.pt: expected a state dict: a tensor for each name; found {found}." in outcome.error


def test_a_file_that_only_looks_like_a_checkpoint_is_refused(bitwright: Command, folder: Path) -> None:
    (folder / "out").mkdir()
    torch.save(torch.zeros(2), folder / "out" / training.CHECKPOINT)

    outcome = bitwright("train", recipe(folder), "-o", folder / "out", "-q")

    assert "expected a checkpoint of this recipe; found something else" in outcome.error


class _Interrupted(Silence):
    def stage(self, title: str, total: int | None = None) -> None:
        if title.startswith("epoch 2"):
            raise KeyboardInterrupt


def test_a_checkpoint_is_not_taken_up_after_its_target_changed(bitwright: Command, folder: Path) -> None:
    """The chip's file could be edited in between without a word."""
    chip = folder / "chip.yaml"
    chip.write_text(files("bitwright.plan").joinpath("targets", "generic.yaml").read_text())
    with pytest.raises(KeyboardInterrupt):
        training.run_training(recipe(folder, target=str(chip)), output=folder / "out", watcher=_Interrupted())
    chip.write_text(chip.read_text() + "\n# another\n")

    outcome = bitwright("train", recipe(folder, target=str(chip)), "-o", folder / "out", "-q")

    assert "expected a checkpoint of this recipe" in outcome.error


def test_weights_that_are_not_finite_never_replace_a_checkpoint(folder: Path) -> None:
    """The loss was finite, its gradient was not: the next run went on from NaN."""
    code = f"net_{folder.name}.py"
    data = {"train": f"{code}:data", "validation": f"{code}:data", "batch_size": 48}  # one step
    path = recipe(folder, data=data, loss=f"{code}:steep", batchnorm="frozen")

    with pytest.raises(
        NumericsError, match=r"training, epoch 1: expected finite parameters; found NaN .* in conv"
    ):
        training.run_training(path, output=folder / "out")
    assert not (folder / "out" / training.CHECKPOINT).exists()


def test_what_evaluation_alone_computes_is_calibrated(folder: Path) -> None:
    code = f"net_{folder.name}.py"
    trained = training.run_training(recipe(folder, model=f"{code}:doubled", epochs=1), output=folder / "out")

    assert set(trained.accuracy) == {"float", "calibrated", "trained", "converted"}


def test_an_infinite_mask_is_no_divergence(folder: Path) -> None:
    """Parameters that are not trained cannot diverge."""
    warnings.filterwarnings("ignore", "prepare: 1 operators did not get")
    code = f"net_{folder.name}.py"
    assert training.run_training(
        recipe(folder, model=f"{code}:masked", epochs=1), output=folder / "out"
    ).history


def test_fixed_scales_need_no_calibration(folder: Path) -> None:
    code = f"net_{folder.name}.py"
    fixed = {"observer": "fixed_scale", "options": {"scale": 0.05}}
    path = recipe(folder, model=f"{code}:doubled", epochs=1, activation=fixed, calibration={"batches": 0})
    assert training.run_training(path, output=folder / "out").history


def test_weights_without_counters_of_batches_load(folder: Path) -> None:
    net = import_object(f"{folder}/net_{folder.name}.py:net", "model")()[0]
    state = net.state_dict()
    del state["norm.num_batches_tracked"]
    torch.save(state, folder / "float.pt")

    path = recipe(folder, epochs=1, checkpoint="float.pt")
    assert training.run_training(path, output=folder / "out").history


def test_versions_that_modules_note_in_a_state_dict_arrive(folder: Path) -> None:
    """Modules that convert older weights by version were given none."""
    norm = nn.BatchNorm2d(3)
    state = {**norm.state_dict(), "head._extra_state": "words"}
    torch.save(norm.state_dict(), folder / "whole.pt")
    torch.save(state, folder / "worded.pt")

    assert read_weights(folder / "whole.pt")._metadata[""]["version"] == 2  # type: ignore[attr-defined]
    assert read_weights(folder / "worded.pt")["head._extra_state"] == "words"

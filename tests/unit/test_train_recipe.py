"""`bitwright train` and its recipe: what it does, and what it says of bad input."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.unit.cli_cases import Command

import bitwright.flow.training as training
from bitwright.errors import ModelError, NumericsError
from bitwright.flow.progress import Silence
from bitwright.flow.training_data import Source
from bitwright.plan.plan import Plan
from bitwright.runtime.session import Session

_CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.dropout(x.mean((2, 3))))

def net():
    torch.manual_seed(0)
    return Net().eval(), torch.zeros(2, 1, 6, 6)

def data():
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(48) % 3
    return torch.randn(48, 1, 6, 6, generator=generator) + y[:, None, None, None], y

def broken():
    x, y = data()
    return x.clone().fill_(float("nan")), y

def uneven():
    x, y = data()
    return x, y[:-1]

def odd():
    x, y = data()
    return x[:33], y[:33]  # batches of 16, 16 and 1

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(zip(*data()))

    def __len__(self):
        return 48

def stream():
    return torch.utils.data.DataLoader(Stream(), 16)

def vector(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels, reduction="none")

def generator():
    return (batch for batch in [data()])

def shuffled():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), 16, shuffle=True)

def unlabelled():
    return [data()[0]]

def wide():
    x, y = data()
    return x.repeat(1, 2, 1, 1), y

def bytes():
    x, y = data()
    return x.to(torch.uint8), y

def one_hot():
    x, y = data()
    return x, nn.functional.one_hot(y, 3).float()

class Torn(torch.utils.data.Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, i):
        raise OSError(f"no picture {i}")

def torn():
    return Torn()

def without_example():
    return net()[0], None
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / f"net_{tmp_path.name}.py").write_text(_CODE)
    return tmp_path


def recipe(folder: Path, **changes: object) -> Path:
    """A recipe in *folder*, with fields changed (None: left out)."""
    code = f"net_{folder.name}.py"
    fields = {
        "model": f"{code}:net",
        "data": {"train": f"{code}:data", "validation": f"{code}:data", "batch_size": 16},
        "calibration": {"batches": 2},
        "epochs": 2,
        "optimizer": {"rate": 0.05},
    }
    fields |= changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in fields.items() if v is not None}))
    return path


def test_a_recipe_trains_converts_and_measures_every_stage(bitwright: Command, folder: Path) -> None:
    out = folder / "out"

    outcome = bitwright("train", recipe(folder), "-o", out, "-q")

    assert outcome.status == 0, outcome.err
    assert sorted(f.name for f in out.iterdir()) == [
        "history.csv",
        "net_qat.onnx",
        "net_qat.plan.json",
        "report.html",
        "summary.json",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["accuracy"]) == ["float", "calibrated", "trained", "converted"]
    assert summary["accuracy"]["trained"] >= summary["accuracy"]["float"]
    assert [h["epoch"] for h in summary["history"]] == [1, 2]
    assert Plan.load(out / "net_qat.plan.json").target == "generic"
    y = Session(out / "net_qat.onnx").run({"x": torch.zeros(3, 1, 6, 6)})
    assert [v.shape for v in y.values()] == [(3, 3)]
    assert "trained" in outcome.out


@pytest.mark.parametrize("kind", ["lsq", "pact"])
def test_learned_scales_int4_weights_float_parts_and_bf16(
    bitwright: Command, folder: Path, kind: str
) -> None:
    path = recipe(
        folder,
        weight={"fake_quant": kind, "dtype": "int4"},
        activation={"fake_quant": kind},
        leave_float=["head"],
        amp="bf16",
        batchnorm="frozen",
        epochs=1,
        optimizer={"name": "adamw"},
    )

    outcome = bitwright("train", path, "-o", folder / "out", "-q", "--json")

    assert outcome.status == 0, outcome.err
    assert [row["stage"] for row in json.loads(outcome.out)] == [
        "float",
        "calibrated",
        "trained",
        "converted",
    ]
    plan = Plan.load(folder / "out" / "net_qat.plan.json")
    assert [plan.ops[name].precision for name in ("conv", "head")] == ["w4a8", "float"]


def test_weights_are_calibrated_by_the_observer_that_the_recipe_names(folder: Path) -> None:
    """They were calibrated by min_max whatever it said, and a learned scale stayed there."""
    untrained = {"epochs": 1, "optimizer": {"rate": 1e-12}, "leave_float": ["head"], "batchnorm": "frozen"}

    def scales(name: str, **weight: str) -> list[float]:
        path = recipe(folder, weight={"fake_quant": "lsq", "dtype": "int4", **weight}, **untrained)
        training.run_training(path, output=folder / name)
        plan = Plan.load(folder / name / "net_qat.plan.json")
        entry = next(v for n, v in plan.values.items() if v.role == "weight" and v.qparams is not None)
        assert entry.qparams is not None
        return list(entry.qparams.scale)

    learned, by_extremes = scales("default"), scales("extremes", observer="min_max")
    assert scales("mse", observer="mse") == learned
    assert all(a <= b for a, b in zip(learned, by_extremes, strict=True))
    assert learned != by_extremes


def test_a_checkpoint_is_not_taken_up_after_the_float_weights_changed(folder: Path) -> None:
    """The same file name was enough, and training went on from the old weights."""
    net = training.import_model(f"{folder / f'net_{folder.name}.py'}:net")[1]
    torch.save(net.state_dict(), folder / "float.pt")
    path = recipe(folder, checkpoint="float.pt")
    with pytest.raises(KeyboardInterrupt):
        training.run_training(path, output=folder / "out", watcher=_Interrupted())
    torch.save({k: v + 0.1 for k, v in net.state_dict().items()}, folder / "float.pt")

    with pytest.raises(ModelError, match="expected a checkpoint of this recipe"):
        training.run_training(path, output=folder / "out")


def test_batch_statistics_are_taken_anew_after_every_epoch(folder: Path) -> None:
    def stages(**changes: object) -> list[str]:
        watcher = _Stages()
        training.run_training(recipe(folder, **changes), output=folder / "out", watcher=watcher)
        return [title for title in watcher.titles if title == "taking batch statistics"]

    assert len(stages()) == 2
    assert stages(batchnorm_batches=0) == stages(batchnorm="frozen") == stages(batchnorm="folded") == []


class _Stages(Silence):
    def __init__(self) -> None:
        self.titles: list[str] = []

    def stage(self, title: str, total: int | None = None) -> None:
        self.titles.append(title)


class _Interrupted(Silence):
    """Stops the job when its second epoch begins."""

    def stage(self, title: str, total: int | None = None) -> None:
        if title.startswith("epoch 2"):
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "kind, data", [("fake_quant", "data"), ("lsq", "data"), ("pact", "data"), ("lsq", "shuffled")]
)
def test_training_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(
    folder: Path, kind: str, data: str
) -> None:
    code = f"net_{folder.name}.py"
    source = {"train": f"{code}:{data}", "validation": f"{code}:data", "batch_size": 16}
    weight = {"fake_quant": kind, "dtype": "int4"}
    path = recipe(folder, epochs=3, data=source, weight=weight, activation={"fake_quant": kind})
    whole = training.run_training(path, output=folder / "whole")

    with pytest.raises(KeyboardInterrupt):
        training.run_training(path, output=folder / "parts", watcher=_Interrupted())
    assert (folder / "parts" / training.CHECKPOINT).exists()
    parts = training.run_training(path, output=folder / "parts")

    assert whole.history == parts.history
    assert whole.accuracy == parts.accuracy
    assert not (folder / "parts" / training.CHECKPOINT).exists()


def test_a_checkpoint_of_another_recipe_is_refused(bitwright: Command, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        training.run_training(recipe(folder), output=folder / "out", watcher=_Interrupted())

    outcome = bitwright("train", recipe(folder, seed=5), "-o", folder / "out", "-q")

    assert "expected a checkpoint of this recipe" in outcome.error


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(folder: Path) -> None:
    path = recipe(folder, optimizer={"rate": 1e30}, calibration={"batches": 0})

    with pytest.raises(
        NumericsError, match=r"training, epoch 1, step \d+: expected a finite loss; found nan"
    ):
        training.run_training(path, output=folder / "out")


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


@pytest.mark.parametrize("data", ["odd", "stream"])
def test_a_last_batch_of_one_sample_and_a_stream_can_be_trained_on(
    bitwright: Command, folder: Path, data: str
) -> None:
    code = f"net_{folder.name}.py"
    source = {"train": f"{code}:{data}", "validation": f"{code}:data", "batch_size": 16}

    outcome = bitwright("train", recipe(folder, data=source, epochs=1), "-o", folder / "out", "-q")

    assert outcome.status == 0, outcome.err


class _Samples(torch.utils.data.IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """33 samples one after the other, of known number."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter([(torch.zeros(2), torch.tensor(0))] * 33)

    def __len__(self) -> int:
        return 33


def test_the_schedule_counts_batches_also_of_a_stream_of_samples() -> None:
    source = Source("samples", _Samples(), 16)

    assert source.length(training=True) == len(list(source.batches(seed=0))) == 3


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


class _Killed(Silence):
    """Stops the job after the curves of its second epoch were written, before its checkpoint was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def stage(self, title: str, total: int | None = None) -> None:
        if title == "measuring epoch 2":
            self._patch.setattr(training, "write_bytes", _stop)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_tensorboard_shows_every_epoch_once_also_after_an_interruption(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the package tensorboard"
    )
    path, out = recipe(folder, tensorboard=True, epochs=3), folder / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        training.run_training(path, output=out, watcher=_Killed(patch))
    left = [curve(events, out, "loss")]
    trained = training.run_training(path, output=out)
    left.append(curve(events, out, "loss"))

    assert [[step for step, _ in points] for points in left] == [[1, 2], [1, 2, 3]]
    for name in ("loss", "top1", "rate"):
        expected = [(h["epoch"], h[name]) for h in trained.history]
        assert curve(events, out, name) == [(step, pytest.approx(y)) for step, y in expected]
    assert [h["rate"] for h in trained.history] == pytest.approx([0.05, 0.05, 0.005])  # as epochs begin


def curve(events: Any, out: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of every point that TensorBoard shows."""
    accumulator = events.EventAccumulator(str(out / "tensorboard"))
    accumulator.Reload()
    return [(point.step, point.value) for point in accumulator.Scalars(name)]


# --- the report --------------------------------------------------------------------------------------------------


def test_the_report_shows_stages_curves_operators_and_the_proof(folder: Path) -> None:
    path, out = recipe(folder, leave_float=["head"]), folder / "out"
    with pytest.raises(KeyboardInterrupt):
        training.run_training(path, output=out, watcher=_Interrupted())
    assert not (out / "report.html").exists()
    result = training.run_training(path, output=out)
    page = (out / "report.html").read_text()
    summary = json.loads((out / "summary.json").read_text())

    for title in ("Loss of every epoch", "Top-1 after every epoch", "What each operator got", "Proof, same"):
        assert title in page
    assert all(f">{stage}<" in page for stage in ("float", "calibrated", "trained", "converted"))
    assert all(f"{100 * top1:.2f}" in page for top1 in result.accuracy.values())
    assert all(
        f"{h['loss']:.4f}" in page for h in result.history
    )  # also of the epoch before the interruption
    assert len(result.history) == 2
    assert page.count("<path") >= 2
    assert ">head<" in page
    assert summary["history"] == result.history
    assert summary["versions"]["torch"] == torch.__version__


def test_the_report_of_a_single_epoch_has_a_point(folder: Path) -> None:
    training.run_training(recipe(folder, epochs=1), output=folder / "out")

    assert "1 points" in (folder / "out" / "report.html").read_text()

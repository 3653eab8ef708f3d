"""`bitwright train` and its recipe: what it does, from calibration to the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.cli_cases import Command
from tests.unit.recipe_cases import recipe, written

import bitwright.flow.training as training
from bitwright.errors import ModelError, NumericsError
from bitwright.flow.progress import Silence
from bitwright.flow.training_data import Source
from bitwright.plan.plan import Plan
from bitwright.runtime.session import Session


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path)


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

    assert '1 point"' in (folder / "out" / "report.html").read_text()

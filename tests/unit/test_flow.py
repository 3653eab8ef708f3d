"""Jobs called from Python: samples, float types, and what an interrupted job leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.networks import Residual, pictures, randomised
from torch import Tensor, nn

from bitwright.errors import DataError, ModelError, PlanError
from bitwright.flow import tune as tune_module
from bitwright.flow.bench import open_bench, take
from bitwright.flow.progress import Silence, counting
from bitwright.flow.ranking import open_state, state_path
from bitwright.flow.settings import Settings
from bitwright.flow.tune import tune

SETTINGS = Settings(target="generic-int8", expected_cos=1.0, max_float_ops=1, input_num=8, inference_num=6)


def residual() -> nn.Module:
    return randomised(Residual())


def fixed(bench, batch: int):
    """The bench's graph as a file with a fixed batch size would give it."""
    inputs = tuple(replace(i, shape=(batch, *i.shape[1:])) for i in bench.graph.info.inputs)
    bench.graph.info = replace(bench.graph.info, dynamic_batch=False, inputs=inputs)
    return bench.graph


def test_whole_batches_are_taken_for_a_fixed_batch_size() -> None:
    bench = open_bench(residual(), pictures(), SETTINGS, Silence(), example_inputs=pictures(2))
    graph = fixed(bench, 8)

    assert len(take(graph, bench.dataset, 6, 0)) == 8
    assert len(take(graph, bench.dataset, 10, 0)) == 8
    assert len(take(fixed(bench, 5), bench.dataset, 0, 0)) == 10
    with pytest.raises(DataError, match="at least 16 samples, the fixed batch size"):
        take(fixed(bench, 16), bench.dataset, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_that_are_not_float32_are_refused_before_they_are_calibrated(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match="Convert the model to float32"):
        open_bench(residual().to(dtype), [], SETTINGS, Silence(), example_inputs=pictures(2).to(dtype))


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while float operators are being chosen, after the ranking."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tune_module, "choose_precisions", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(residual(), pictures(), output=folder, settings=SETTINGS, example_inputs=pictures(2))


def test_a_ranking_survives_an_interruption_that_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch)
    notes: list[str] = []

    class Listening(Silence):
        def note(self, text: str) -> None:
            notes.append(text)

    tune(
        residual(),
        pictures(),
        output=tmp_path,
        settings=SETTINGS,
        watcher=Listening(),
        example_inputs=pictures(2),
    )

    assert any("resuming" in note for note in notes)
    assert not state_path(SETTINGS, tmp_path, "sensitivity").exists()


class _Counting(Silence):
    """Steps by stage: told beforehand, and taken."""

    def __init__(self) -> None:
        self.told: dict[str, int | None] = {}
        self.taken: dict[str, int] = {}

    def stage(self, title: str, total: int | None = None) -> None:
        self.told[title], self.taken[title] = total, 0

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.taken[list(self.told)[-1]] += steps


def test_the_runs_that_leave_out_what_is_needless_are_a_stage_of_their_own(tmp_path: Path) -> None:
    """They went on after the stage before had ended, and nobody knew for how long."""
    watcher = _Counting()
    settings = replace(SETTINGS, expected_cos=0.99999, max_float_ops=3)
    tune(
        residual(),
        pictures(),
        output=tmp_path,
        settings=settings,
        watcher=watcher,
        example_inputs=pictures(2),
    )

    assert watcher.taken["choosing precisions"] > 0
    needless = watcher.told["leaving out what is needless"]
    assert needless
    assert watcher.taken["leaving out what is needless"] == needless
    singles = watcher.told["trying the most sensitive alone"]
    assert singles
    assert 0 < watcher.taken["trying the most sensitive alone"] <= singles


def test_steps_are_counted_from_how_far_it_is() -> None:
    watcher = _Counting()
    watcher.stage("measuring")
    advance = counting(watcher)
    for done in (2, 2, 5):
        advance(done, 9, "")

    assert watcher.taken == {"measuring": 5}


def test_a_ranking_with_thresholds_from_other_data_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch)
    other: Tensor = 3 * pictures(12, seed=2)
    settings = replace(SETTINGS, calibration_data=other)
    bench = open_bench(residual(), pictures(), settings, Silence(), example_inputs=pictures(2))

    with pytest.raises(PlanError, match="another model, data set, setting"):
        open_state(bench, settings, tmp_path, Silence(), search="sensitivity")

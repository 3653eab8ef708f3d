"""What is shown while a job runs, and how a job ends early."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from bitwright.cli.job import job
from bitwright.cli.watcher import Bars, Lines, show_seconds, watching
from bitwright.flow.progress import Silence


def drawn(width: int = 120) -> tuple[Bars, io.StringIO]:
    screen = io.StringIO()
    return Bars(Console(file=screen, force_terminal=True, width=width, color_system=None)), screen


def last_frame(screen: io.StringIO) -> str:
    frame = screen.getvalue().split("\x1b[2K")[-1]
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame)


def test_without_a_terminal_a_stage_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(quiet=False) as watcher:
        watcher.stage("reading the model")
        watcher.stage("calibrating", 100)
        watcher.advance(8, "value x")
        watcher.note("kept float: TopK\n(opaque)")

    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "bitwright: reading the model",
        "bitwright: calibrating",
        "bitwright: note: kept float: TopK (opaque)",
    ]


def test_a_long_stage_says_now_and_then_how_long_it_will_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("bitwright.cli.watcher.time.monotonic", lambda: now[0])
    lines = Lines()
    lines.stage("measuring", 10)
    for _ in range(10):
        now[0] += 20
        lines.advance()

    assert capsys.readouterr().err.splitlines() == [
        "bitwright: measuring",
        "bitwright: measuring: 2 of 10, 2:40 min left",
        "bitwright: measuring: 4 of 10, 2:00 min left",
        "bitwright: measuring: 6 of 10, 1:20 min left",
        "bitwright: measuring: 8 of 10, 40 s left",
    ]


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(quiet=True) as watcher:
        watcher.stage("calibrating", 3)
        watcher.note("text")

    assert isinstance(watcher, Silence)
    assert capsys.readouterr() == ("", "")


def test_bars_keep_finished_stages_and_count_the_running_one() -> None:
    bars, screen = drawn()
    bars.stage("reading the model")
    bars.stage("calibrating", 40)
    bars.advance(10, "features.3")
    bars.close(failed=True)

    lines = last_frame(screen).splitlines()
    text = "\n".join(lines)
    assert "✓ reading the model" in screen.getvalue()
    assert "10/40" in text
    assert "features.3" in text


def test_a_stage_that_ends_early_is_finished() -> None:
    bars, screen = drawn()
    bars.stage("choosing", 40)
    bars.advance(1, "late detail")
    bars.close(failed=False)

    assert "✓ choosing" in last_frame(screen)
    assert "late detail" not in last_frame(screen)


def test_names_with_brackets_are_shown_as_they_are() -> None:
    bars, screen = drawn()
    bars.stage("calibrating", 4)
    bars.note("kept [bold]float[/bold] [/x]")
    bars.advance(1, "op[0] [/y]")
    bars.close(failed=True)

    assert "kept [bold]float[/bold] [/x]" in screen.getvalue()
    assert "op[0] [/y]" in last_frame(screen)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00 min"), (3599.6, "1:00 h"), (7385, "2:03 h")],
)
def test_durations_read_naturally(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


def end_early(folder: Path, error: BaseException, *, write: str = "", save_state: Path | None = None) -> None:
    """A job that makes *folder*, writes the file *write* into it, and ends with *error*."""
    with job(folder, quiet=True, save_state=save_state):
        folder.mkdir(parents=True, exist_ok=True)
        if write:
            (folder / write).write_text("{}")
        raise error


def test_a_failed_job_leaves_no_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"):
        end_early(tmp_path / "a" / "b", ValueError("broken"))

    assert list(tmp_path.iterdir()) == []


def test_a_failed_job_leaves_what_was_there_before_and_what_is_complete(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"):
        end_early(tmp_path, ValueError("broken"), write="done.json")

    assert [f.name for f in tmp_path.iterdir()] == ["done.json"]


def interrupted(folder: Path, *, write: str = "", save_state: Path | None = None) -> str:
    with pytest.raises(KeyboardInterrupt) as caught:
        end_early(folder, KeyboardInterrupt(), write=write, save_state=save_state)
    return str(caught.value)


def test_an_interrupted_job_says_where_its_measurements_are(tmp_path: Path) -> None:
    said = interrupted(tmp_path / "out", write="sensitivity_state.json")
    assert f"saved in {tmp_path / 'out' / 'sensitivity_state.json'}; run the same command again" in said


def test_an_interrupted_job_names_the_state_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    said = interrupted(tmp_path / "out", save_state=tmp_path / "mine.json")
    assert str(tmp_path / "mine.json") in said


def test_an_interrupted_job_names_the_files_that_are_complete(tmp_path: Path) -> None:
    assert "complete: net_qtable in" in interrupted(tmp_path / "out", write="net_qtable")


def test_an_interrupted_job_that_wrote_nothing_says_so(tmp_path: Path) -> None:
    assert interrupted(tmp_path / "out") == "Nothing was written."
    assert not (tmp_path / "out").exists()

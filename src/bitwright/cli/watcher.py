"""What a person sees while a job runs: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from bitwright.flow.progress import Silence, Watcher

#: Seconds between two lines of a stage where no bar can be drawn.
LINE_EVERY = 30.0


@contextmanager
def watching(*, quiet: bool) -> Iterator[Watcher]:
    """The watcher that suits standard error; its last stage ends with the block."""
    if quiet:
        yield Silence()
        return
    watcher = Bars(Console(stderr=True)) if sys.stderr.isatty() else Lines()
    try:
        yield watcher
    except BaseException:
        watcher.close(failed=True)
        raise
    watcher.close(failed=False)


class Bars:
    """One bar per stage."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            _Count(),
            TimeElapsedColumn(),
            _TimeLeft(),
            TextColumn(
                "{task.fields[detail]}",
                style="dim",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            refresh_per_second=4,
        )
        self._task: TaskID | None = None
        self._progress.start()

    def stage(self, title: str, total: int | None = None) -> None:
        self._finish()
        self._task = self._progress.add_task(title, total=total, detail="")

    def advance(self, steps: int = 1, detail: str = "") -> None:
        if self._task is not None:
            self._progress.update(self._task, advance=steps, detail=detail)

    def note(self, text: str) -> None:
        self._progress.console.print(f"bitwright: note: {text}", markup=False, highlight=False)

    def close(self, *, failed: bool) -> None:
        """End the last stage and give the terminal back."""
        if not failed:
            self._finish()
        self._progress.stop()

    def _finish(self) -> None:
        if self._task is None:
            return
        task = next(t for t in self._progress.tasks if t.id == self._task)
        # A stage may end early, or have had no known end: its bar is full all the same.
        end = task.completed or 1
        self._progress.update(self._task, total=end, completed=end, detail="")


class Lines:
    """A line when a stage begins, and now and then while it lasts."""

    def __init__(self) -> None:
        self._title, self._total, self._done = "", 0, 0
        self._began = self._spoke = time.monotonic()

    def stage(self, title: str, total: int | None = None) -> None:
        self._title, self._total, self._done = title, total or 0, 0
        self._began = self._spoke = time.monotonic()
        _say(title)

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._spoke >= LINE_EVERY and 0 < self._done < self._total:
            self._spoke = now
            left = (now - self._began) / self._done * (self._total - self._done)
            _say(f"{self._title}: {self._done} of {self._total}, {show_seconds(left)} left")

    def note(self, text: str) -> None:
        _say(f"note: {text}")

    def close(self, *, failed: bool) -> None:
        """Nothing to give back."""


def show_seconds(seconds: float) -> str:
    """A duration as `42 s`, `3:05 min` or `2:03 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def _say(text: str) -> None:
    print(f"bitwright: {' '.join(text.split())}", file=sys.stderr, flush=True)


class _Count(ProgressColumn):
    """`12/400`; nothing where the total is unknown."""

    def render(self, task: Task) -> Text:
        if task.total is None or task.finished:
            return Text()
        return Text(f"{task.completed:.0f}/{task.total:.0f}", style="dim")


class _TimeLeft(ProgressColumn):
    """`42 s left` while a stage with a known total runs."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.finished or task.total is None or task.time_remaining is None:
            return Text()
        return Text(f"{show_seconds(task.time_remaining)} left", style="cyan")

"""The frame around a verb's work: progress, and a tidy end when it is interrupted or fails."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bitwright.cli.watcher import watching
from bitwright.flow.progress import Watcher

#: Where searches keep what they measured, unless told otherwise: a file for each kind of search.
STATES = "*_state.json"


@contextmanager
def job(folder: Path, *, quiet: bool, save_state: Path | None = None) -> Iterator[Watcher]:
    """A watcher for a job that writes to *folder*.

    A job that ends early leaves no empty folders that were not there before. Ctrl-C becomes a
    `KeyboardInterrupt` whose message says what is kept and how to go on.
    """
    new = [f for f in (folder, *folder.parents) if not f.exists()]
    began = time.time()
    try:
        with watching(quiet=quiet) as watcher:
            yield watcher
    except KeyboardInterrupt as e:
        _tidy(new)
        raise KeyboardInterrupt(_kept(folder, save_state, began)) from e
    except BaseException:
        _tidy(new)
        raise


def _tidy(new: Sequence[Path]) -> None:
    for made in new:
        if made.is_dir() and not any(made.iterdir()):
            made.rmdir()


def _kept(folder: Path, save_state: Path | None, began: float) -> str:
    states = _written(folder, began, STATES) if save_state is None else [save_state]
    for state in states:
        if state.exists():
            return f"What was measured so far is saved in {state}; run the same command again to go on from there."
    files = [f.name for f in _written(folder, began, "*")]
    if files:
        return f"Written, each file complete: {', '.join(files)} in {folder}. Run the same command again for the rest."
    return "Nothing was written."


def _written(folder: Path, began: float, pattern: str) -> list[Path]:
    """The files of *folder* that are newer than *began* (seconds since the epoch; a file system may round to 2)."""
    if not folder.is_dir():
        return []
    return [f for f in sorted(folder.glob(pattern)) if f.is_file() and f.stat().st_mtime >= began - 2]

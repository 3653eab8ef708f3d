"""What a job tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Watcher(Protocol):
    """Receives the progress of a job. The command line draws bars; `Silence` ignores everything."""

    def stage(self, title: str, total: int | None = None) -> None:
        """A stage begins; *total* steps are expected, None if unknown."""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """The current stage has come *steps* further."""

    def note(self, text: str) -> None:
        """Something a person should know."""


def counting(watcher: Watcher) -> Callable[[int, int, str], None]:
    """A callback for who says how far it is (so many done, of so many, what), which tells *watcher* the steps in between."""
    told = 0

    def advance(done: int, total: int, detail: str) -> None:
        nonlocal told
        watcher.advance(done - told, detail)
        told = done

    return advance


class Silence:
    """A watcher that ignores everything."""

    def stage(self, title: str, total: int | None = None) -> None:
        """Ignored."""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""

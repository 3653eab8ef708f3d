"""What a job tells whoever watches it."""

from __future__ import annotations

from typing import Protocol


class Watcher(Protocol):
    """Receives the progress of a job. The command line draws bars; `Silence` ignores everything."""

    def stage(self, title: str, total: int | None = None) -> None:
        """A stage begins; *total* steps are expected, None if unknown."""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """The current stage has come *steps* further."""

    def note(self, text: str) -> None:
        """Something a person should know."""


class Silence:
    """A watcher that ignores everything."""

    def stage(self, title: str, total: int | None = None) -> None:
        """Ignored."""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""

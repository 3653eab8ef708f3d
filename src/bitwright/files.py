"""Writing results so that a file is either complete or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitwright.errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Write *text* as UTF-8. *raises* `OutputError`; an older file then stays as it was."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write *data* beside *path* and move it into place. *raises* `OutputError`; an older file then stays as it was."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _refused(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(data)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def remove(path: Path) -> bool:
    """Remove the file *path*. *returns* whether there was one. *raises* `OutputError`."""
    with _refused(path):
        found = path.is_file()
        path.unlink(missing_ok=True)
    return found


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(
            str(path),
            expected="a place that can be written to",
            found=e.strerror or type(e).__name__,
            remedy="Choose another --output folder, or make room.",
        ) from e

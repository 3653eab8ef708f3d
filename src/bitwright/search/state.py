"""Saved progress of a search: what was measured survives an interruption."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from bitwright.errors import PlanError
from bitwright.files import write_text
from bitwright.graph.graph import Graph
from bitwright.version import __version__

_SAVE_EVERY_S = 10.0


def search_key(graph: Graph, samples: Iterable[Mapping[str, Tensor]], settings: Mapping[str, Any]) -> str:
    """A hash of everything a measurement depends on: operators, weights, outputs, data, settings, version."""
    digest = hashlib.sha256()
    asked = [__version__, settings, list(graph.info.outputs)]
    digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
    for op in graph.ops:
        digest.update(f"{op.name} {op.kind} {op.describe()} {graph.op_inputs(op.name)}".encode())
    for value in graph.values.values():
        if value.is_constant:
            digest.update(graph.constant(value.name).detach().cpu().contiguous().numpy().tobytes())
    for chunk in samples:
        digest.update(batch_digest(chunk))
    return digest.hexdigest()


def batch_digest(batch: Mapping[str, Tensor]) -> bytes:
    """A hash of the tensors of *batch*, shapes included: measurements are kept by the number of their chunk."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(f"{name} {tuple(batch[name].shape)}".encode())
        digest.update(batch[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()


class SearchState:
    """Measurements by name, kept in memory and, if *path* is given, in a JSON file that a later run resumes from.

    A `with` block saves them however it ends (an error, Ctrl-C).
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.measured: dict[str, Any] = {}
        self.resumed = 0
        self._saved_at = time.monotonic()
        if path is not None and path.exists():
            self._load(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()

    def _load(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            same, measured = data["key"] == self.key, dict(data["measured"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise PlanError(
                str(path),
                expected="a search state written by bitwright",
                found=f"{type(e).__name__}: {e}",
                remedy="Delete the file to start anew.",
            ) from e
        if not same:
            raise PlanError(
                str(path),
                expected="the state of this very search",
                found="one of another model, data set, setting or version",
                remedy="Delete the file, or give another --save-state.",
            )
        self.measured, self.resumed = measured, len(measured)

    def __contains__(self, name: str) -> bool:
        return name in self.measured

    def get(self, name: str) -> Any:
        """The measurement called *name*, None if there is none yet."""
        return self.measured.get(name)

    def put(self, name: str, result: Any) -> None:
        """Remember a measurement; written to disk every few seconds."""
        self.measured[name] = result
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all; none for a search that failed before its first measurement."""
        self._saved_at = time.monotonic()
        if self.path is None or not self.measured:
            return
        write_text(self.path, json.dumps({"key": self.key, "measured": self.measured}))

    def discard(self) -> None:
        """Delete the file: the search has ended."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

"""A sketch on disk: what was measured survives an interruption, and serves the next search on the same network and data."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitwright.files import write_bytes
from bitwright.numerics.spec import QParams

#: Another number wherever a local error is measured in another way: sketches of different kinds do not mix.
FORMAT = 2


class Unit(NamedTuple):
    """One read: *reader* sees *value* under *qparams* (None: unquantized, which matters beside a quantized base)."""

    value: str
    reader: str
    qparams: QParams | None


@dataclass
class Pass:
    """One pass over the images, chunk by chunk. *c*: `[units, rows, n]`; *reached*: whether a gradient came to a unit, `[units]`; *blind*:
    whether it has an error of which `c` says nothing, `[units]`; *losses*: `[n]`; all float64 or bool.
    """

    c: list[Tensor] = field(default_factory=list)
    reached: list[Tensor] = field(default_factory=list)
    blind: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Images in the chunks so far."""
        return sum(x.shape[0] for x in self.losses)


class SketchFile:
    """Passes over the images by the units they measured, kept in the `.npz` file *path*.

    *key*: a hash of everything that a sketch depends on besides its units; a file with another key is left out of account and
    replaced. A file that cannot be read is, too: it holds nothing but time.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        #: (units, pass, whether it went over all images), in the order they were measured.
        self.passes: list[tuple[tuple[Unit, ...], Pass, bool]] = []
        if path.exists():
            self._load()

    def begun(self, units: Sequence[Unit]) -> Pass | None:
        """The pass that was interrupted while it measured exactly these *units*."""
        wanted = tuple(units)
        return next((p for u, p, whole in self.passes if not whole and u == wanted), None)

    def whole(self) -> list[tuple[tuple[Unit, ...], Pass]]:
        """The passes over all images."""
        return [(u, p) for u, p, whole in self.passes if whole]

    def put(self, units: Sequence[Unit], found: Pass, *, whole: bool) -> None:
        """Remember a pass and write the file. *raises* `OutputError`."""
        kept = [entry for entry in self.passes if entry[2]]
        self.passes = [*kept, (tuple(units), found, whole)]
        arrays: dict[str, Any] = {}
        for i, (_, p, _) in enumerate(self.passes):
            for name, chunks in vars(p).items():
                arrays |= {f"{i}/{name}/{j}": chunk.numpy() for j, chunk in enumerate(chunks)}
        listed = [
            {"units": [_unit_json(u) for u in units], "whole": whole, "chunks": len(p.losses)}
            for units, p, whole in self.passes
        ]
        buffer = io.BytesIO()
        np.savez_compressed(buffer, head=json.dumps({"key": self.key, "passes": listed}), **arrays)
        write_bytes(self.path, buffer.getvalue())

    def _load(self) -> None:
        try:
            with np.load(self.path, allow_pickle=False) as held:
                head = json.loads(str(held["head"]))
                if head["key"] != self.key:
                    return
                for i, entry in enumerate(head["passes"]):
                    chunks = range(entry["chunks"])
                    names = [f.name for f in fields(Pass)]
                    p = Pass(*([torch.from_numpy(held[f"{i}/{n}/{j}"]) for j in chunks] for n in names))
                    units = tuple(_unit(u) for u in entry["units"])
                    self.passes.append((units, p, bool(entry["whole"])))
        except Exception:  # flipped bytes end in errors of zip, zlib, JSON, the array header's parser, ...
            self.passes = []


def _unit_json(unit: Unit) -> list[Any]:
    return [unit.value, unit.reader, None if unit.qparams is None else unit.qparams.to_json()]


def _unit(data: list[Any]) -> Unit:
    value, reader, q = data
    return Unit(value, reader, None if q is None else QParams.from_json(q))

"""`job.json`: which model, data and flags the files of a folder were made from, so that `verify` finds them again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bitwright.cli.options import DataFlags
from bitwright.errors import DataError
from bitwright.flow.outputs import write_json

NAME = "job.json"


@dataclass(frozen=True)
class Record:
    """*model*, *target*: as the flags take them; paths are absolute."""

    model: str
    target: str
    data: DataFlags

    def save(self, folder: Path) -> None:
        """Write `job.json`. *raises* `OutputError`."""
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.data).items()}
        write_json(folder / NAME, {"model": self.model, "target": self.target, "data": flags})

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read `job.json`. *raises* `DataError` if there is none that can be read."""
        path = folder / NAME
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(found["model"]), str(found["target"]), _data(found["data"]))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(
                str(path),
                expected="the record that bitwright quantize and tune leave beside their files",
                found=f"{type(e).__name__}: {e}",
                remedy="Name the folder that they wrote, or write it again.",
            ) from e


def record_of(model: str, target: str, data: DataFlags) -> Record:
    """The record of a job; paths are made absolute."""
    places = {
        f.name: _absolute(str(getattr(data, f.name)))
        for f in fields(data)
        if f.name in ("data", "labels", "calibration_data") and getattr(data, f.name) is not None
    }
    return Record(_absolute(model), _absolute(target), replace(data, **_typed(places)))


def _data(found: dict[str, Any]) -> DataFlags:
    return DataFlags(**_typed(found))


def _typed(flags: dict[str, Any]) -> dict[str, Any]:
    """*flags*, with the file of labels a path again."""
    labels = flags.get("labels")
    return {**flags, "labels": Path(labels)} if labels is not None else flags


def _absolute(place: str) -> str:
    """*place* with the path in it absolute: a file or folder, or the file before `:function`."""
    file, colon, function = place.rpartition(":")
    if Path(place).exists():
        return str(Path(place).resolve())
    return f"{Path(file).resolve()}{colon}{function}" if file and Path(file).exists() else place

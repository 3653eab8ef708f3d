"""`job.json`: which model, data and flags the files of a folder were made from, so that `verify` finds them again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.cli.options import DataFlags, QuantizeFlags
from bitwright.errors import DataError
from bitwright.flow.exports import RECORD
from bitwright.flow.outputs import write_json
from bitwright.flow.settings import Export
from bitwright.plan.target import is_target_file

#: Flags that may name files or folders.
_PLACES = ("data", "labels", "calibration_data")


@dataclass(frozen=True)
class Record:
    """The flags of a job; paths are absolute."""

    model: str
    quantize: QuantizeFlags
    data: DataFlags
    export: Export

    def save(self, folder: Path) -> None:
        """Write `job.json`. *raises* `OutputError`."""
        data = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.data).items()}
        found = {"model": self.model, "quantize": asdict(self.quantize), "data": data, "export": self.export}
        write_json(folder / RECORD, found)

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read `job.json`. *raises* `DataError` if there is none that can be read."""
        path = folder / RECORD
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            data = DataFlags(**_typed(found["data"]))
            return cls(str(found["model"]), QuantizeFlags(**found["quantize"]), data, found["export"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(
                str(path),
                expected="the record that bitwright quantize and tune leave beside their files",
                found=(isinstance(e, OSError) and e.strerror) or f"{type(e).__name__}: {e}",
                remedy="Name the folder that they wrote, or write it again.",
            ) from e


def record_of(model: str, quantize: QuantizeFlags, data: DataFlags, export: Export) -> Record:
    """The record of a job."""
    target = str(Path(quantize.target).resolve()) if is_target_file(quantize.target) else quantize.target
    given = {name: getattr(data, name) for name in _PLACES}
    places = {name: _absolute(str(place)) for name, place in given.items() if place is not None}
    return Record(_absolute(model), replace(quantize, target=target), replace(data, **_typed(places)), export)


def _typed(flags: dict[str, Any]) -> dict[str, Any]:
    """*flags*, with the file of labels a path."""
    labels = flags.get("labels")
    return {**flags, "labels": Path(labels)} if labels is not None else flags


def _absolute(place: str) -> str:
    """*place* with the path in it absolute: a file or folder, or the Python file before `:function`."""
    file, colon, function = place.rpartition(":")
    if Path(place).exists():
        return str(Path(place).resolve())
    return f"{Path(file).resolve()}{colon}{function}" if file.endswith(".py") else place

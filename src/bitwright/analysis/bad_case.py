"""The inputs on which two models differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.analysis.metrics import Metric
from bitwright.errors import DataError
from bitwright.files import write_text
from bitwright.table import Column, Table


@dataclass(frozen=True)
class Worst:
    """Where an output is worst by a metric: number of the input, and the metric there."""

    index: int
    value: float


class BadCases:
    """The worst input of every output by every metric. Only inputs that are the worst of something are kept.

    *inputs*: number -> the input, on the CPU. *chosen*: number of the input that is analysed.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = tuple(metrics)
        self.worst: dict[str, dict[str, Worst]] = {}
        self.inputs: dict[int, Any] = {}

    def add(self, index: int, data: Any, outputs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Input number *index* made *outputs*: name -> tensors of the two models."""
        leads = False
        for name, (a, b) in outputs.items():
            row = self.worst.setdefault(name, {})
            for metric in self.metrics:
                value = float(metric.measure(a, b))
                old = row.get(metric.name)
                if old is None or metric.badness(value) > metric.badness(old.value):
                    row[metric.name], leads = Worst(index, value), True
        if leads:
            self.inputs[index] = on_device(data, torch.device("cpu"), copy=True)
            needed = {worst.index for row in self.worst.values() for worst in row.values()}
            self.inputs = {i: kept for i, kept in self.inputs.items() if i in needed}

    def of(self, metric: Metric) -> Worst:
        """The worst of all outputs by *metric*."""
        return max((row[metric.name] for row in self.worst.values()), key=lambda w: metric.badness(w.value))

    def tables(self) -> list[Table]:
        """The three tables of `badcase.txt`."""
        columns = (Column("name", "Name/Index"), *(Column(m.name, m.name, digits=7) for m in self.metrics))
        indices = [{"name": o, **{k: w.index for k, w in row.items()}} for o, row in self.worst.items()]
        values = [{"name": o, **{k: w.value for k, w in row.items()}} for o, row in self.worst.items()]
        overall = [{"metric": m.name, "index": self.of(m).index} for m in self.metrics]
        return [
            Table("The bad case input index of each output:", columns, tuple(indices)),
            Table("The metric results of each badcase:", columns, tuple(values)),
            Table(
                "The bad case input index of the worst output:",
                (Column("metric", "metric"), Column("index", "dataloader index")),
                tuple(overall),
            ),
        ]

    def write(self, path: Path) -> None:
        """Write `badcase.txt`."""
        write_text(path, "\n\n".join(map(str, self.tables())) + "\n")


def on_device(data: Any, device: torch.device, *, copy: bool = False) -> Any:
    """*data* with every tensor in it on *device*. *copy*: nothing is shared with *data*."""
    if isinstance(data, Tensor):
        moved = data.detach().to(device)
        return moved.clone() if copy and moved.data_ptr() == data.data_ptr() else moved
    if isinstance(data, Mapping):
        return {key: on_device(part, device, copy=copy) for key, part in data.items()}
    if isinstance(data, (tuple, list)):
        return tuple(on_device(part, device, copy=copy) for part in data)
    return data


def save_inputs(path: Path, inputs: Mapping[int, Any], chosen: int) -> None:
    """Write the inputs by number, and which of them is analysed. *raises* `DataError` for what cannot be saved."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"inputs": dict(inputs), "chosen": chosen}, path)
    except (OSError, RuntimeError) as e:
        raise _unusable(path, str(e).splitlines()[0]) from e


def load_inputs(path: Path) -> tuple[dict[int, Any], int]:
    """Inverse of `save_inputs`. *raises* `DataError`."""
    try:
        saved = torch.load(path, weights_only=True)
        inputs, chosen = saved["inputs"], saved["chosen"]
        inputs[chosen]
    except Exception as e:  # torch raises what the file's bytes happen to lead to
        raise _unusable(path, f"{type(e).__name__}: {e}".splitlines()[0][:200]) from e
    return inputs, chosen


def _unusable(path: Path, found: str) -> DataError:
    return DataError(
        str(path),
        expected="a bad case that save_bad_case() writes: tensors, in tuples and dictionaries",
        found=found,
        remedy="Find one with auto_find_bad_case(), or give it to set_bad_case().",
    )

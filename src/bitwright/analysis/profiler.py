"""`ModelProfiler`: what goes into and comes out of every module of a network while it runs."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitwright.analysis.outputs import named_tensors
from bitwright.errors import ModelError
from bitwright.files import write_text
from bitwright.graph.op import Op
from bitwright.table import Column, Table
from bitwright.train.biases import BiasRounding
from bitwright.train.fake_quants import QUANTIZER_NAMES, Quantizer

_COLUMNS = tuple(
    Column(key, key, digits=digits)
    for key, digits in (
        ("Index", 0), ("Op Name", 0), ("Mod Name", 0), ("Attr", 0), ("Dtype", 0), ("Scale", 8), ("Min", 6), ("Max", 6),
        ("Mean", 6), ("Var", 6), ("Shape", 0),
    )
)  # fmt: skip


@dataclass
class _Seen:
    """Extremes and moments of the tensors at one place, over all calls; sums in float64. One NaN makes all of them NaN."""

    shape: tuple[int, ...]
    dtype: str
    low: float = math.inf
    high: float = -math.inf
    total: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, x: Tensor) -> None:
        if not x.numel():
            return
        values = x.detach().double()
        # NumPy's extremes hand NaN on; Python's depend on the order of their arguments.
        self.low = float(np.minimum(self.low, float(values.min())))
        self.high = float(np.maximum(self.high, float(values.max())))
        self.total += float(values.sum())
        self.squares += float((values**2).sum())
        self.count += values.numel()

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def variance(self) -> float:
        return float(np.maximum(0.0, self.squares / self.count - self.mean**2))


class ModelProfiler:
    """`with ModelProfiler(model, out_dir) as p: model(x)`, then `p.get_info_manager.table()`.

    Statistics of inputs and outputs of every operator, or module without modules of its own, over all calls inside the
    `with`, and of its weights and biases at the first; never the values. In a prepared model the scale is that of the
    value's quantizer. *out_dir*: gets the table as files; None: nothing is written. *raises* `ModelError` for what is
    no module.
    """

    def __init__(self, model: nn.Module, out_dir: str | Path | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(
                "ModelProfiler",
                expected="an nn.Module",
                found=type(model).__name__,
                remedy="Give the model itself.",
            )
        self.model = model
        self.out_dir = out_dir
        self._handles: list[RemovableHandle] = []
        self._seen: dict[tuple[str, str], _Seen] = {}

    def __enter__(self) -> Self:
        for path, module in self.model.named_modules():
            is_leaf = isinstance(module, Op) or not any(True for _ in module.children())
            if path and is_leaf and not isinstance(module, (Quantizer, BiasRounding)):
                self._handles.append(module.register_forward_hook(self._hook(path), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            for attribute, tensors in (("input", (*args, *kwargs.values())), ("output", output)):
                for name, x in named_tensors(tensors).items():
                    suffix = "" if name == "0" else f" {name}"
                    self._add(path, f"{attribute}{suffix}", x)
            for name, parameter in module.named_parameters(recurse=False):
                if (path, name) not in self._seen:
                    self._add(path, name, parameter)

        return hook

    def _add(self, path: str, attribute: str, x: Tensor) -> None:
        key = (path, attribute)
        if key not in self._seen:
            self._seen[key] = _Seen(tuple(x.shape), str(x.dtype).removeprefix("torch."))
        self._seen[key].add(x)

    @property
    def get_info_manager(self) -> InfoManager:
        """What was seen."""
        return InfoManager(self)


@dataclass(frozen=True)
class InfoManager:
    """What a `ModelProfiler` saw. Calling it gives itself: some scripts write `get_info_manager()`."""

    profiler: ModelProfiler

    def __call__(self) -> InfoManager:
        return self

    def table(
        self,
        out_dir: str | Path | None = None,
        prefixes: Collection[str] | None = None,
        types: Collection[str] | None = None,
    ) -> Table:
        """One row for each tensor of each module, in the order of first execution.

        *out_dir*: gets it as `statistic.txt` and `.csv` (None: the profiler's folder, if it has one). *prefixes*: of
        module names. *types*: names of classes or kinds. *raises* `ModelError` if nothing ran, `OutputError`.
        """
        if not self.profiler._seen:
            raise ModelError(
                "ModelProfiler",
                expected="a model that ran inside the with statement",
                found="no call",
                remedy="Call the model inside: with ModelProfiler(model) as p: model(x).",
            )
        rows: list[dict[str, Any]] = []
        for (path, attribute), seen in self.profiler._seen.items():
            kind = str(self.profiler.model.get_submodule(path)._get_name())  # type: ignore[no-untyped-call]
            if (prefixes and not path.startswith(tuple(prefixes))) or (types and kind not in types):
                continue
            rows.append(self._row(len(rows), path, kind, attribute, seen))
        table = Table("Statistics of every module", _COLUMNS, tuple(rows))
        folder = self.profiler.out_dir if out_dir is None else out_dir
        if folder is not None:
            write_text(Path(folder) / "statistic.txt", f"{table}\n")
            write_text(Path(folder) / "statistic.csv", table.to_csv())
        return table

    def _row(self, index: int, path: str, kind: str, attribute: str, seen: _Seen) -> dict[str, Any]:
        known = seen.count > 0
        return {
            "Index": index,
            "Op Name": kind,
            "Mod Name": path,
            "Attr": attribute,
            "Dtype": seen.dtype,
            "Scale": self._scale(path, attribute),
            "Min": seen.low if known else None,
            "Max": seen.high if known else None,
            "Mean": seen.mean if known else None,
            "Var": seen.variance if known else None,
            "Shape": "×".join(map(str, seen.shape)),
        }

    def _scale(self, path: str, attribute: str) -> float | None:
        """The scale of an output's quantizer, if it has one for all."""
        module = self.profiler.model.get_submodule(path)
        quantizer = getattr(module, QUANTIZER_NAMES["activation"], None)
        if attribute != "output" or not isinstance(quantizer, Quantizer) or not quantizer.has_range:
            return None
        scale = quantizer.qparams().scale
        return scale[0] if len(scale) == 1 else None

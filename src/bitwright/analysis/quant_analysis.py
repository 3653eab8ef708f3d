"""`QuantAnalysis`: where two states of a network part, from the worst input down to single quantizers or tables."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from bitwright.analysis.advice import advise
from bitwright.analysis.bad_case import BadCases, load_inputs, on_device, save_inputs
from bitwright.analysis.layers import LayerStatistics, compare_layers, layer_table
from bitwright.analysis.metrics import METRICS, Metric
from bitwright.analysis.outputs import file_parts, paired
from bitwright.analysis.sensitivity import Effects, measure_effects
from bitwright.analysis.trace import call, undisturbed
from bitwright.errors import DataError, UnknownName
from bitwright.files import write_bytes, write_text
from bitwright.graph.device import device_of, usable_device
from bitwright.search.jobs import Progress
from bitwright.table import Table
from bitwright.train.prepared import PreparedModel, prepared_in

#: Kinds of analysed models.
MODEL_TYPES = ("fake_quant",)
ORDERS = ("ascending", "descending")
_SAVED = "badcase.pt"

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class QuantAnalysis:
    """Compares *analysis_model*, which `prepare` returned, with *baseline_model*: float, or another state of it.

    Where the analysed model has tables in use (`convert_segment_lut`), `sensitivity` ranks tables, otherwise
    quantizers. *analysis_model_type*: `fake_quant`. *device_ids*: number of a CUDA device, or a list of which the first
    counts; None: the models stay where they are. *post_process*: applied to what both models return before it is
    compared. *out_dir*: gets the files (`quant_analysis` unless given). *progress*: told steps done, steps in all (0:
    unknown), and a detail.

    Call `auto_find_bad_case` (or `set_bad_case`, `load_bad_case`), then `run` and `compare_per_layer`, or
    `sensitivity`. Models are evaluated in evaluation mode without gradients, and left as they were. *raises*
    `ModelError` for an analysed model that is not prepared or a device that is absent, `UnknownName`.
    """

    def __init__(
        self,
        baseline_model: nn.Module,
        analysis_model: nn.Module,
        analysis_model_type: str = "fake_quant",
        device_ids: int | list[int] | None = None,
        post_process: Callable[[Any], Any] | None = None,
        out_dir: str | Path | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        if analysis_model_type not in MODEL_TYPES:
            raise UnknownName(
                "analysis_model_type", kind="type of model", name=str(analysis_model_type), known=MODEL_TYPES
            )
        self._models = (baseline_model, prepared_in(analysis_model))
        self._device = _device_of(device_ids)
        self._post_process = post_process or (lambda output: output)
        self.out_dir = Path("quant_analysis" if out_dir is None else out_dir)
        self._progress = progress or (lambda done, total, detail: None)
        self._inputs: dict[int, Any] = {}
        self._chosen: int | None = None
        self._layers: list[LayerStatistics] | None = None

    # --- the bad case ----------------------------------------------------------------------------------------

    def auto_find_bad_case(
        self,
        data_generator: Iterable[Any],
        num_steps: int | None = None,
        metric: str = "L1",
        device: str | torch.device | None = None,
        custom_metric_func: Callable[[Tensor, Tensor], float] | None = None,
        custom_metric_order_seq: Literal["ascending", "descending"] | None = None,
    ) -> list[Table]:
        """Run both models on *data_generator* (its first *num_steps* items) and keep the worst item by *metric*.

        An item is what the model is called with: a tensor, a tuple, or a mapping from argument names. *metric*: L1,
        MSE, Cosine, SQNR, KL, or `custom`: *custom_metric_func* (baseline's tensor, analysed tensor), whose worst
        values come first in the order *custom_metric_order_seq*. Writes `badcase.txt`, and the inputs (`badcase.pt`).
        *returns*: the tables of that file. *raises* `DataError` if there is no item, `UnknownName` for the metric.
        """
        by, metrics = _metrics(metric, custom_metric_func, custom_metric_order_seq)
        cases = BadCases(metrics)
        total = len(data_generator) if isinstance(data_generator, Sized) else 0
        total = min(total or num_steps or 0, num_steps or total)
        with self._ready(device) as (baseline, analysed, place):
            for step, item in enumerate(_first(data_generator, num_steps)):
                data = on_device(item, place)
                cases.add(step, data, self._outputs(call(baseline, data), call(analysed, data)))
                self._progress(step + 1, total, "looking for the worst input")
        if not cases.worst:
            raise DataError(
                "auto_find_bad_case",
                expected="data to run both models on",
                found="an empty data generator" if num_steps != 0 else "num_steps=0",
                remedy="Give a generator that yields what the model is called with; a used-up one yields nothing.",
            )
        self._take(cases.inputs, cases.of(by).index)
        cases.write(self.out_dir / "badcase.txt")
        self.save_bad_case()
        return cases.tables()

    def set_bad_case(self, data: Any) -> None:
        """Analyse *data*, one input of the model. If the models hardly differ on it, sensitivities mean little."""
        self._take({0: on_device(data, torch.device("cpu"), copy=True)}, 0)

    def save_bad_case(self) -> None:
        """Write the bad cases to `badcase.pt`. *raises* `DataError` if there is none."""
        self._case()
        assert self._chosen is not None
        save_inputs(self.out_dir / _SAVED, self._inputs, self._chosen)

    def load_bad_case(self, filename: str | Path | None = None) -> None:
        """Read what `save_bad_case` wrote, from *filename* in the output folder (or any path). *raises* `DataError`."""
        self._take(*load_inputs(self.out_dir / (filename or _SAVED)))

    # --- analyses --------------------------------------------------------------------------------------------

    def run(self, device: str | torch.device | None = None, index: int | None = None) -> None:
        """Run both models on the bad case, layer by layer. *index*: another item listed in `badcase.txt`.

        Writes `abnormal_layer_advisor.txt`. *raises* `DataError` without a bad case, `UnknownName` for another *index*,
        `ModelError` if the models share no layer.
        """
        data = self._case(index)
        with self._ready(device) as (baseline, analysed, place):
            self._layers = compare_layers(baseline, analysed, on_device(data, place))
        self._chosen = self._chosen if index is None else index
        write_text(self.out_dir / "abnormal_layer_advisor.txt", f"{advise(self._layers)}\n")

    def compare_per_layer(
        self, prefixes: Collection[str] | None = None, types: Collection[str | type] | None = None
    ) -> Table:
        """What `run` saw, layer by layer: `compare_per_layer_out.txt` and `.csv`. *returns*: the table.

        *prefixes*: only layers whose names begin so. *types*: only operators of these kinds. *raises* `DataError`
        before `run`.
        """
        if self._layers is None:
            raise DataError(
                "compare_per_layer", expected="a run of both models", found="none", remedy="Call run() first."
            )
        kinds = [t if isinstance(t, str) else t.__name__ for t in _several(types)]
        table = layer_table(self._layers, [str(p) for p in _several(prefixes)], kinds)
        write_text(self.out_dir / "compare_per_layer_out.txt", f"{table}\n")
        write_text(self.out_dir / "compare_per_layer_out.csv", table.to_csv())
        return table

    def sensitivity(
        self, device: str | torch.device | None = None, metric: str = "L1", reserve: bool = False
    ) -> dict[str, Table]:
        """What each table in use (else: each quantizer) does alone to each output on the bad case, the worst first.

        *reserve*: least sensitive first. Writes `output_<name>_<metric>_sensitive_ops.txt` and `.pt`, a list of lists
        with the same columns. *returns*: output name -> table. *raises* `DataError` without a bad case, `ModelError`,
        `UnknownName`.
        """
        by = METRICS.get(metric, where="sensitivity")
        data = self._case()
        with self._ready(device) as (baseline, analysed, place):
            data = on_device(data, place)
            reference = call(baseline, data)
            effects = measure_effects(
                analysed, data, lambda output: self._outputs(reference, output), by, self._progress
            )
        tables = {name: effects.table(name, reserve=reserve) for name in effects.outputs}
        parts = file_parts(tables)
        for name, table in tables.items():
            self._write_sensitivity(f"output_{parts[name]}_{by.name}_sensitive_ops", table, effects)
        return tables

    def clean(self) -> None:
        """Forget the bad cases and what `run` saw, and delete `badcase.pt`; the reports stay."""
        self._inputs, self._chosen, self._layers = {}, None, None
        (self.out_dir / _SAVED).unlink(missing_ok=True)

    # --- what they share -------------------------------------------------------------------------------------

    def _outputs(self, baseline: Any, analysed: Any) -> dict[str, tuple[Tensor, Tensor]]:
        return paired(self._post_process(baseline), self._post_process(analysed))

    def _take(self, inputs: dict[int, Any], chosen: int) -> None:
        self._inputs, self._chosen, self._layers = inputs, chosen, None

    def _case(self, index: int | None = None) -> Any:
        if self._chosen is None:
            raise DataError(
                "QuantAnalysis",
                expected="a bad case to look at",
                found="none",
                remedy="Call auto_find_bad_case(data), set_bad_case(input) or load_bad_case() first.",
            )
        wanted = self._chosen if index is None else index
        if wanted not in self._inputs:
            raise UnknownName("run", kind="bad case", name=str(wanted), known=map(str, self._inputs))
        return self._inputs[wanted]

    @contextmanager
    def _ready(
        self, device: str | torch.device | None
    ) -> Iterator[tuple[nn.Module, PreparedModel, torch.device]]:
        """Both models on one device, which follows them, in evaluation mode; copies only if they are elsewhere."""
        baseline, analysed = self._models
        asked = self._device if device is None else str(device)
        place = device_of(analysed) if asked is None else usable_device(asked, "QuantAnalysis")
        baseline, analysed = _moved(baseline, place), _moved(analysed, place)
        with undisturbed(baseline, analysed):
            yield baseline, analysed, place

    def _write_sensitivity(self, stem: str, table: Table, effects: Effects) -> None:
        write_text(self.out_dir / f"{stem}.txt", f"{table}\n")
        buffer = io.BytesIO()
        torch.save(effects.as_lists(table), buffer)
        write_bytes(self.out_dir / f"{stem}.pt", buffer.getvalue())


def _moved(model: M, place: torch.device) -> M:
    return model if device_of(model) == place else copy.deepcopy(model).to(place)


def _device_of(device_ids: int | list[int] | None) -> str | None:
    ids = [device_ids] if isinstance(device_ids, int) else (device_ids or [])
    if not ids:
        return None
    usable_device(f"cuda:{ids[0]}", "device_ids")
    return f"cuda:{ids[0]}"


def _several(given: Collection[T] | None) -> Collection[T]:
    """One string counts as one item."""
    return [given] if isinstance(given, (str, type)) else (given or [])  # type: ignore[list-item]


def _first(items: Iterable[Any], count: int | None) -> Iterator[Any]:
    """The first *count* items; a generator is not asked for one more."""
    if count is not None and count <= 0:
        return
    for step, item in enumerate(items, 1):
        yield item
        if step == count:
            return


def _metrics(
    name: str, custom: Callable[[Tensor, Tensor], float] | None, order: str | None
) -> tuple[Metric, list[Metric]]:
    """The metric called *name*, and all that are measured."""
    known = [METRICS.get(each, where="auto_find_bad_case") for each in METRICS]
    if name != "custom":
        return METRICS.get(name, where="auto_find_bad_case"), known
    if custom is None or order not in ORDERS:
        raise DataError(
            "auto_find_bad_case(metric='custom')",
            expected="custom_metric_func, and custom_metric_order_seq: 'ascending' or 'descending'",
            found=f"{custom!r} and {order!r}",
            remedy="Say 'descending' if large values are the worst.",
        )
    chosen = Metric("custom", custom, order == "descending")
    return chosen, [*known, chosen]

"""`Bench`: a model made ready, its data, its statistics: what every job starts from. `Subject`: the same before calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibrate.collect import collect
from bitwright.calibrate.observers import parse_method
from bitwright.calibrate.solve import Solver
from bitwright.calibrate.statistics import Statistics
from bitwright.data import Dataset, InputInfo, RawOptions, open_data, parse_dtype
from bitwright.errors import DataError, ModelError, PlanError
from bitwright.exporters.onnx_float import check_exportable
from bitwright.flow.model_source import import_model
from bitwright.flow.progress import Watcher
from bitwright.flow.settings import Settings
from bitwright.graph.device import usable_device
from bitwright.graph.graph import Graph
from bitwright.importers.from_onnx import load_onnx
from bitwright.importers.from_torch import capture
from bitwright.plan.assign import assign
from bitwright.plan.plan import Plan
from bitwright.plan.target import Target, load_target
from bitwright.rewrite.decompose_attention import decompose_attention
from bitwright.rewrite.decompose_composites import decompose_composites
from bitwright.rewrite.fold_batchnorm import fold_batchnorm
from bitwright.search.evaluator import Evaluator
from bitwright.search.losses import LOSSES, Loss, UserLoss
from bitwright.search.similarity import Similarity
from bitwright.search.state import batch_digest

#: Samples in one batch of the calibration pass and of accuracy runs.
BATCH = 8


@dataclass(frozen=True)
class Subject:
    """A prepared graph with its data, target and all-quantized plan."""

    name: str
    graph: Graph
    target: Target
    dataset: Dataset
    plan: Plan


@dataclass(frozen=True)
class Bench(Subject):
    """A subject that was calibrated: its plan is solved."""

    statistics: Statistics
    solver: Solver
    evaluator: Evaluator
    #: Of the calibration data; what was measured with thresholds from other data is not resumed from.
    calibration_digest: str
    calibration_samples: int
    inference_samples: int


def read_model(
    model: str | Path | nn.Module | Graph,
    example_inputs: Any = None,
    *,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[str, Graph]:
    """A name for files, and the captured graph.

    *model*: an ONNX file, `file.py:function` or `module:function` that returns a module (and example inputs), an
    `nn.Module` (then *example_inputs* are needed), or a graph. *input_shapes*: as for `load_onnx`, ONNX files only.
    """
    text = str(model) if isinstance(model, (str, Path)) else ""
    is_code = text.rpartition(":")[2].isidentifier() and bool(text.rpartition(":")[0])
    if input_shapes and (is_code or not text):
        raise ModelError(
            "input shapes (--input-shape)",
            expected="an ONNX file, which may leave shapes open",
            found=text or type(model).__name__,
            remedy="A torch model takes the shapes of its example inputs.",
        )
    if isinstance(model, Graph):
        return "model", model
    if isinstance(model, nn.Module):
        if example_inputs is None:
            raise ModelError(
                type(model).__name__,
                expected="example inputs",
                found="none",
                remedy="Pass example_inputs=, one batch the model accepts.",
            )
        return type(model).__name__.lower(), capture(model, example_inputs)
    if is_code:
        name, module, inputs = import_model(text)
        return name, capture(module, inputs)
    return Path(text).stem, load_onnx(Path(text), input_shapes=input_shapes)


def prepared(graph: Graph, *, tables: bool = False) -> Graph:
    """The graph as it will be quantized: attention spelled out, batch-norm folded, everything exportable.

    *tables*: and composite operators taken apart, down to what is computed in integers or looked up.
    """
    spelled_out = decompose_attention(graph)
    ready = fold_batchnorm(decompose_composites(spelled_out) if tables else spelled_out).eval()
    check_exportable(ready)
    return ready


def open_subject(
    model: str | Path | nn.Module | Graph,
    data: object,
    settings: Settings,
    watcher: Watcher,
    *,
    example_inputs: Any = None,
) -> Subject:
    """Read and prepare. *raises* the errors of each stage, cheap checks first."""
    target = load_target(settings.target)
    for method in (settings.method, *settings.methods):
        parse_method(method)
    device = usable_device(settings.device)
    watcher.stage("reading the model")
    name, captured = read_model(model, example_inputs, input_shapes=settings.input_shapes)
    graph = prepared(captured, tables=settings.tables or target.tables).to(device)
    plan = assign(graph, target, method=settings.method)
    _check_float32(graph, plan)
    if captured.info.opaque:
        watcher.note(f"kept float, no operator of ours: {', '.join(captured.info.opaque)}")
    return Subject(name, graph, target, open_dataset(graph, data, settings), plan)


def open_bench(
    model: str | Path | nn.Module | Graph,
    data: object,
    settings: Settings,
    watcher: Watcher,
    *,
    example_inputs: Any = None,
) -> Bench:
    """Read, prepare, calibrate and solve. *raises* the errors of each stage, cheap checks first."""
    subject = open_subject(model, data, settings, watcher, example_inputs=example_inputs)
    graph, dataset = subject.graph, subject.dataset
    device, source = usable_device(settings.device), dataset
    if settings.calibration_data is not None:
        source = open_dataset(graph, settings.calibration_data, replace(settings, labels=None))
    chosen = take(graph, source, settings.input_num, settings.seed)
    images = take(graph, dataset, settings.inference_num, settings.seed)
    statistics, digest = _calibrated(graph, chosen, device, watcher)
    solver = Solver(graph, subject.target, statistics)
    similarity = Similarity(
        settings.output_weights,
        settings.post_process,
        settings.cosine_scale == "half",
        loss=settings_loss(settings),
    )
    evaluator = Evaluator(graph, lambda size: _batches(graph, images, size, device), similarity)
    return Bench(
        subject.name,
        graph,
        subject.target,
        dataset,
        solver.solve(subject.plan),
        statistics,
        solver,
        evaluator,
        digest,
        statistics.samples,
        len(images),
    )


def check_plan(subject: Subject, plan: Plan, where: str | Path) -> None:
    """*raises* `PlanError`, naming *where*, for a plan of another network or target than those of *subject*."""
    if plan.target != subject.target.name:
        raise PlanError(
            str(where),
            expected=f"a plan for the target {subject.target.name}",
            found=f"one for {plan.target}",
            remedy=f"Give --target {plan.target}, or a plan made for {subject.target.name}.",
        )
    odd = sorted(set(subject.plan.ops) ^ set(plan.ops))
    if odd:
        raise PlanError(
            str(where),
            expected=f"a plan of {subject.name}, with its {len(subject.plan.ops)} operators",
            found=f"one that differs in {len(odd)}, such as {odd[0]}",
            remedy="Give the model and the flags that it was made with, --export among them.",
        )


def settings_loss(settings: Settings) -> Loss:
    """The loss that ranks operators. *raises* `UnknownName`."""
    if isinstance(settings.loss, str):
        return LOSSES.get(settings.loss, where="--loss")
    return UserLoss(settings.loss)


def _check_float32(graph: Graph, plan: Plan) -> None:
    """*raises* `ModelError` for a value that would be quantized and is not float32: no file could say so."""
    wrong = [n for n in plan.values if graph.value(n).info.dtype not in (None, torch.float32)]
    if wrong:
        raise ModelError(
            f"value {wrong[0]}",
            expected="float32, the only type that is quantized",
            found=str(graph.value(wrong[0]).info.dtype),
            remedy="Convert the model to float32.",
        )


def open_dataset(graph: Graph, data: object, settings: Settings) -> Dataset:
    """The samples of *data* for *graph*. A fixed batch of N is filled with N samples at a time."""
    inputs = {
        i.name: InputInfo(i.name, (None, *i.shape[1:]) if fixed_batch(graph) > 1 else i.shape, i.dtype)
        for i in graph.info.inputs
    }
    dtype = None if settings.bin_dtype is None else parse_dtype(settings.bin_dtype)
    raw = RawOptions(settings.bin_shape, dtype)
    dataset = open_data(data, inputs, image=settings.image, raw=raw, labels=settings.labels)
    if len(dataset) == 0:
        raise DataError(str(data), expected="at least one sample", found="none", remedy="Check --data.")
    return dataset


def take(graph: Graph, dataset: Dataset, count: int, seed: int) -> Dataset:
    """*count* samples (0: all), of a graph with a fixed batch size in whole batches, at least one.

    *raises* `DataError` if there are fewer.
    """
    least = fixed_batch(graph)
    if len(dataset) < least:
        raise DataError(
            "data",
            expected=f"at least {least} samples, the fixed batch size of the model",
            found=str(len(dataset)),
            remedy="Give more samples, or export the model with a dynamic batch.",
        )
    if least == 1 or count < 0:
        return dataset.take(count, seed)
    wanted = min(max(count, least), len(dataset)) if count else len(dataset)
    return dataset.take(wanted // least * least, seed)


def fixed_batch(graph: Graph) -> int:
    """The batch size of a graph that accepts only one, else 1."""
    if graph.info.dynamic_batch or not graph.info.inputs or not graph.info.inputs[0].shape:
        return 1
    return graph.info.inputs[0].shape[0] or 1


def _calibrated(
    graph: Graph, chosen: Dataset, device: torch.device, watcher: Watcher
) -> tuple[Statistics, str]:
    """Statistics over *chosen*, and a hash of its samples."""
    watcher.stage("calibrating", len(chosen))
    digest = hashlib.sha256()

    def digested() -> Iterator[Mapping[str, Tensor]]:
        for batch in _batches(graph, chosen, BATCH, device):
            digest.update(batch_digest(batch))
            yield batch

    return collect(graph, digested(), progress=watcher.advance), digest.hexdigest()


def _batches(
    graph: Graph, dataset: Dataset, size: int, device: torch.device
) -> Iterator[Mapping[str, Tensor]]:
    if not graph.info.dynamic_batch:
        size = fixed_batch(graph)
        dataset = dataset.subset(range(len(dataset) // size * size))
    for batch in dataset.batches(size):
        yield {name: x.to(device) for name, x in batch.items()}


def batches_of(subject: Subject, dataset: Dataset, size: int = BATCH) -> Iterable[Mapping[str, Tensor]]:
    """Batches of *dataset* on the subject's device."""
    device = next(subject.graph.parameters(), torch.empty(0)).device
    return _batches(subject.graph, dataset, size, device)

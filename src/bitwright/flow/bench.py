"""`Bench`: a model made ready, its data, its statistics: what every job starts from."""

from __future__ import annotations

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
from bitwright.errors import DataError, ModelError
from bitwright.exporters.onnx_float import check_exportable
from bitwright.flow.model_source import import_model
from bitwright.flow.progress import Watcher
from bitwright.flow.settings import Settings
from bitwright.graph.graph import Graph
from bitwright.importers.from_onnx import load_onnx
from bitwright.importers.from_torch import capture
from bitwright.plan.assign import assign
from bitwright.plan.plan import Plan
from bitwright.plan.target import Target, load_target
from bitwright.rewrite.decompose_attention import decompose_attention
from bitwright.rewrite.fold_batchnorm import fold_batchnorm
from bitwright.search.evaluator import Evaluator
from bitwright.search.similarity import Similarity

#: Samples in one batch of the calibration pass and of accuracy runs.
BATCH = 8


@dataclass(frozen=True)
class Bench:
    """A prepared graph with its data, target and solved all-quantized plan."""

    name: str
    graph: Graph
    target: Target
    dataset: Dataset
    statistics: Statistics
    solver: Solver
    evaluator: Evaluator
    plan: Plan
    calibration_samples: int
    inference_samples: int


def read_model(model: str | Path | nn.Module | Graph, example_inputs: Any = None) -> tuple[str, Graph]:
    """A name for files, and the captured graph.

    *model*: an ONNX file, `file.py:function` or `module:function` that returns a module (and example inputs), an
    `nn.Module` (then *example_inputs* are needed), or a graph.
    """
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
    text = str(model)
    if text.rpartition(":")[2].isidentifier() and text.rpartition(":")[0]:
        name, module, inputs = import_model(text)
        return name, capture(module, inputs)
    return Path(text).stem, load_onnx(Path(text))


def prepared(graph: Graph) -> Graph:
    """The graph as it will be quantized: attention spelled out, batch-norm folded, everything exportable."""
    ready = fold_batchnorm(decompose_attention(graph)).eval()
    check_exportable(ready)
    return ready


def open_bench(
    model: str | Path | nn.Module | Graph,
    data: object,
    settings: Settings,
    watcher: Watcher,
    *,
    example_inputs: Any = None,
) -> Bench:
    """Read, prepare, calibrate and solve. *raises* the errors of each stage, cheap checks first."""
    target = load_target(settings.target)
    for method in (settings.method, *settings.methods):
        parse_method(method)
    device = _device(settings.device)
    watcher.stage("reading the model")
    name, captured = read_model(model, example_inputs)
    graph = prepared(captured).to(device)
    if captured.info.opaque:
        watcher.note(f"kept float, no operator of ours: {', '.join(captured.info.opaque)}")
    dataset = open_dataset(graph, data, settings)
    source = dataset
    if settings.calibration_data is not None:
        source = open_dataset(graph, settings.calibration_data, replace(settings, labels=None))
    chosen = source.take(settings.input_num, settings.seed)
    watcher.stage("calibrating", len(chosen))
    statistics = collect(graph, _batches(graph, chosen, BATCH, device), progress=watcher.advance)
    solver = Solver(graph, target, statistics)
    plan = solver.solve(assign(graph, target, method=settings.method))
    images = dataset.take(settings.inference_num, settings.seed)
    similarity = Similarity(settings.output_weights, settings.post_process, settings.cosine_scale == "half")
    evaluator = Evaluator(graph, lambda size: _batches(graph, images, size, device), similarity)
    return Bench(
        name, graph, target, dataset, statistics, solver, evaluator, plan, statistics.samples, len(images)
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


def fixed_batch(graph: Graph) -> int:
    """The batch size of a graph that accepts only one, else 1."""
    if graph.info.dynamic_batch or not graph.info.inputs or not graph.info.inputs[0].shape:
        return 1
    return graph.info.inputs[0].shape[0] or 1


def _batches(
    graph: Graph, dataset: Dataset, size: int, device: torch.device
) -> Iterator[Mapping[str, Tensor]]:
    if not graph.info.dynamic_batch:
        size = fixed_batch(graph)
        dataset = dataset.subset(range(len(dataset) // size * size))
    for batch in dataset.batches(size):
        yield {name: x.to(device) for name, x in batch.items()}


def batches_of(bench: Bench, dataset: Dataset, size: int = BATCH) -> Iterable[Mapping[str, Tensor]]:
    """Batches of *dataset* on the bench's device."""
    device = next(bench.graph.parameters(), torch.empty(0)).device
    return _batches(bench.graph, dataset, size, device)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ModelError(
            "--device",
            expected="a device that torch can use",
            found=f"{name!r}: {str(e).splitlines()[0]}",
            remedy="Use --device cpu, or install torch for that device.",
        ) from e
    return device

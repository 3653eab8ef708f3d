"""`export`: a calibrated or trained model as a file, proven on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from bitwright.calibrate.statistics import Statistics
from bitwright.exporters.integer import lower
from bitwright.exporters.onnx_float import save_model
from bitwright.exporters.onnx_qdq import export_qdq
from bitwright.flow.convert import QuantizedModel, decided, warn_of_saturation
from bitwright.flow.outputs import check_writable
from bitwright.flow.tables import build_tables, settled
from bitwright.graph.device import device_of
from bitwright.graph.graph import Graph
from bitwright.numerics.cosine import cosine
from bitwright.ops.table import with_tables
from bitwright.plan.plan import Plan
from bitwright.runtime.proof import Proof
from bitwright.runtime.verify import verify
from bitwright.train.control import evaluating
from bitwright.train.prepared import PreparedModel, prepared_in
from bitwright.train.states import FakeQuantState


@dataclass(frozen=True)
class Exported:
    """A written model and its proof. *validation*: output -> cosine of what ONNX Runtime computes to what the model computes in
    state VALIDATION, on the samples of the proof. *islands*: operators of an integer file that stayed float -> why.
    """

    path: Path
    plan: Plan
    proof: Proof
    validation: Mapping[str, float]
    islands: Mapping[str, str] = field(default_factory=dict)


def export(model: nn.Module, path: str | Path, *, integers: bool = False) -> Exported:
    """Write *model* as the QDQ ONNX file that `tune` writes, beside it `NAME.plan.json`, and prove it on the example that `prepare` was
    given; real-valued inputs that are constant there (zeros show little) are drawn from the ranges that were calibrated.

    *integers*: write it in integer operators alone, with its look-up tables. *raises* as `convert`; `ProofError` if
    ONNX Runtime computes something else than the simulation, `OutputError`.
    """
    place = Path(path)
    check_writable(place.parent)
    prepared, found = prepared_in(model), decided(model)
    warn_of_saturation(found.plan)
    graph, plan, islands = found.graph, found.plan, dict[str, str]()
    if integers:
        tables = build_tables(graph, plan, Statistics())
        plan = settled(graph, plan, tables)
        lowered = lower(graph, plan, prepared.facts.target, tables)
        written, islands = lowered.model, dict(lowered.islands)
        graph = with_tables(graph, tables)
    else:
        written = export_qdq(graph, plan)
    samples = _samples(prepared)
    proof = verify(graph, plan, written, [samples])
    validation = _validation(prepared, graph, plan, written, samples)
    save_model(written, place)
    plan.save(place.with_suffix(".plan.json"))
    return Exported(place, plan, proof, validation, islands)


def _samples(prepared: PreparedModel) -> dict[str, Tensor]:
    """Inputs to prove a file on: the example, or noise in the calibrated range where it is constant."""
    generator, found = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for name, x in prepared.facts.example.items():
        quantizer = prepared.quantizer_of(name)
        if quantizer is not None and x.numel() > 1 and bool((x == x.flatten()[0]).all()):
            lo, hi = (float(end) for end in (quantizer.observer.lo.min(), quantizer.observer.hi.max()))
            x = lo + (hi - lo) * torch.rand(x.shape, generator=generator)
        found[name] = x
    return found


def _validation(
    prepared: PreparedModel,
    graph: Graph,
    plan: Plan,
    written: onnx.ModelProto,
    samples: Mapping[str, Tensor],
) -> dict[str, float]:
    device = device_of(prepared)
    inputs = [samples[spec.name].to(device) for spec in graph.info.inputs]
    with evaluating(prepared, FakeQuantState.VALIDATION):
        expected = prepared(*inputs)
    got = QuantizedModel.of(graph, plan, written)(*[x.cpu() for x in inputs])
    structure = graph.graph.output_node().args[0]
    ours, theirs = (dict(_tensors(graph, structure, outputs)) for outputs in (expected, got))
    return {n: agreement(ours[n].cpu(), y) for n, y in theirs.items() if n in ours and y.is_floating_point()}


def _tensors(graph: Graph, structure: Any, outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every value that stands in *structure*, the output of *graph*."""
    if isinstance(structure, fx.Node):
        if isinstance(outputs, Tensor):
            yield graph.value_name(structure), outputs
    elif isinstance(structure, dict):
        for key, part in structure.items():
            yield from _tensors(graph, part, outputs[key])
    elif isinstance(structure, (list, tuple)):
        for part, found in zip(structure, outputs, strict=True):
            yield from _tensors(graph, part, found)


def agreement(a: Tensor, b: Tensor) -> float:
    """Of the finite elements; 1 for two vectors of zeros, 0 where other elements are finite."""
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return 0.0
    return float(cosine(a[finite][None], b[finite][None]))

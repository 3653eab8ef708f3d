"""`quantize`: calibrate, export, prove; no search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.exporters.tpu_mlir import write_qtable
from bitwright.flow.bench import Bench, check_plan, open_bench
from bitwright.flow.calibration import range_table, write_ranges
from bitwright.flow.exports import Exports, for_exports, make_exports, reason_table, write_exports
from bitwright.flow.outputs import (
    FLOATS,
    check_writable,
    export_sections,
    figures_json,
    images_json,
    stage_table,
    versions,
    write_json,
    write_plan,
)
from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.result import Stage, integer_stage, with_accuracy
from bitwright.flow.settings import Settings
from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.report.page import Page, Section, write_page


@dataclass(frozen=True)
class Quantized:
    """What `quantize` made. *bench*: with the plan that is exported. *stages*: `float`, `quantized`, and `integer` where
    there is such a file. *refusals*: what the target does not grant, with the reason.
    """

    bench: Bench
    exports: Exports
    stages: Mapping[str, Stage]
    refusals: Mapping[str, str]


def run_quantize(
    model: str | Path | nn.Module | Graph,
    data: object,
    *,
    output: str | Path,
    settings: Settings | None = None,
    watcher: Watcher | None = None,
    example_inputs: Any = None,
    plan: str | Path | None = None,
) -> Quantized:
    """Quantize everything that the target allows, by one threshold method, without a search; export as the settings say, prove.

    Writes `NAME_qdq.onnx`, `NAME_integer.onnx` with `accumulators.csv`, `plan.json`, `NAME_qtable`, `NAME_cali_table`,
    `ranges.csv`, `report.html` and `summary.json` to *output*; files of an earlier export of this model that are not of
    this plan are removed from there. *plan*: a `plan.json` of this network and target, which is exported instead. *raises*
    the errors of every stage.
    """
    settings, watcher = for_exports(settings or Settings()), watcher or Silence()
    folder = check_writable(Path(output))
    given = None if plan is None else Plan.load(Path(plan))
    bench = open_bench(model, data, settings, watcher, example_inputs=example_inputs)
    refusals = bench.plan.refusals
    if given is not None:
        check_plan(bench, given, str(plan))
        bench = replace(bench, plan=given)
    watcher.stage("comparing with float")
    stages = {
        "float": Stage(None, 1.0),
        "quantized": Stage(bench.plan, bench.evaluator.evaluate(bench.plan)),
    }
    stages = with_accuracy(bench, stages, watcher)
    exports = make_exports(bench, bench.plan, settings, watcher)
    stages |= integer_stage(bench, exports, watcher)
    result = Quantized(bench, exports, stages, refusals)
    _write(folder, result, watcher)
    return result


def quantized_summary(result: Quantized) -> dict[str, Any]:
    """The contents of summary.json."""
    bench = result.bench
    return {
        "model": bench.name,
        "target": bench.target.name,
        "images": images_json(bench),
        **figures_json(result.stages, result.exports),
        "float_ops": result.exports.plan.float_groups,
        "not_granted": result.refusals,
        "opaque": list(bench.graph.info.opaque),
        "versions": versions(),
    }


def _write(folder: Path, result: Quantized, watcher: Watcher) -> None:
    bench = result.bench
    write_exports(folder, bench.name, result.exports, watcher)
    samples = bench.calibration_samples
    write_qtable(folder / f"{bench.name}_qtable", bench.graph, result.exports.plan, samples=samples)
    write_ranges(folder, bench, range_table(bench))
    write_plan(folder, result.exports.plan)
    subtitle = (
        f"target {bench.target.name} · {bench.calibration_samples} calibration samples · "
        f"{bench.inference_samples} inference samples"
    )
    sections = [Section(stage_table(bench, result.stages))]
    if bench.plan.refusals:
        sections.append(Section(reason_table(FLOATS, bench.plan.refusals)))
    sections += export_sections(result.exports)
    write_page(folder / "report.html", Page(f"Bitwright: {bench.name}, quantized", subtitle, tuple(sections)))
    write_json(folder / "summary.json", quantized_summary(result))

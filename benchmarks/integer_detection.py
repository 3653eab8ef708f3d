"""The integer model of a detector: YOLOX-Nano on COCO pictures, float / fake-quant / look-up tables / integers side by side.

    python -m benchmarks.integer_detection [int8 | mixed …] [--target NAME] [--method NAME] [--pictures N]

Every fourth picture calibrates (and chooses the mixed plan), the others measure. `int8`: everything at 8 bits. `mixed`: what the
search of `tune` puts at 16 bits, at most MOST operators, for the target cosine on calibration pictures. Paired on the same objects:
one is found by a stage if a detection of its class, with a score of at least SCORE, overlaps it by half.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from benchmarks.integer import accumulators, distribution, latencies
from benchmarks.shared import data_folder, loader, mcnemar, save
from bitwright.exporters.integer import lower
from bitwright.exporters.onnx_float import export_float
from bitwright.exporters.onnx_qdq import export_qdq
from bitwright.flow.bench import Bench, batches_of, open_bench
from bitwright.flow.progress import Silence
from bitwright.flow.result import Stage
from bitwright.flow.settings import Settings
from bitwright.flow.tables import build_tables
from bitwright.flow.tune import repair
from bitwright.graph.graph import Graph
from bitwright.graph.replay import Replay
from bitwright.ops.table import with_tables
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.runtime.session import Session
from bitwright.runtime.verify import measure

#: Of four pictures, one calibrates.
SHARE = 4
#: As the network's authors suppress and count: everything above the first score counts for AP, overlaps above the second are merged.
LEAST_SCORE, MERGED = 0.001, 0.65
#: From here on a detection is shown to a user.
SCORE = 0.3
#: Operators that the search may put at 16 bits, of 369.
MOST = 150
#: Pictures on which codes are compared operator by operator.
COMPARED = 2


@dataclass(frozen=True)
class Pictures:
    """*images*: as the loader gives them. *inputs*: `[1, 3, 416, 416]` each. *truth*: their annotations, in COCO's form."""

    images: list[Any]
    inputs: list[Tensor]
    truth: dict[str, list[dict[str, Any]]]

    def take(self, chosen: Sequence[int]) -> Pictures:
        infos = [self.truth["images"][i] for i in chosen]
        ids = {info["id"] for info in infos}
        objects = [a for a in self.truth["annotations"] if a["image_id"] in ids]
        truth = {"images": infos, "annotations": objects}
        return Pictures([self.images[i] for i in chosen], [self.inputs[i] for i in chosen], truth)


def pictures(load: Any) -> tuple[Pictures, Pictures]:
    """To calibrate on, and to measure on."""
    images, truth = load.coco("coco_val80.npz")
    inputs = [torch.from_numpy(load.yolox_input(image)) for image in images]
    everything = Pictures(images, inputs, truth)
    return (
        everything.take(range(0, len(images), SHARE)),
        everything.take([i for i in range(len(images)) if i % SHARE]),
    )


def mixed_plan(bench: Bench, settings: Settings) -> Plan:
    """What `tune` would choose."""
    start = Stage(bench.plan, bench.evaluator.evaluate(bench.plan))
    with tempfile.TemporaryDirectory() as folder:
        _, chosen = repair(bench, start, settings, Path(folder), Silence())
    return chosen.choice.plan


def measured(bench: Bench, plan: Plan, test: Pictures, load: Any) -> dict[str, Any]:
    tables = build_tables(bench.graph, plan, bench.statistics)
    looked_up = with_tables(bench.graph, tables) if tables else bench.graph
    lowered = lower(bench.graph, plan, bench.target, tables)
    models = {
        "float": export_float(bench.graph),
        "qdq": export_qdq(bench.graph, plan),
        "integer": lowered.model,
    }
    stages = stages_of(bench, plan, looked_up, lowered.model)
    with torch.no_grad():
        outputs = {
            stage: np.concatenate([np.asarray(run(x)) for x in test.inputs]) for stage, run in stages.items()
        }
    detections = {stage: _detections(load, found, test) for stage, found in outputs.items()}
    proof = measure(looked_up, plan, lowered.model, batches_of(bench, bench.dataset.take(COMPARED, 0), 1))
    return {
        "precisions": _precisions(plan),
        "tables": len(tables),
        "islands": dict(lowered.islands),
        "ap": {stage: _average_precision(load, found, test) for stage, found in detections.items()},
        "objects": _paired(detections, test),
        "cosine_to_float": {
            stage: distribution(outputs["float"], found)
            for stage, found in outputs.items()
            if stage != "float"
        },
        "cosine_of_integer_to_tables": distribution(outputs["tables"], outputs["integer"]),
        "operators_that_break_the_rule": [d.name for d in proof.per_op if not d.holds],
        "largest_difference_steps": max(d.steps for d in proof.per_op),
        **sizes(models),
        "latency": latencies(bench, models),
        "accumulators": accumulators(lowered),
    }


def stages_of(
    bench: Bench, plan: Plan, looked_up: Graph, model: onnx.ModelProto
) -> dict[str, Callable[[Tensor], Any]]:
    """The network as float, fake-quantized, with tables and in integers: each a function of one picture."""
    reads = quantized_reads(bench.graph, plan)
    plain, tables, session = Replay(bench.graph), Replay(looked_up), Session(model, threads=1)
    read, written = bench.graph.info.inputs[0].name, bench.graph.info.outputs[0]
    return {
        "float": lambda x: plain.run({read: x})[written],
        "fake_quant": lambda x: plain.run({read: x}, reads)[written],
        "tables": lambda x: tables.run({read: x}, reads)[written],
        "integer": lambda x: session.run({read: x})[written],
    }


def sizes(models: Mapping[str, onnx.ModelProto]) -> dict[str, Any]:
    """Bytes of the files, and their ratios to the float model's."""
    size = {name: model.ByteSize() for name, model in models.items()}
    ratios = {f"{name}_ratio": round(size[name] / size["float"], 3) for name in ("qdq", "integer")}
    return {"bytes": size | ratios}


def _detections(load: Any, outputs: Any, test: Pictures) -> list[tuple[Any, ...]]:
    """(picture, class, score, x1, y1, x2, y2) of everything above LEAST_SCORE."""
    numbered = iter(outputs)
    found: list[tuple[Any, ...]] = load.detect(
        lambda _: next(numbered)[None],
        test.images,
        test.truth,
        lambda image: image,
        load.yolox_decode,
        LEAST_SCORE,
        MERGED,
    )
    return found


def _average_precision(load: Any, detections: Any, test: Pictures) -> dict[str, float]:
    ap, ap50 = load.coco_map(detections, test.truth)
    return {"AP": round(ap, 4), "AP50": round(ap50, 4)}


def _paired(detections: Mapping[str, Any], test: Pictures) -> dict[str, Any]:
    """How many objects every stage finds, and which of them fake-quant and integers do not share."""
    objects = [a for a in test.truth["annotations"] if not a["iscrowd"]]
    found = {stage: found_objects(d, objects) for stage, d in detections.items()}
    a, b = found["fake_quant"], found["integer"]
    return {
        "all": len(objects),
        "found": {stage: len(f) for stage, f in found.items()},
        "shown": {stage: sum(d[2] >= SCORE for d in ds) for stage, ds in detections.items()},
        "both": len(a & b),
        "only_fake_quant": len(a - b),
        "only_integer": len(b - a),
        "p": mcnemar(len(a - b), len(b - a)),
        "float_against_integer": {
            "only_float": len(found["float"] - b),
            "only_integer": len(b - found["float"]),
            "p": mcnemar(len(found["float"] - b), len(b - found["float"])),
        },
    }


def found_objects(detections: Sequence[tuple[Any, ...]], objects: Sequence[Mapping[str, Any]]) -> set[int]:
    """Which *objects* (by index) are found: the best detections choose first, each the object that it overlaps most."""
    found: set[int] = set()
    for picture, kind, score, *box in sorted(detections, key=lambda d: -d[2]):
        if score < SCORE:
            break
        overlaps = [
            (overlap(box, o["bbox"]), i)
            for i, o in enumerate(objects)
            if i not in found and (o["image_id"], o["category_id"]) == (picture, kind)
        ]
        best, index = max(overlaps, default=(0.0, -1))
        if best >= 0.5:
            found.add(index)
    return found


def overlap(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union. *box*: corners x1, y1, x2, y2. *other*: corner and size, as COCO has it."""
    x, y, width, height = other
    w = min(box[2], x + width) - max(box[0], x)
    h = min(box[3], y + height) - max(box[1], y)
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((box[2] - box[0]) * (box[3] - box[1]) + width * height - w * h)


def _precisions(plan: Plan) -> dict[str, int]:
    given = [plan.precision(group) for group in plan.groups]
    return {str(p): given.count(p) for p in dict.fromkeys(given)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plans", nargs="*", default=["int8", "mixed"])
    parser.add_argument("--target", default="journey6")
    parser.add_argument("--method", default="percentile(99.99)")
    parser.add_argument("--cosine", type=float, default=0.998)
    parser.add_argument("--pictures", type=int, default=60)
    asked = parser.parse_args()
    load = loader()
    calibration, test = pictures(load)
    test = test.take(range(asked.pictures))
    settings = Settings(
        target=asked.target,
        method=asked.method,
        methods=(asked.method,),
        input_num=0,
        inference_num=3,
        tables=True,
        precisions=("int8", "int16"),
        expected_cos=asked.cosine,
        max_float_ops=MOST,
        search_method="sketch",
        probes=1,
    )
    model = data_folder() / "models" / "yolox_nano_416.onnx"
    bench = open_bench(model, calibration.inputs, settings, Silence())
    for name in asked.plans:
        plan = bench.plan if name == "int8" else mixed_plan(bench, settings)
        head = {
            "model": "yolox_nano",
            "target": asked.target,
            "method": asked.method,
            "plan": name,
            "pictures": len(test.images),
        }
        save(f"integer_yolox_nano_{asked.target}_{name}", {**head, **measured(bench, plan, test, load)})


if __name__ == "__main__":
    main()

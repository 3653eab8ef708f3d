"""The integer model of a segmenter: DeepLabV3 on COCO pictures, float / fake-quant / look-up tables / integers side by side.

    python -m benchmarks.integer_segmentation [--target NAME] [--method NAME] [--calibration N] [--pictures N]

Few pictures by default: at 513 by 513 pixels one takes seconds in integers. Pictures that calibrate are not measured on. Pixels of a
picture are not independent of each other, so the paired test is over pictures: in which of them has which stage more pixels right.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks.integer import accumulators, latencies
from benchmarks.integer_detection import sizes, stages_of
from benchmarks.shared import loader, mcnemar, save
from bitwright.exporters.integer import lower
from bitwright.exporters.onnx_float import export_float
from bitwright.exporters.onnx_qdq import export_qdq
from bitwright.flow.bench import Bench, open_bench
from bitwright.flow.progress import Silence
from bitwright.flow.settings import Settings
from bitwright.flow.tables import build_tables
from bitwright.importers.from_torch import capture
from bitwright.numerics.cosine import cosine
from bitwright.ops.table import with_tables

#: Of five pictures, one may calibrate.
SHARE = 5
#: Class of pixels that nobody labelled.
IGNORED = 255
#: A picture and its classes, pixel by pixel.
Pair = tuple[Any, Any]


def pairs(load: Any, calibration: int, test: int) -> tuple[list[Pair], list[Pair]]:
    """To calibrate on, and to measure on: evenly from all pictures."""
    images, truth = load.coco("coco_val80.npz")
    masks = load.voc_masks(truth, images)
    others = [i for i in range(len(images)) if i % SHARE]

    def prepared(chosen: list[int]) -> list[Pair]:
        return [load.deeplab_pair(images[i], masks[i]) for i in chosen]

    return (
        prepared(list(range(0, len(images), SHARE))[:calibration]),
        prepared(others[:: len(others) // test][:test]),
    )


def measured(bench: Bench, test: list[Pair], load: Any) -> dict[str, Any]:
    tables = build_tables(bench.graph, bench.plan, bench.statistics)
    looked_up = with_tables(bench.graph, tables) if tables else bench.graph
    lowered = lower(bench.graph, bench.plan, bench.target, tables)
    models = {
        "float": export_float(bench.graph),
        "qdq": export_qdq(bench.graph, bench.plan),
        "integer": lowered.model,
    }
    stages = stages_of(bench, bench.plan, looked_up, lowered.model)
    maps: dict[str, list[Pair]] = {stage: [] for stage in stages}
    cosines: dict[str, list[float]] = {stage: [] for stage in stages}
    for x, labels in test:
        with torch.no_grad():
            found = {stage: torch.as_tensor(run(torch.from_numpy(x))) for stage, run in stages.items()}
        for stage, y in found.items():
            maps[stage].append((y[0].argmax(0).numpy(), labels))
            cosines[stage].append(float(cosine(found["float"].flatten(1).double(), y.flatten(1).double())))
    return {
        "tables": len(tables),
        "islands": dict(lowered.islands),
        "scores": {stage: _scores(load, m) for stage, m in maps.items()},
        "cosine_to_float": {
            stage: {"min": round(min(c), 6), "median": round(float(np.median(c)), 6)}
            for stage, c in cosines.items()
        },
        "pixels": _pixels(maps),
        **sizes(models),
        "latency": latencies(bench, models),
        "accumulators": accumulators(lowered),
    }


def _scores(load: Any, maps: list[Pair]) -> dict[str, float]:
    mean_iou, accuracy = load.miou(maps)
    return {"mIoU": round(mean_iou, 4), "pixel_accuracy": round(accuracy, 4)}


def _pixels(maps: dict[str, list[Pair]]) -> dict[str, Any]:
    """Shares of labelled pixels that are right, and in how many pictures which stage has more of them."""
    right = {
        stage: [(found == labels)[labels != IGNORED] for found, labels in m] for stage, m in maps.items()
    }
    a, b = (np.concatenate(right[stage]) for stage in ("fake_quant", "integer"))
    more = [int(x.sum()) - int(y.sum()) for x, y in zip(right["fake_quant"], right["integer"], strict=True)]
    fake_quant, integer = sum(m > 0 for m in more), sum(m < 0 for m in more)
    return {
        "both": round(float((a & b).mean()), 5),
        "only_fake_quant": round(float((a & ~b).mean()), 5),
        "only_integer": round(float((b & ~a).mean()), 5),
        "pictures_better_in_fake_quant": fake_quant,
        "pictures_better_in_integer": integer,
        "p": mcnemar(fake_quant, integer),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="journey6")
    parser.add_argument("--method", default="percentile(99.99)")
    parser.add_argument("--calibration", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=16)
    asked = parser.parse_args()
    load = loader()
    calibration, test = pairs(load, asked.calibration, asked.pictures)
    settings = Settings(target=asked.target, method=asked.method, input_num=0, inference_num=1, tables=True)
    samples = [torch.from_numpy(x) for x, _ in calibration]
    graph = capture(load.deeplabv3_mnv2(), samples[0])
    bench = open_bench(graph, samples, settings, Silence())
    head = {
        "model": "deeplabv3",
        "target": asked.target,
        "method": asked.method,
        "pictures": len(test),
    }
    save(f"integer_deeplabv3_{asked.target}", {**head, **measured(bench, test, load)})


if __name__ == "__main__":
    main()

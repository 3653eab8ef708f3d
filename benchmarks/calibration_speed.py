"""The calibration pass with all statistics against the bare float forward passes, in one run.

python -m benchmarks.calibration_speed
"""

from __future__ import annotations

import statistics as stats
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared import data_folder, loader, save, timed
from bitwright.calibrate.collect import collect
from bitwright.calibrate.observers import parse_method
from bitwright.flow.bench import prepared
from bitwright.graph.replay import Replay
from bitwright.importers.from_onnx import load_onnx
from bitwright.numerics.dtype import INT8
from bitwright.numerics.spec import QuantSpec

METHODS = ("max", "min_max", "percentile", "kl", "mse", "aciq", "octav")


def measure(model: Path, x: torch.Tensor, batch: int, repeats: int) -> dict[str, Any]:
    graph = prepared(load_onnx(model))
    name = graph.info.inputs[0].name
    batches = [{name: x[i : i + batch]} for i in range(0, len(x), batch)]
    replay = Replay(graph)

    def bare() -> None:
        for b in batches:
            replay.run(b)

    bare()
    collect(graph, batches)
    ratios, solve = [], 0.0
    for _ in range(repeats):
        _, float_seconds = timed(bare)
        statistics, seconds = timed(lambda: collect(graph, batches))
        ratios.append(seconds / float_seconds)
        start = time.perf_counter()
        for _, seen in statistics.items():
            for method in METHODS:
                parse_method(method).range(seen, QuantSpec(INT8, True))
        solve = time.perf_counter() - start
    return {
        "images": len(x),
        "batch": batch,
        "ratio_to_float_passes": round(stats.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "all_thresholds_of_all_methods_relative_to_float_passes": round(solve / float_seconds, 3),
    }


def main() -> None:
    load = loader()
    pictures, _ = load.imagenet("imagenet_sample_even500.npz")
    x = torch.from_numpy(load.prep_imagenet_torch(pictures[:48]))
    small, _ = load.jpeg_set("cifar10_jpeg_train15k.npz")
    y = torch.from_numpy(load.prep_cifar_resnet(small[:512]))
    models = data_folder() / "models"
    save(
        "calibration_speed",
        {
            "mobilenetv2": measure(models / "mobilenetv2_torchvision.onnx", x, 8, 5),
            "resnet20": measure(models / "cifar10_resnet20.onnx", y, 64, 5),
        },
    )


if __name__ == "__main__":
    main()

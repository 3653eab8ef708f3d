"""The networks that benchmarks measure: development models with their calibration and test data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.shared import data_folder
from bitwright.flow.bench import Bench, open_dataset
from bitwright.flow.settings import Settings
from bitwright.graph.graph import Graph
from bitwright.importers.from_torch import capture


@dataclass(frozen=True)
class Network:
    """*calibration*: samples `[1, ...]`; *test*: dictionaries `input`, `label`."""

    name: str
    model: Path | Graph
    calibration: list[Any]
    test: list[dict[str, Any]]
    measured_on: str


def with_labels(bench: Bench, network: Network, settings: Settings) -> Bench:
    """*bench* with the test data in place of the data it was opened with."""
    name = bench.graph.info.inputs[0].name
    test = [{name: s["input"], "label": s["label"]} for s in network.test]
    return replace(bench, dataset=open_dataset(bench.graph, test, settings))


def mobilenetv2(load: Any) -> Network:
    pictures, labels = load.imagenet("imagenet_sample_even500.npz")
    x = torch.from_numpy(load.prep_imagenet_torch(pictures))
    calibration = [x[i : i + 1] for i in range(0, 500, 10)]
    test = [{"input": x[i : i + 1], "label": int(labels[i])} for i in range(500) if i % 10]
    model = data_folder() / "models" / "mobilenetv2_torchvision.onnx"
    return Network("mobilenetv2", model, calibration, test, "450 ImageNet pictures")


def _cifar(load: Any, name: str, model: str | nn.Module, prepare: Callable[[Any], Any]) -> Network:
    train, _ = load.jpeg_set("cifar10_jpeg_train15k.npz")
    pictures, labels = load.jpeg_set("cifar10_jpeg_test_even5k.npz")
    chosen = np.random.default_rng(0).permutation(len(train))[:100]
    calibration = [torch.from_numpy(prepare(train[i : i + 1])) for i in chosen]
    x = torch.from_numpy(prepare(pictures[:2000]))
    test = [{"input": x[i : i + 1], "label": int(labels[i])} for i in range(len(x))]
    network = data_folder() / "models" / model if isinstance(model, str) else capture(model, x[:2])
    return Network(name, network, calibration, test, "2000 CIFAR-10 pictures")


def resnet20(load: Any) -> Network:
    return _cifar(load, "resnet20", "cifar10_resnet20.onnx", load.prep_cifar_resnet)


def resnet32(load: Any) -> Network:
    return _cifar(load, "resnet32", load.cifar10_resnet(32), load.prep_cifar_resnet)


def cct(load: Any) -> Network:
    return _cifar(load, "cct", "cifar10_cct_small.onnx", load.prep_cifar_cct)


def _digits(load: Any, split: str, snr_db: float | None) -> tuple[list[torch.Tensor], Any]:
    x, labels = load.fsdd(split, snr_db=snr_db)
    return [torch.from_numpy(clip[None]) for clip in x], labels


def kwt1(load: Any, snr_db: float | None = 0) -> Network:
    train, _ = _digits(load, "train", snr_db)
    x, labels = _digits(load, "test", 0)
    chosen = np.random.default_rng(0).permutation(len(train))[:100]
    test = [{"input": clip, "label": int(y)} for clip, y in zip(x, labels, strict=True)]
    calibrated = "clean clips" if snr_db is None else "clips with such noise"
    name = "kwt1_clean" if snr_db is None else "kwt1"
    model = data_folder() / "models" / "kwt1_fsdd10.onnx"
    what = f"300 digit clips at 0 dB noise, calibrated on {calibrated}"
    return Network(name, model, [train[i] for i in chosen], test, what)


def kwt1_clean(load: Any) -> Network:
    return kwt1(load, snr_db=None)


#: Name -> a function of the data's loader.
NETWORKS: dict[str, Callable[[Any], Network]] = {
    f.__name__: f for f in (mobilenetv2, resnet20, resnet32, cct, kwt1, kwt1_clean)
}

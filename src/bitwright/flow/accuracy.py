"""Top-1 and top-5 of several plans on the same labelled samples, in one pass over the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import DataError
from bitwright.flow.bench import BATCH, Bench, batches_of
from bitwright.flow.progress import Watcher
from bitwright.plan.plan import Plan
from bitwright.search.evaluator import Run


@dataclass(frozen=True)
class Accuracy:
    """Shares of samples whose label is the first, or among the first five, of the predicted classes."""

    top1: float
    top5: float


def measure_accuracy(bench: Bench, plans: Mapping[str, Plan | None], watcher: Watcher) -> dict[str, Accuracy]:
    """Accuracy of each plan (None: the float network) on all labelled samples of the bench's data."""
    watcher.stage("measuring accuracy", len(bench.dataset))
    return accuracy_of(bench, {n: bench.evaluator.running(p) for n, p in plans.items()}, watcher)


def accuracy_of(bench: Bench, runs: Mapping[str, Run], watcher: Watcher) -> dict[str, Accuracy]:
    """As `measure_accuracy`, of any forms of the network."""
    labels = bench.dataset.labels
    assert labels is not None
    output = _class_output(bench)
    hits = {name: torch.zeros(2) for name in runs}
    seen = 0
    for batch in batches_of(bench, bench.dataset, BATCH):
        inputs = {i.name: batch[i.name] for i in bench.graph.info.inputs}
        n = next(iter(inputs.values())).shape[0]
        for name, run in runs.items():
            hits[name] += _hits(run(inputs)[output], labels[seen : seen + n])
        seen += n
        watcher.advance(n)
    return {name: Accuracy(float(h[0]) / seen, float(h[1]) / seen) for name, h in hits.items()}


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    top = logits.reshape(labels.shape[0], -1).topk(min(5, logits[0].numel()), dim=1).indices.cpu()
    match = top == labels[:, None]
    return torch.stack([match[:, 0].sum(), match.any(1).sum()]).float()


def _class_output(bench: Bench) -> str:
    """The output that holds class scores: the first real-valued one with one row of more than one number per sample."""
    for name in bench.graph.info.outputs:
        info = bench.graph.value(name).info
        if info.is_float and info.shape is not None and info.batch_axis in (0, None):
            per_sample = [d for d in info.shape[1:] if d != 1]
            if len(per_sample) == 1:
                _check_labels(bench, per_sample[0])
                return name
    raise DataError(
        "labels",
        expected="a model with an output of class scores [n, classes]",
        found=", ".join(f"{o} {bench.graph.value(o).info.shape}" for o in bench.graph.info.outputs),
        remedy="Leave out --labels for a model that is not a classifier.",
    )


def _check_labels(bench: Bench, classes: int) -> None:
    labels = bench.dataset.labels
    if labels is not None and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise DataError(
            "labels",
            expected=f"class numbers from 0 to {classes - 1}",
            found=f"{int(labels.min())} to {int(labels.max())}",
            remedy="Check that the labels belong to this model.",
        )

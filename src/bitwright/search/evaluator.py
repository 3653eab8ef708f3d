"""`Evaluator`: the similarity of any plan to the float network, on a fixed set of samples, in bounded memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import DataError, ModelError
from bitwright.graph.graph import OUTPUT, Graph
from bitwright.graph.replay import Reads, Replay, Stacking
from bitwright.numerics.affine import fake_quantize
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.losses import Loss
from bitwright.search.similarity import Similarity

#: Activations of one chunk of samples may take this much memory.
CHUNK_BYTES = 256 * 2**20
#: Larger chunks bring no speed.
CHUNK_SAMPLES = 8
#: Float outputs that do not fit in this much memory are computed again in every pass.
REFERENCE_BYTES = 256 * 2**20

#: Makes an iterator over batches of the given number of samples; called once for each pass.
Batches = Callable[[int], Iterable[Mapping[str, Tensor]]]
#: Called after each run of a plan with its name and similarity.
Told = Callable[[str, float], None]
#: The outputs of a network, perhaps among other values, for inputs by name.
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass
class Effort:
    """Work done, in forward passes of one sample through the whole network; partial runs count by their MACs."""

    forward_passes: float = 0.0


class Evaluator:
    """Runs plans on the same samples and compares their outputs with the float network's."""

    def __init__(self, graph: Graph, batches: Batches, similarity: Similarity | None = None) -> None:
        self.graph = graph
        self.replay = Replay(graph)
        made_by = {o: graph.value(o).producer for o in graph.info.outputs}
        probabilities = {
            o for o, op in made_by.items() if op is not None and graph.op(op).author_kind == "Softmax"
        }
        self.similarity = replace(
            similarity or Similarity(),
            probabilities=frozenset(probabilities),
            class_axes={o: 2 for o in graph.info.outputs if _gains_an_axis(graph, o)},
        )
        self.effort = Effort()
        self.outputs = _scored_outputs(graph, self.similarity)
        self._batches = batches
        self.chunk_samples = _chunk_samples(graph)
        self._references: dict[int, dict[str, Tensor]] = {}
        self._reference_bytes = 0
        self._chunk_count = 0

    def with_loss(self, loss: Loss) -> Evaluator:
        """An evaluator whose `losses` are by *loss*; float outputs, computed before, and the record of work are shared."""
        other = copy.copy(self)
        other.similarity = replace(self.similarity, loss=loss)
        return other

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        """The samples, in chunks whose activations fit in `CHUNK_BYTES`."""
        return self.batches(self.chunk_samples)

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """The samples, *size* at a time (a graph with a fixed batch takes its own)."""
        for batch in self._batches(size):
            yield {spec.name: batch[spec.name] for spec in self.graph.info.inputs}

    def reference(self) -> int:
        """Compute the float outputs ahead, as many as are kept. *returns*: the number of chunks.

        *raises* `DataError` without a sample.
        """
        if not self._chunk_count:
            self._chunk_count = sum(1 for _ in self.pairs())
        if not self._chunk_count:
            raise DataError(
                "data", expected="at least one sample to compare on", found="none", remedy="Check --data."
            )
        return self._chunk_count

    def pairs(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Each chunk, and what is scored of the float network's outputs."""
        for i, inputs in enumerate(self.chunks()):
            found = self._references.get(i)
            if found is None:
                found = self.scored(self.replay.run(inputs), self.samples(inputs))
                self.count(inputs, 1.0)
                size = sum(x.numel() * x.element_size() for x in found.values())
                if self._reference_bytes + size <= REFERENCE_BYTES:
                    self._references[i] = found
                    self._reference_bytes += size
            yield inputs, found

    def scored(self, env: Mapping[str, Any], samples: int) -> dict[str, Tensor]:
        """The outputs that are scored: `[samples, ...]`."""
        return {name: samples_first(self.graph, name, env[name], samples) for name in self.outputs}

    def samples(self, inputs: Mapping[str, Tensor]) -> int:
        """How many samples *inputs* hold; those of a graph with a fixed batch count as one."""
        if not self.graph.info.dynamic_batch:
            return 1
        axes = {name: self.graph.value(name).info.batch_axis for name in inputs}
        return next((x.shape[axes[name]] for name, x in inputs.items() if axes[name] is not None), 1)  # type: ignore[index]

    @cached_property
    def stacking(self) -> Stacking:
        """Which values keep samples apart; tried on the first two samples."""
        first = next(iter(self.chunks()))
        one, other = (self._sample(first, i) for i in (0, self.samples(first) - 1))
        if self.samples(first) == 1:
            other = {n: x * 0.75 + 0.125 if x.is_floating_point() else x for n, x in one.items()}
        for _ in range(4):
            self.count(one, 1.0)
        return self.replay.stacking(one, other)

    def _sample(self, inputs: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
        axes = {name: self.graph.value(name).info.batch_axis for name in inputs}
        return {n: x if axes[n] is None else x.narrow(axes[n], i, 1) for n, x in inputs.items()}  # type: ignore[arg-type]

    def evaluate(self, plan: Plan) -> float:
        """Mean similarity of *plan* to the float network over all samples."""
        return float(self.per_sample(plan).mean())

    def evaluate_all(self, plans: Mapping[str, Plan], progress: Told | None = None) -> dict[str, float]:
        """The same of each plan, by name, one after another. *progress*: called after each with its name and similarity."""
        found = dict[str, float]()
        for name, plan in plans.items():
            found[name] = self.evaluate(plan)
            if progress:
                progress(name, found[name])
        return found

    def per_sample(self, plan: Plan) -> Tensor:
        """Similarity of *plan* for each sample: `[n]` float64."""
        return self._compared(self.running(plan), self.similarity)

    def evaluate_run(self, run: Run) -> float:
        """As `evaluate`, of any other form of the network."""
        return float(self._compared(run, self.similarity).mean())

    def running(self, plan: Plan | None) -> Run:
        """The network as *plan* makes it (None: float)."""
        return self._under({} if plan is None else quantized_reads(self.graph, plan))

    def losses(self, reads: Reads) -> Tensor:
        """The loss that ranks operators, of the network under *reads*, for each sample: `[n]` float64."""
        return self._compared(self._under(reads), self.similarity.losses)

    def _under(self, reads: Reads) -> Run:
        return lambda inputs: self.replay.run(inputs, reads)

    def _compared(self, run: Run, score: Callable[..., Tensor]) -> Tensor:
        rows = []
        self.reference()
        for inputs, reference in self.pairs():
            found = self.scored(run(inputs), self.samples(inputs))
            self.count(inputs, 1.0)
            rows.append(score(reference, found)[0])
        return torch.cat(rows)

    def count(self, inputs: Mapping[str, Tensor], share: float) -> None:
        """Record a run of *inputs* through *share* of the network."""
        self.effort.forward_passes += share * self.samples(inputs)


def as_read(graph: Graph, name: str, x: Tensor, reads: Reads) -> Tensor:
    """What those see who read the value *name* quantized, if anyone does. *x*: as its producer computed it."""
    seen_by = [r.op for r in graph.value(name).readers] + [OUTPUT]
    q = next((reads[(name, reader)] for reader in seen_by if (name, reader) in reads), None)
    return x if q is None else fake_quantize(x, q)


def _scored_outputs(graph: Graph, similarity: Similarity) -> tuple[str, ...]:
    real = tuple(dict.fromkeys(o for o in graph.info.outputs if graph.value(o).info.is_float))
    if not real:
        raise ModelError(
            "outputs",
            expected="at least one real-valued output to compare",
            found=f"only integer outputs: {', '.join(graph.info.outputs)}",
            remedy="Cut the model before argmax, top-k or suppression.",
        )
    if similarity.weights and similarity.post_process is None:
        return tuple(o for o in real if o in similarity.weights) or real
    return real


def _gains_an_axis(graph: Graph, output: str) -> bool:
    """Whether `samples_first` puts an axis before a batch of maps `[N, classes, ...]`: all of a fixed batch count as one sample."""
    info = graph.value(output).info
    shape = info.shape or ()
    return info.batch_axis is None and len(shape) >= 4 and shape[0] != 1


def _chunk_samples(graph: Graph) -> int:
    if not graph.info.dynamic_batch:
        return 1
    total = 0
    for value in graph.values.values():
        if not value.is_constant and value.info.shape is not None:
            size = 4
            for d in value.info.shape:
                size *= d
            total += size
    per_sample = max(1, total // max(1, graph.info.example_batch))
    return max(1, min(CHUNK_SAMPLES, CHUNK_BYTES // per_sample))


def samples_first(graph: Graph, name: str, x: Tensor, samples: int) -> Tensor:
    """The value *name*, *x*, with its samples along axis 0: `[samples, ...]`."""
    axis = graph.value(name).info.batch_axis
    if axis is None:  # of a graph with a fixed batch (one sample), or an output that no sample has for itself
        x = x if x.dim() and x.shape[0] == 1 else x.unsqueeze(0)
        return x.expand(samples, *x.shape[1:])
    x = x.movedim(axis, 0)
    return x if x.shape[0] == samples else x.reshape(samples, -1)

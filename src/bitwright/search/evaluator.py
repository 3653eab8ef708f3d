"""`Evaluator`: the similarity of any plan to the float network, on a fixed set of samples, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import ModelError
from bitwright.graph.graph import Graph
from bitwright.graph.replay import Environment, Replay
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.similarity import Similarity

#: Activations of one chunk of samples may take this much memory.
CHUNK_BYTES = 256 * 2**20
#: Larger chunks bring no speed.
CHUNK_SAMPLES = 8

#: Makes an iterator over batches of the given number of samples; called once for each pass.
Batches = Callable[[int], Iterable[Mapping[str, Tensor]]]


@dataclass
class Effort:
    """Work done, in forward passes of one sample through the whole network; partial runs count by their MACs."""

    forward_passes: float = 0.0


class Evaluator:
    """Runs plans on the same samples and compares their outputs with the float network's."""

    def __init__(self, graph: Graph, batches: Batches, similarity: Similarity | None = None) -> None:
        self.graph = graph
        self.replay = Replay(graph)
        self.similarity = similarity or Similarity()
        self.effort = Effort()
        self.outputs = _scored_outputs(graph, self.similarity)
        self._batches = batches
        self.chunk_samples = _chunk_samples(graph)
        self._reference: list[dict[str, Tensor]] = []

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        """The samples, in chunks whose activations fit in `CHUNK_BYTES`."""
        for batch in self._batches(self.chunk_samples):
            yield {spec.name: batch[spec.name] for spec in self.graph.info.inputs}

    def reference(self) -> list[dict[str, Tensor]]:
        """The float outputs of each chunk; computed once."""
        if not self._reference:
            for inputs in self.chunks():
                self._reference.append(self.scored(self.replay.run(inputs)))
                self.count(inputs, 1.0)
        return self._reference

    def scored(self, env: Environment) -> dict[str, Tensor]:
        """The outputs that are scored, samples first."""
        return {name: _samples_first(self.graph, name, env[name]) for name in self.outputs}

    def evaluate(self, plan: Plan) -> float:
        """Mean similarity of *plan* to the float network over all samples."""
        return float(self.per_sample(plan).mean())

    def per_sample(self, plan: Plan) -> Tensor:
        """Similarity of *plan* for each sample: `[n]` float64."""
        reads = quantized_reads(self.graph, plan)
        rows = []
        for inputs, reference in zip(self.chunks(), self.reference(), strict=True):
            env = self.replay.run(inputs, reads)
            self.count(inputs, 1.0)
            rows.append(self.similarity(reference, self.scored(env))[0])
        return torch.cat(rows)

    def count(self, inputs: Mapping[str, Tensor], share: float) -> None:
        """Record a run of *inputs* through *share* of the network."""
        first = next(iter(inputs.values()))
        self.effort.forward_passes += share * (first.shape[0] if self.graph.info.dynamic_batch else 1)


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


def _samples_first(graph: Graph, name: str, x: Tensor) -> Tensor:
    axis = graph.value(name).info.batch_axis
    if axis is None:  # a fixed batch, or an output without one: a single sample
        return x.reshape(1, -1)
    return x.movedim(axis, 0)

"""The error sketch: what every quantized read does to the outputs, alone and in any combination (docs/error-sketch.md).

A *unit* of error is one read (value, operator) under some parameters. For each image and random probe `v` of an output, one
backward pass gives the gradient of `<v, output>` at every read at once; its inner product with a unit's local error is
`c[unit, probe, image]`. Errors of weights are the same for every input, so their `c` add up; roundings of different values are
independent, so their squares do. The loss of a plan is the mean over probes of these squares, halved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitwright.errors import DataError
from bitwright.graph.graph import OUTPUT, Graph
from bitwright.graph.replay import Reads
from bitwright.graph.tape import Tape
from bitwright.numerics.spec import QParams
from bitwright.search.evaluator import Evaluator, samples_first
from bitwright.search.local_errors import LocalErrors, UnitIndex
from bitwright.search.prediction import Prediction, blocks_of, laid_out_as, prediction_of
from bitwright.search.probes import draw_probes
from bitwright.search.sketch_file import Pass, SketchFile, Unit
from bitwright.search.steps import behind_steps

#: Probes of each output unless told otherwise.
PROBES = 4
#: Activations, local errors and gradients of one chunk of samples may take this much memory. Smaller chunks cost time: of an
#: ImageNet network two or three pictures fit, and each chunk takes some thousand calls.
SKETCH_BYTES = 768 * 2**20
#: Larger chunks bring no speed.
SKETCH_SAMPLES = 32


class ErrorSketch:
    """`c[unit, probe, image]` of the units asked for, on the samples of *evaluator*.

    *probes*: K, for each output; more than an output has elements have no use and are not drawn. *base*: the reads around which
    the network is linearised (none: the float network). Probes are drawn from *seed* and the image's number, the same for all
    units. Memory is bounded by chunks of images. *file*: holds passes made before, and receives those made now.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        probes: int = PROBES,
        seed: int = 0,
        base: Reads | None = None,
        file: SketchFile | None = None,
    ) -> None:
        if probes < 1:
            raise DataError(
                "--probes", expected="at least 1", found=str(probes), remedy="4 serve most networks."
            )
        self.evaluator, self.seed = evaluator, seed
        self.base: Reads = effective_reads(evaluator.graph, base or {})
        self.blocks = blocks_of(evaluator, probes)
        self.rows = self.blocks[-1].stop if self.blocks else 0
        #: Unit -> `[rows, images]` float64.
        self.c: dict[Unit, Tensor] = {}
        #: Units whose effect no gradient tells, and why.
        self.unreachable: dict[Unit, str] = {}
        self.images = 0
        self._behind = behind_steps(evaluator.graph, evaluator.outputs)
        #: How far the base is from the float network already: `[images]`.
        self.base_losses = torch.zeros(0, dtype=torch.float64)
        self.file = file
        for units, found in file.whole() if file else ():
            self._take(units, found)

    # --- measuring -------------------------------------------------------------------------------------------

    def units_of(self, reads: Reads) -> list[Unit]:
        """The units that tell what *reads* do: those in which they differ from the base, and the base's own reads without it."""
        changed = [Unit(*e, q) for e, q in self._effective(reads).items() if q != self.base.get(e)]
        return [*changed, *(Unit(*e, None) for e in self.base)]

    def _effective(self, reads: Reads) -> dict[tuple[str, str], QParams]:
        graph = self.evaluator.graph
        return effective_reads(graph, _as_in_base(graph, reads, self.base))

    def missing(self, plans: Iterable[Reads]) -> list[Unit]:
        """The units of *plans* that were not measured yet."""
        return self.unmeasured(u for reads in plans for u in self.units_of(reads))

    def unmeasured(self, units: Iterable[Unit]) -> list[Unit]:
        """Those of *units* that were not measured yet, each once."""
        return [u for u in dict.fromkeys(units) if u not in self.c and u not in self.unreachable]

    def measure(self, units: Sequence[Unit], *, progress: Callable[[int, int], None] | None = None) -> None:
        """Measure *units* in one pass over the images: one forward and K backward passes, and the local errors."""
        if not units and self.images:
            return
        index = UnitIndex(units, self.evaluator.graph, self.base)
        size = self.chunk_samples(index)
        found = (self.file and self.file.begun(units)) or Pass()
        if found.images % size:  # begun in chunks of another size
            found = Pass()
        held, done = found.images, 0
        try:
            for inputs in self.evaluator.batches(size):
                count = self.evaluator.samples(inputs)
                if done >= held:
                    self._add_chunk(found, inputs, index, first_image=done)
                done += count
                if progress:
                    progress(done, count)
        except BaseException:
            if self.file and found.images:
                self.file.put(units, found, whole=False)
            raise
        if not done:
            raise DataError("data", expected="at least one sample", found="none", remedy="Check --data.")
        if self.file:
            self.file.put(units, found, whole=True)
        self._take(units, found)

    def _add_chunk(
        self, found: Pass, inputs: Mapping[str, Tensor], index: UnitIndex, *, first_image: int
    ) -> None:
        chunk = _Chunk(self, inputs, index, first_image=first_image)
        found.c.append(chunk.c)
        found.reached.append(chunk.reached)
        found.blind.append(chunk.blind)
        found.losses.append(chunk.losses)
        self.evaluator.count(inputs, 1.0)

    def _take(self, units: Sequence[Unit], found: Pass) -> None:
        self.images = found.images
        self.base_losses = torch.cat(found.losses)
        reached, blind = (torch.stack(x).any(0).tolist() for x in (found.reached, found.blind))
        for unit, c, there, unseen in zip(units, torch.cat(found.c, 2), reached, blind, strict=True):
            self._keep(unit, c, reached=there, blind=unseen)

    def _keep(self, unit: Unit, c: Tensor, *, reached: bool, blind: bool) -> None:
        if not bool(torch.isfinite(c).all()):
            self.unreachable[unit] = "its gradient is not finite"
        elif blind and not reached:
            self.unreachable[unit] = "no gradient leads from it to an output that is scored"
        elif blind and not bool(c.any()):
            self.unreachable[unit] = "its gradient is zero for every sample and probe"
        elif unit.reader in self._behind:
            self.unreachable[unit] = (
                f"some of its effect goes through {self._behind[unit.reader]}, which has no gradient"
            )
        else:
            self.c[unit] = c

    def chunk_samples(self, index: UnitIndex) -> int:
        """Samples in one chunk of a pass that measures the units of *index*: one, unless the network keeps them apart."""
        graph = self.evaluator.graph
        if not graph.info.dynamic_batch or not _apart(self.evaluator):
            return 1
        values = sum(math.prod(v.info.shape or (1,)) for v in graph.values.values() if not v.is_constant)
        total = 3 * values + index.elements()
        per_sample = max(1, 4 * total // max(1, graph.info.example_batch))
        return max(1, min(SKETCH_SAMPLES, SKETCH_BYTES // per_sample))

    # --- predicting ------------------------------------------------------------------------------------------

    def error(self, edge: tuple[str, str], qparams: QParams | None) -> Tensor:
        """What reading *edge* under *qparams* does, against reading it unquantized: `[rows, images]`; zero where no gradient tells.
        *raises* `KeyError` for what was not measured.
        """
        return self._c(edge, qparams) - self._c(edge, None)

    def _c(self, edge: tuple[str, str], qparams: QParams | None) -> Tensor:
        unit = Unit(*edge, qparams)
        if qparams == self.base.get(edge) or unit in self.unreachable:
            return torch.zeros(self.rows, self.images, dtype=torch.float64)
        return self.c[unit]

    def constants(self, reads: Reads) -> Tensor:
        """The sum of the errors of all weights, biases and constants: `[rows, images]`."""
        total = torch.zeros(self.rows, self.images, dtype=torch.float64)
        for edge, q in self._effective(reads).items():
            if self.evaluator.replay.is_constant(edge[0]):
                total += self.error(edge, q)
        return total

    def squares(self, reads: Reads) -> Tensor:
        """The square of the constants' sum, and of each value's, whose readers see the same rounding: `[rows, images]`."""
        by_value: dict[str, Tensor] = {}
        for edge, q in self._effective(reads).items():
            if not self.evaluator.replay.is_constant(edge[0]):
                error = self.error(edge, q)
                by_value[edge[0]] = by_value[edge[0]] + error if edge[0] in by_value else error
        total = self.constants(reads) ** 2
        for error in by_value.values():
            total += error**2
        return total

    def predict(self, reads: Reads) -> Prediction:
        """The loss of a plan's *reads*, without a forward pass: around a base, its loss and the change of the squares."""
        squares = self.squares(reads)
        if self.base:
            squares = squares - self.squares(self.base)
        return self.loss_of(squares)

    def loss_of(self, squares: Tensor) -> Prediction:
        """The loss of *squares* `[rows, images]`: half the weighted mean, and the base's loss."""
        return prediction_of(
            self.blocks, squares, beside=float(self.base_losses.mean()) if self.base else 0.0
        )

    @property
    def row_weights(self) -> Tensor:
        """`[rows]`: a loss is the sum over rows of these times the mean square over images."""
        parts = [torch.full((b.probes,), 0.5 * b.weight / b.probes, dtype=torch.float64) for b in self.blocks]
        return torch.cat(parts)


class _Chunk:
    """The `c` of all units of *index* on one chunk of images: `[units, rows, n]` float64. *reached*: units that a gradient came to;
    *blind*: those that have an error, of which `c` says nothing.
    """

    def __init__(
        self, sketch: ErrorSketch, inputs: Mapping[str, Tensor], index: UnitIndex, *, first_image: int
    ) -> None:
        evaluator = sketch.evaluator
        n = evaluator.samples(inputs)
        tape = Tape(evaluator.replay, inputs, sketch.base)
        outputs = {o: tape.saw_recorded(o, OUTPUT) for o in evaluator.outputs}
        found = {o: samples_first(evaluator.graph, o, y.detach(), n) for o, y in outputs.items()}
        reference = found
        if sketch.base:
            reference = evaluator.scored(evaluator.replay.run(inputs), n)
            evaluator.count(inputs, 1.0)
        c, reached = np.zeros((index.units, sketch.rows, n)), np.zeros(index.units, bool)
        self.losses = evaluator.similarity.losses(reference, found)[0]
        arrived: list[tuple[slice, Tensor]] = []
        errors = LocalErrors(evaluator, tape, sketch.base, index, n)
        for tap, group in errors.groups:
            tape.watch(tap, lambda g, group=group: arrived.append((group.places, group.dot(g))))  # type: ignore[misc]
        for number, block in enumerate(sketch.blocks):
            y, ref = outputs[block.output], reference[block.output]
            loss = evaluator.similarity.loss_of(block.output)
            probes = draw_probes(ref, block.probes, sketch.seed, first_image, output=number)
            for k, z in enumerate(probes):
                row = block.start + k
                v = loss.factor(ref, z) * evaluator.similarity.loss_scale**0.5
                tape.pull(block.output, laid_out_as(evaluator.graph, block.output, y, v, n))
                _sort_in(arrived, c[:, row], reached)
                arrived.clear()
        self.c = index.as_asked(torch.from_numpy(c))
        self.reached = index.as_asked(torch.from_numpy(reached))
        self.blind = index.as_asked(torch.from_numpy(_blind(errors, c)))


def _blind(errors: LocalErrors, c: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    silent = ~np.asarray(c.any((1, 2)))
    blind = np.zeros(len(c), bool)
    for _, group in errors.groups:
        if silent[group.places].any():
            blind[group.places] |= silent[group.places] & group.any().cpu().numpy()
    return blind


def _sort_in(
    arrived: Sequence[tuple[slice, Tensor]], c: npt.NDArray[np.float64], reached: npt.NDArray[np.bool_]
) -> None:
    """Add what *arrived* to `c` `[units, n]`: one transfer for all, and no tensor for each."""
    if not arrived:
        return
    values = torch.cat([v for _, v in arrived]).double().cpu().numpy()
    start = 0
    for places, found in arrived:
        c[places] += values[start : start + len(found)]
        reached[places] = True
        start += len(found)


def effective_reads(graph: Graph, reads: Reads) -> dict[tuple[str, str], QParams]:
    """*reads* without those that change nothing: what an operator passes through as codes is on its grid already."""
    kept: dict[tuple[str, str], QParams] = {}
    for (name, reader), q in reads.items():
        producer = graph.value(name).producer
        if producer is not None and graph.op(producer).passthrough:
            source = graph.op_inputs(producer)[0]
            if source is not None and reads.get((source, producer)) == q:
                continue
        kept[(name, reader)] = q
    return kept


def _as_in_base(graph: Graph, reads: Reads, base: Reads) -> Reads:
    """*reads*, with what all readers of a passed-on value see written as *base* writes it: read by the operator that passes it on."""
    if not base:
        return reads
    moved = dict(reads)
    for op in reversed(list(graph.ops)):
        source = graph.op_inputs(op.name)[0] if op.passthrough else None
        q = None if source is None else base.get((source, op.name))
        if source is None or q is None or (source, op.name) in moved or len(op.outputs) != 1:
            continue
        value = graph.value(op.outputs[0])
        seen = [moved.get((value.name, r.op)) for r in value.readers]
        seen += [moved.get((value.name, OUTPUT))] * value.is_output
        if seen and all(x == q for x in seen):
            moved[(source, op.name)] = q
    return moved


def _apart(evaluator: Evaluator) -> bool:
    """Whether each sample of a chunk has numbers of its own, in order, everywhere."""
    graph = evaluator.graph
    axisless = any(
        v.info.is_float and not v.is_constant and v.info.batch_axis is None for v in graph.values.values()
    )
    return not (axisless or evaluator.stacking.mixing or evaluator.stacking.interleaved)

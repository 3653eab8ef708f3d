"""What every look-up table does to the outputs, alone and in any combination: the error sketch with tables as its units.

A table's error is a fixed function of its input, the same sign in the same place: errors of several tables add up before they are squared,
as those of weights do (docs/error-sketch.md §3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from bitwright.graph.graph import OUTPUT
from bitwright.graph.replay import Reads
from bitwright.graph.tape import Tape
from bitwright.search.error_sketch import PROBES
from bitwright.search.evaluator import Evaluator, as_read, samples_first
from bitwright.search.prediction import Prediction, blocks_of, laid_out_as, prediction_of
from bitwright.search.probes import draw_probes

#: Operator -> its table on what the operator reads: real values in, real values out, both on the grids of their codes.
Tables = Mapping[str, Callable[[Tensor], Tensor]]


class TableSketch:
    """`c[table, probe, image]` on the samples of *evaluator*, around the network under *reads* with float functions.

    *evaluator*: of the graph without tables. One forward and K backward passes for all tables together.
    """

    def __init__(
        self, evaluator: Evaluator, reads: Reads, tables: Tables, *, probes: int = PROBES, seed: int = 0
    ) -> None:
        self.evaluator, self.reads, self.tables, self.seed = evaluator, reads, tables, seed
        self.blocks = blocks_of(evaluator, probes)
        #: Operator -> `[probes of all outputs, images]` float64.
        self.c: dict[str, Tensor] = {}

    def measure(self, progress: Callable[[int], None] | None = None) -> None:
        """One pass over the samples."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.tables}
        done = 0
        for inputs in self.evaluator.chunks():
            count = self.evaluator.samples(inputs)
            for name, c in self._chunk(inputs, count, done).items():
                parts[name].append(c)
            self.evaluator.count(inputs, 1.0)
            done += count
            if progress:
                progress(count)
        self.c = {name: torch.cat(found, 1) for name, found in parts.items()}

    def tells(self, op: str) -> bool:
        """Whether the gradient at the table of *op* was finite everywhere: without it, `loss` knows nothing."""
        return bool(torch.isfinite(self.c[op]).all())

    def loss(self, ops: Iterable[str]) -> Prediction:
        """The loss of the network with the tables of *ops*, against the same network with float functions. Of *ops* that it `tells`."""
        chosen = [self.c[name] for name in ops]
        total = torch.stack(chosen).sum(0) if chosen else torch.zeros_like(next(iter(self.c.values())))
        return prediction_of(self.blocks, total**2)

    def _chunk(self, inputs: Mapping[str, Tensor], count: int, first_image: int) -> dict[str, Tensor]:
        graph, similarity = self.evaluator.graph, self.evaluator.similarity
        tape = Tape(self.evaluator.replay, inputs, self.reads)
        rows = self.blocks[-1].stop if self.blocks else 0
        c = {name: torch.zeros(rows, count, dtype=torch.float64) for name in self.tables}
        row = 0
        for name in self.tables:
            errors = self._local_error(tape, name)
            output = graph.op(name).outputs[0]

            def receive(gradient: Tensor, name: str = name, output: str = output, e: Tensor = errors) -> None:
                product = samples_first(graph, output, gradient * e, count).flatten(1).sum(1)
                c[name][row] += product.double().cpu()

            tape.watch((output, None), receive)
        for number, block in enumerate(self.blocks):
            y = tape.saw_recorded(block.output, OUTPUT)
            reference = samples_first(graph, block.output, y.detach(), count)
            loss = similarity.loss_of(block.output)
            probes = draw_probes(reference, block.probes, self.seed, first_image, output=number)
            for k, z in enumerate(probes):
                row = block.start + k
                v = loss.factor(reference, z) * similarity.loss_scale**0.5
                tape.pull(block.output, laid_out_as(graph, block.output, y, v, count))
        return c

    def _local_error(self, tape: Tape, name: str) -> Tensor:
        """What the table makes of what the operator reads, less what its readers see of the float function's result."""
        source = self.evaluator.graph.op_inputs(name)[0]
        assert source is not None, "a table has an input"
        output = self.evaluator.graph.op(name).outputs[0]
        made = self.tables[name](tape.saw(source, name))
        return made - as_read(self.evaluator.graph, output, tape.values[output].detach(), self.reads)

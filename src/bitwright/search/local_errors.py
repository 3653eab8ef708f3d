"""Local errors: what one quantized read changes where it is read, on clean inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.graph.op import Role
from bitwright.graph.replay import Reads
from bitwright.graph.tape import Tap, Tape
from bitwright.numerics.affine import fake_quantize
from bitwright.numerics.spec import QParams
from bitwright.search.evaluator import Evaluator


@dataclass(frozen=True)
class ErrorGroup:
    """Local errors at one place. *places*: the units' numbers. *errors*: `[n, units, elements]`; those of biases, the same at
    every position, are `[1, units, channels]`, along *channel_axis*. *batch_axis*: of the value, None where all of it belongs to
    one sample.
    """

    places: Tensor
    errors: Tensor
    samples: int
    batch_axis: int | None
    channel_axis: int | None = None

    def dot(self, gradient: Tensor) -> Tensor:
        """Inner products with *gradient*, laid out as the value is: `[units, n]`."""
        if self.channel_axis is None:
            g = _rows(gradient, self.batch_axis, self.samples)
            return torch.bmm(self.errors, g.unsqueeze(2)).squeeze(2).T
        return self.errors[0] @ self._by_channel(gradient).T

    def _by_channel(self, gradient: Tensor) -> Tensor:
        """The gradient summed over positions: `[n, channels]`."""
        assert self.channel_axis is not None
        channel = self.channel_axis % gradient.dim()
        batch = self.batch_axis
        if batch is not None and batch > channel:
            batch -= 1
        g = gradient.movedim(channel, -1)
        channels = g.shape[-1]
        g = g.unsqueeze(0) if batch is None else g.movedim(batch, 0)
        return g.reshape(self.samples, -1, channels).sum(1)


class LocalErrors:
    """The local errors of *units*, numbered in their order, grouped by the place where a gradient meets them."""

    def __init__(
        self,
        evaluator: Evaluator,
        tape: Tape,
        base: Reads,
        units: Sequence[tuple[str, str, QParams | None]],
        samples: int,
    ) -> None:
        self._graph, self._replay = evaluator.graph, evaluator.replay
        self._tape, self._base, self._samples = tape, base, samples
        #: (place, its local errors).
        self.groups: list[tuple[Tap, ErrorGroup]] = []
        self._made: dict[tuple[str, int, tuple[int, ...]], Tensor] = {}
        by_read: dict[tuple[str, str], list[tuple[int, QParams | None]]] = {}
        for place, (value, reader, q) in enumerate(units):
            by_read.setdefault((value, reader), []).append((place, q))
        with torch.no_grad():
            for (value, reader), asked in by_read.items():
                if not self._replay.is_constant(value):
                    self._add_activation(value, reader, asked)
                elif self._is_bias(value, reader):
                    self._add_bias(value, reader, asked)
                else:
                    self._add_constant(value, reader, asked)

    def _add(
        self, tap: Tap, value: str, places: Sequence[int], errors: Tensor, channel: int | None = None
    ) -> None:
        axis = self._graph.value(value).info.batch_axis if self._graph.info.dynamic_batch else None
        group = ErrorGroup(torch.tensor(places), errors, self._samples, axis, channel)
        self.groups.append((tap, group))

    def _stacked(self, value: str, changed: Sequence[Tensor], clean: Tensor) -> Tensor:
        """`[n, changed, elements]`: each minus *clean*."""
        axis = self._graph.value(value).info.batch_axis if self._graph.info.dynamic_batch else None
        reference = _rows(clean, axis, self._samples)
        errors = reference.new_empty(self._samples, len(changed), reference.shape[1])
        for i, x in enumerate(changed):
            torch.sub(_rows(x, axis, self._samples), reference, out=errors[:, i])
        return errors

    # --- activations -----------------------------------------------------------------------------------------

    def _add_activation(self, value: str, reader: str, asked: Sequence[tuple[int, QParams | None]]) -> None:
        clean = self._base.get((value, reader))
        key = (value, id(clean), tuple(id(q) for _, q in asked))
        if key not in self._made:  # readers of one value mostly ask for the same
            x = self._tape.values[value].detach()
            changed = [x if q is None else fake_quantize(x, q) for _, q in asked]
            self._made[key] = self._stacked(value, changed, self._tape.seen[(value, reader)].detach())
        self._add((value, reader), value, [place for place, _ in asked], self._made[key])

    # --- constants -------------------------------------------------------------------------------------------

    def _is_bias(self, value: str, reader: str) -> bool:
        """Whether *reader* only adds *value*, at every position, and nothing else of it."""
        op = self._graph.op(reader)
        roles = [r.role for r in self._graph.value(value).readers if r.op == reader]
        return op.bias_axis is not None and roles == [Role.BIAS] and self._constant(value).dim() == 1

    def _constant(self, value: str, reader: str = "", q: QParams | None = None) -> Tensor:
        return self._replay.read_constant(value, reader, {} if q is None else {(value, reader): q})

    def _add_bias(self, value: str, reader: str, asked: Sequence[tuple[int, QParams | None]]) -> None:
        clean = self._replay.read_constant(value, reader, self._base)
        errors = torch.stack([self._constant(value, reader, q) - clean for _, q in asked]).unsqueeze(0)
        output = self._graph.op(reader).outputs[0]
        places = [place for place, _ in asked]
        self._add((output, None), output, places, errors, self._graph.op(reader).bias_axis)

    def _add_constant(self, value: str, reader: str, asked: Sequence[tuple[int, QParams | None]]) -> None:
        """Weights and constant operands: their error is met at the operator's output, computed on clean inputs."""
        op = self._graph.op(reader)
        results = [
            self._replay.apply(reader, self._tape.saw, {value: self._constant(value, reader, q)})
            for _, q in asked
        ]
        places = [place for place, _ in asked]
        for i, output in enumerate(op.outputs):
            clean = self._tape.values.get(output)
            if not isinstance(clean, Tensor) or not clean.is_floating_point():
                continue
            errors = self._stacked(output, [r[i] for r in results], clean.detach())
            self._add((output, None), output, places, errors)


def _rows(x: Tensor, batch_axis: int | None, samples: int) -> Tensor:
    """`[samples, elements]`."""
    return (x if batch_axis is None else x.movedim(batch_axis, 0)).reshape(samples, -1)

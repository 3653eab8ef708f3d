"""Local errors: what one quantized read changes where it is read, on clean inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.graph.graph import OUTPUT, Graph
from bitwright.graph.op import Op, Role
from bitwright.graph.replay import Reads
from bitwright.graph.tape import Tap, Tape
from bitwright.numerics.affine import fake_quantize
from bitwright.numerics.spec import QParams
from bitwright.ops.clip import Clip
from bitwright.ops.unary import Unary
from bitwright.search.evaluator import Evaluator
from bitwright.search.sketch_file import Unit

#: Quantized constants of one read are kept for the next chunk up to this size in all.
_KEPT_ELEMENTS = 2 * 2**20
#: An operator of so many multiply-accumulates for each element of its output is run again for every unit of what it reads.
_CHEAP_MACS = 32


@dataclass(frozen=True)
class ErrorGroup:
    """Local errors at one place. *places*: where the units stand in their index. *errors*: `[n, units, elements]`; those of biases, the same at
    every position, are `[1, units, channels]`, along *channel_axis*. *batch_axis*: of the value, None where all of it belongs to
    one sample.
    """

    places: slice
    errors: Tensor
    samples: int
    batch_axis: int | None
    channel_axis: int | None = None

    def dot(self, gradient: Tensor) -> Tensor:
        """Inner products with *gradient*, laid out as the value is: `[units, n]`."""
        if self.channel_axis is None:
            g = _rows(gradient, self.batch_axis, self.samples)
            # This orientation is the fast one: the other is up to 40 times slower on small values.
            return torch.bmm(g.unsqueeze(1), self.errors.transpose(1, 2)).squeeze(1).T
        return self.errors[0] @ self._by_channel(gradient).T

    def any(self) -> Tensor:
        """Which units have an error at all: `[units]` bool."""
        return self.errors.ne(0).any(2).any(0)

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


@dataclass(frozen=True)
class _ReadUnits:
    """The units of one read, side by side. *places*: where they stand."""

    value: str
    reader: str
    qparams: tuple[QParams | None, ...]
    places: slice


class UnitIndex:
    """*units* in the order in which a pass measures them: those of one read side by side. Made once for each pass."""

    def __init__(self, units: Sequence[Unit]) -> None:
        by_read: dict[tuple[str, str], list[int]] = {}
        for number, unit in enumerate(units):
            by_read.setdefault((unit.value, unit.reader), []).append(number)
        self.units = len(units)
        #: Constants under the parameters of a read's units.
        self.constants: dict[tuple[str, str], list[Tensor]] = {}
        self.reads: list[_ReadUnits] = []
        start = 0
        for (value, reader), numbers in by_read.items():
            places = slice(start, start + len(numbers))
            self.reads.append(_ReadUnits(value, reader, tuple(units[i].qparams for i in numbers), places))
            start = places.stop
        self._numbers = torch.tensor([i for numbers in by_read.values() for i in numbers], dtype=torch.int64)

    def as_asked(self, measured: Tensor) -> Tensor:
        """*measured* `[units, ...]`, in the order of the units given."""
        found = torch.empty_like(measured)
        found[self._numbers] = measured
        return found


class LocalErrors:
    """The local errors of the units of *index* on one chunk, grouped by the place where a gradient meets them."""

    def __init__(self, evaluator: Evaluator, tape: Tape, base: Reads, index: UnitIndex, samples: int) -> None:
        self._graph, self._replay = evaluator.graph, evaluator.replay
        self._tape, self._base, self._index, self._samples = tape, base, index, samples
        #: (place, its local errors).
        self.groups: list[tuple[Tap, ErrorGroup]] = []
        self._made: dict[tuple[str, int, tuple[int, ...]], Tensor] = {}
        with torch.no_grad():
            for read in index.reads:
                if not self._replay.is_constant(read.value):
                    self._add_activation(read)
                elif self._is_bias(read):
                    self._add_bias(read)
                else:
                    self._add_constant(read)

    def _add(self, tap: Tap, value: str, places: slice, errors: Tensor, channel: int | None = None) -> None:
        axis = self._graph.value(value).info.batch_axis if self._graph.info.dynamic_batch else None
        group = ErrorGroup(places, errors, self._samples, axis, channel)
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

    def _add_activation(self, read: _ReadUnits) -> None:
        value, reader = read.value, read.reader
        way = [] if reader == OUTPUT else way_behind_activation(self._graph, reader, self._base)
        key = (value, id(self._base.get((value, reader))), tuple(id(q) for q in read.qparams))
        if way:
            made, changed = self._carried(way, value, self._quantized(read))
            errors = self._stacked(made, changed, self._tape.values[made].detach())
            self._add((made, None), made, read.places, errors)
            return
        if key not in self._made:  # readers of one value mostly ask for the same
            clean = self._tape.seen[(value, reader)].detach()
            self._made[key] = self._stacked(value, self._quantized(read), clean)
        self._add((value, reader), value, read.places, self._made[key])

    def _quantized(self, read: _ReadUnits) -> list[Tensor]:
        x = self._tape.values[read.value].detach()
        return [x if q is None else fake_quantize(x, q) for q in read.qparams]

    def _carried(self, way: Sequence[Op], value: str, changed: list[Tensor]) -> tuple[str, list[Tensor]]:
        """What the operators of *way* make of the *changed* forms of *value*: the name of their result, and its forms."""
        for op in way:
            changed = [self._replay.apply(op.name, self._tape.saw, {value: x})[0] for x in changed]
            value = op.outputs[0]
        return value, changed

    # --- constants -------------------------------------------------------------------------------------------

    def _is_bias(self, read: _ReadUnits) -> bool:
        """Whether the reader only adds the value, at every position, and nothing else of it."""
        roles = [r.role for r in self._graph.value(read.value).readers if r.op == read.reader]
        adds = self._graph.op(read.reader).bias_axis is not None
        return adds and roles == [Role.BIAS] and self._graph.constant(read.value).dim() == 1

    def _constants(self, read: _ReadUnits) -> list[Tensor]:
        """The constant under each of the parameters; small ones are kept from chunk to chunk."""
        held = self._index.constants.get((read.value, read.reader))
        if held is None:
            x = self._replay.read_constant(read.value, read.reader, {})
            held = [x if q is None else fake_quantize(x, q) for q in read.qparams]
            if sum(made.numel() for made in held) <= _KEPT_ELEMENTS:
                self._index.constants[(read.value, read.reader)] = held
        return held

    def _add_bias(self, read: _ReadUnits) -> None:
        clean = self._replay.read_constant(read.value, read.reader, self._base)
        errors = (torch.stack(self._constants(read)) - clean).unsqueeze(0)
        op = self._graph.op(read.reader)
        self._add((op.outputs[0], None), op.outputs[0], read.places, errors, op.bias_axis)

    def _add_constant(self, read: _ReadUnits) -> None:
        """Weights and constant operands: their error is met at the operator's output, computed on clean inputs."""
        op = self._graph.op(read.reader)
        results = [
            self._replay.apply(read.reader, self._tape.saw, {read.value: x}) for x in self._constants(read)
        ]
        for i, output in enumerate(op.outputs):
            clean = self._tape.values.get(output)
            if not isinstance(clean, Tensor) or not clean.is_floating_point():
                continue
            errors = self._stacked(output, [r[i] for r in results], clean.detach())
            self._add((output, None), output, read.places, errors)


def _rows(x: Tensor, batch_axis: int | None, samples: int) -> Tensor:
    """`[samples, elements]`."""
    return (x if batch_axis is None else x.movedim(batch_axis, 0)).reshape(samples, -1)


def way_behind_activation(graph: Graph, reader: str, base: Reads) -> list[Op]:
    """The operators from *reader* to the next activation function, itself among them; none if there is none that alone reads what *reader*
    makes, or if the way is not cheap.

    An error before an activation function switches on what was off, which a gradient at clean values does not see; behind it, it is
    part of the error.
    """
    op = graph.op(reader)
    if _is_activation(graph, op):
        return [op]
    value = graph.value(op.outputs[0])
    if value.is_output or len(value.readers) != 1 or len(op.outputs) != 1 or not _is_cheap(graph, op):
        return []
    after = graph.op(value.readers[0].op)
    return [op, after] if _is_activation(graph, after) and (value.name, after.name) not in base else []


def _is_activation(graph: Graph, op: Op) -> bool:
    return isinstance(op, Clip | Unary) and not op.passthrough and graph.value(op.outputs[0]).info.is_float


def _is_cheap(graph: Graph, op: Op) -> bool:
    made = graph.value(op.outputs[0]).info.shape
    if made is None:
        return False
    read = [None if n is None else graph.value(n).info.shape for n in graph.op_inputs(op.name)]
    return op.macs(read, [made]) <= _CHEAP_MACS * math.prod(made)

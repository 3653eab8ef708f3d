"""Local errors: what one quantized read changes where it is read, or behind the next activation function, on clean inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.graph.graph import OUTPUT, Graph
from bitwright.graph.op import Op, Role
from bitwright.graph.replay import Reads
from bitwright.graph.tape import Tap, Tape
from bitwright.numerics.affine import fake_quantize
from bitwright.numerics.spec import QParams
from bitwright.search.carrying import way_of
from bitwright.search.evaluator import Evaluator
from bitwright.search.sketch_file import Unit

#: Quantized constants of one read are kept for the next chunk up to this size in all.
_KEPT_ELEMENTS = 2 * 2**20


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
    """The units of one read, side by side. *places*: where they stand. *way*: the operators behind which their errors are met."""

    value: str
    reader: str
    qparams: tuple[QParams | None, ...]
    places: slice
    way: tuple[Op, ...]


class UnitIndex:
    """*units* in the order in which a pass measures them: those of one read side by side. Made once for each pass. *base*: the reads
    around which the network is linearised.
    """

    def __init__(self, units: Sequence[Unit], graph: Graph, base: Reads) -> None:
        by_read: dict[tuple[str, str], list[int]] = {}
        for number, unit in enumerate(units):
            by_read.setdefault((unit.value, unit.reader), []).append(number)
        self.units = len(units)
        #: Constants under the parameters of a read's units.
        self.constants: dict[tuple[str, str], list[Tensor]] = {}
        self.reads: list[_ReadUnits] = []
        self._graph = graph
        start = 0
        for (value, reader), numbers in by_read.items():
            places = slice(start, start + len(numbers))
            is_edge = graph.value(value).is_constant or reader == OUTPUT
            way = () if is_edge else way_of(graph, reader, base)
            asked = tuple(units[i].qparams for i in numbers)
            self.reads.append(_ReadUnits(value, reader, asked, places, way))
            start = places.stop
        self._numbers = torch.tensor([i for numbers in by_read.values() for i in numbers], dtype=torch.int64)

    def elements(self) -> int:
        """How many numbers the local errors of all units are, for the samples of the graph's example."""
        return sum(len(read.qparams) * self._elements_of(read) for read in self.reads)

    def _elements_of(self, read: _ReadUnits) -> int:
        graph = self._graph
        if not graph.value(read.value).is_constant:
            return _size(graph, read.way[-1].outputs[0] if read.way else read.value)
        if _is_added(graph, read.value, read.reader):
            return graph.constant(read.value).numel()
        return sum(_size(graph, o) for o in graph.op(read.reader).outputs)

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
                elif _is_added(self._graph, read.value, read.reader):
                    self._add_bias(read)
                else:
                    self._add_constant(read)

    def _add(self, tap: Tap, value: str, places: slice, errors: Tensor, channel: int | None = None) -> None:
        axis = self._graph.value(value).info.batch_axis if self._graph.info.dynamic_batch else None
        group = ErrorGroup(places, errors, self._samples, axis, channel)
        self.groups.append((tap, group))

    def _stacked(self, value: str, changed: Iterable[Tensor], count: int, clean: Tensor) -> Tensor:
        """`[n, count, elements]`: each of the *count* tensors *changed* minus *clean*."""
        axis = self._graph.value(value).info.batch_axis if self._graph.info.dynamic_batch else None
        reference = _rows(clean, axis, self._samples)
        errors = reference.new_empty(self._samples, count, reference.shape[1])
        for i, x in enumerate(changed):
            torch.sub(_rows(x, axis, self._samples), reference, out=errors[:, i])
        return errors

    # --- activations -----------------------------------------------------------------------------------------

    def _add_activation(self, read: _ReadUnits) -> None:
        value, reader, count = read.value, read.reader, len(read.qparams)
        x = self._tape.values[value].detach()
        forms = (x if q is None else fake_quantize(x, q) for q in read.qparams)
        if read.way:
            made = read.way[-1].outputs[0]
            carried = (self._carried(read, form) for form in forms)
            errors = self._stacked(made, carried, count, self._tape.values[made].detach())
            self._add((made, None), made, read.places, errors)
            return
        key = (value, id(self._base.get((value, reader))), tuple(id(q) for q in read.qparams))
        if key not in self._made:  # readers of one value mostly ask for the same
            clean = self._tape.seen[(value, reader)].detach()
            self._made[key] = self._stacked(value, forms, count, clean)
        self._add((value, reader), value, read.places, self._made[key])

    def _carried(self, read: _ReadUnits, x: Tensor) -> Tensor:
        """What the operators on the read's way make of *x*, a form of its value."""
        value = read.value
        for op in read.way:
            (x,) = self._replay.apply(op.name, self._tape.saw, {value: x})
            (value,) = op.outputs
        return x

    # --- constants -------------------------------------------------------------------------------------------

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
            errors = self._stacked(output, (r[i] for r in results), len(results), clean.detach())
            self._add((output, None), output, read.places, errors)


def _rows(x: Tensor, batch_axis: int | None, samples: int) -> Tensor:
    """`[samples, elements]`."""
    return (x if batch_axis is None else x.movedim(batch_axis, 0)).reshape(samples, -1)


def _is_added(graph: Graph, constant: str, reader: str) -> bool:
    """Whether *reader* only adds the *constant*, at every position, and nothing else of it: a bias."""
    roles = [r.role for r in graph.value(constant).readers if r.op == reader]
    return (
        graph.op(reader).bias_axis is not None
        and roles == [Role.BIAS]
        and graph.constant(constant).dim() == 1
    )


def _size(graph: Graph, name: str) -> int:
    return math.prod(graph.value(name).info.shape or (1,))

"""Evaluating integer arithmetic on shapes where some lengths are only known by name.

A partly known array is a numpy array of objects: integers, `Symbol`s or `UNKNOWN`. Rules return None for "nothing is
known". Symbols stand for lengths, so they are never negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class Symbol:
    """A length that is not known as a number; equal names are equal lengths."""

    name: str


class _Unknown:
    """A number nothing is known about."""

    def __repr__(self) -> str:
        return "?"


UNKNOWN = _Unknown()
Entry = int | Symbol | _Unknown
#: An array of entries.
Vector = npt.NDArray[np.object_]

#: Shape arithmetic never needs more entries than this; longer arrays are data.
_LONGEST = 4096


@dataclass(frozen=True)
class _Call:
    """One node with what is known of its inputs."""

    node: NodeProto
    arrays: Mapping[str, npt.NDArray[Any]]
    vectors: Mapping[str, Vector]
    dims: Mapping[str, tuple[Entry, ...]]

    def __getitem__(self, index: int) -> Vector:
        """Input *index*. *raises* `_NothingKnown`."""
        name = self.node.input[index] if index < len(self.node.input) else ""
        if name in self.vectors:
            return self.vectors[name]
        if (
            name in self.arrays
            and self.arrays[name].size <= _LONGEST
            and self.arrays[name].dtype.kind in "biu"
        ):
            flat = [int(v) for v in self.arrays[name].reshape(-1)]
            return _array(flat, self.arrays[name].shape)
        raise _NothingKnown

    def ints(self, index: int) -> list[int] | None:
        """Input *index* as known integers, None if absent. *raises* `_NothingKnown`."""
        if index >= len(self.node.input) or not self.node.input[index]:
            return None
        flat = self[index].reshape(-1)
        if not all(isinstance(e, int) for e in flat):
            raise _NothingKnown
        return [int(e) for e in flat]

    def attribute(self, name: str, default: Any = None) -> Any:
        for a in self.node.attribute:
            if a.name == name:
                return helper.get_attribute_value(a)
        return default


class _NothingKnown(Exception):
    pass


def evaluate(
    node: NodeProto,
    arrays: Mapping[str, npt.NDArray[Any]],
    vectors: Mapping[str, Vector],
    dims: Mapping[str, tuple[Entry, ...]],
) -> Vector | None:
    """The first output of *node*, as far as it is known; None if nothing is."""
    rule = _RULES.get(node.op_type)
    if rule is None:
        return None
    try:
        found = rule(_Call(node, arrays, vectors, dims))
    except (_NothingKnown, IndexError, ValueError):  # wrong models are reported where they are executed
        return None
    if found.size > _LONGEST or (found.size and all(e is UNKNOWN for e in found.reshape(-1))):
        return None
    return found


def _array(flat: list[Any], shape: tuple[int, ...]) -> Vector:
    made = np.empty(len(flat), dtype=object)
    made[:] = flat
    return made.reshape(shape)


def _shape(c: _Call) -> Vector:
    name = c.node.input[0]
    dims = tuple(c.arrays[name].shape) if name in c.arrays else c.dims.get(name)
    if dims is None:
        raise _NothingKnown
    dims = dims[slice(c.attribute("start", 0), c.attribute("end"))]
    return _array(list(dims), (len(dims),))


def _size(c: _Call) -> Vector:
    dims = c.dims.get(c.node.input[0])
    if dims is None or not all(isinstance(d, int) for d in dims):
        raise _NothingKnown
    return _array([int(np.prod([d for d in dims if isinstance(d, int)], dtype=np.int64))], ())


def _gather(c: _Call) -> Vector:
    return _wrapped(np.take(c[0], c[1].astype(np.int64), axis=c.attribute("axis", 0)))


def _slice(c: _Call) -> Vector:
    x, starts, ends = c[0], c.ints(1), c.ints(2)
    assert starts is not None
    assert ends is not None
    axes = c.ints(3) or range(len(starts))
    steps = c.ints(4) or [1] * len(starts)
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # Python reads an end of -1 - size or less as "before the first element", as ONNX does.
        index[axis] = slice(start, end, step)
    return _wrapped(x[tuple(index)])


def _squeeze(c: _Call) -> Vector:
    axes = c.ints(1)
    return _wrapped(np.squeeze(c[0], axis=None if axes is None else tuple(axes)))


def _unsqueeze(c: _Call) -> Vector:
    return _wrapped(np.expand_dims(c[0], tuple(c.ints(1) or ())))


def _concat(c: _Call) -> Vector:
    parts = []
    for i, name in enumerate(c.node.input):
        try:
            parts.append(c[i])
        except _NothingKnown:
            dims = c.dims.get(name)
            if dims is None or len(dims) != 1 or not isinstance(dims[0], int):
                raise
            parts.append(_array([UNKNOWN] * dims[0], (dims[0],)))
    return np.concatenate(parts, axis=c.attribute("axis"))


def _cast(c: _Call) -> Vector:
    to = c.attribute("to")
    if to not in (TensorProto.INT64, TensorProto.INT32):
        raise _NothingKnown
    return c[0]


def _reshape(c: _Call) -> Vector:
    return c[0].reshape(c.ints(1) or ())


def _constant_of_shape(c: _Call) -> Vector:
    value = c.attribute("value")
    fill = 0.0 if value is None else numpy_helper.to_array(value).reshape(-1)[0].item()
    if not isinstance(fill, int):
        raise _NothingKnown
    shape = tuple(c.ints(0) or ())
    if np.prod(shape, dtype=np.float64) > _LONGEST:
        raise _NothingKnown
    return _array([fill] * int(np.prod(shape, dtype=np.int64)), shape)


def _binary(combine: Callable[[Entry, Entry], Entry]) -> Callable[[_Call], Vector]:
    def rule(c: _Call) -> Vector:
        a, b = np.broadcast_arrays(c[0], c[1])
        return _array([combine(x, y) for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True)], a.shape)

    return rule


def _add(a: Entry, b: Entry) -> Entry:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else a if b == 0 else UNKNOWN


def _sub(a: Entry, b: Entry) -> Entry:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    if isinstance(a, Symbol) and a == b:
        return 0
    return a if b == 0 else UNKNOWN


def _mul(a: Entry, b: Entry) -> Entry:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if a == 0 or b == 0:
        return 0
    return b if a == 1 else a if b == 1 else UNKNOWN


def _div(a: Entry, b: Entry) -> Entry:
    if isinstance(a, int) and isinstance(b, int) and b != 0:
        return int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)  # ONNX divides integers towards zero
    return a if b == 1 else UNKNOWN


def _equal(a: Entry, b: Entry) -> Entry:
    if isinstance(a, _Unknown) or isinstance(b, _Unknown):
        return UNKNOWN
    if a == b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    number = a if isinstance(a, int) else b if isinstance(b, int) else 0
    return False if number < 0 else UNKNOWN


def _where(c: _Call) -> Vector:
    condition, a, b = np.broadcast_arrays(c[0], c[1], c[2])
    flat = zip(condition.reshape(-1), a.reshape(-1), b.reshape(-1), strict=True)
    chosen = [(x if k else y) if isinstance(k, int) else x if x == y else UNKNOWN for k, x, y in flat]
    return _array(chosen, condition.shape)


def _reduce_prod(c: _Call) -> Vector:
    x, axes = c[0], c.ints(1)
    if x.ndim != 1 or axes not in (None, [0], [-1]):
        raise _NothingKnown
    product: Entry = 1
    for entry in x:
        product = _mul(product, entry)
    return _array([product], (1,) if c.attribute("keepdims", 1) else ())


def _wrapped(x: Any) -> Vector:
    # numpy hands out bare objects for zero-dimensional results.
    return x if isinstance(x, np.ndarray) and x.dtype == object else _array([x], ())


_RULES: dict[str, Callable[[_Call], Vector]] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Cast": _cast,
    "Reshape": _reshape,
    "Identity": lambda c: c[0],
    "ConstantOfShape": _constant_of_shape,
    "Add": _binary(_add),
    "Sub": _binary(_sub),
    "Mul": _binary(_mul),
    "Div": _binary(_div),
    "Equal": _binary(_equal),
    "Where": _where,
    "ReduceProd": _reduce_prod,
}

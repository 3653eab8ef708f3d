"""From arrays to checked samples: names, shapes, dtypes, finite values.

Three steps, used by every array source: `bind` gives each array its input's name, `count` tells how many
samples the arrays hold, `pick` makes sample i of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright.data.dataset import InputInfo, Sample
from bitwright.errors import DataError

Array = Tensor | NDArray[Any]
LABEL_KEYS = ("label", "labels", "y")
LABEL_HELP = "Labels go into a dictionary under the key 'label', next to the input names."


def bind(item: object, inputs: Mapping[str, InputInfo], *, where: str) -> tuple[dict[str, Array], Any]:
    """The arrays of *item* by input name, and its label or None.

    *item*: a tensor or array (one input), a tuple or list (in the order of the inputs), or a dictionary with
    the input names and perhaps one of `LABEL_KEYS`. A model with one input takes any single key.
    """
    label = None
    if isinstance(item, Mapping):
        values = dict(item)
        keys = [key for key in LABEL_KEYS if key in values and key not in inputs]
        if len(keys) > 1:
            raise DataError(where, expected="one label key", found=" and ".join(keys), remedy="Keep one.")
        label = values.pop(keys[0]) if keys else None
        if len(inputs) == 1 == len(values):
            values = dict(zip(inputs, values.values(), strict=True))
    elif isinstance(item, tuple | list):
        if len(item) != len(inputs):
            raise DataError(
                where,
                expected=f"{len(inputs)} array(s), for {_listed(inputs)}",
                found=f"a {type(item).__name__} of {len(item)}",
                remedy=LABEL_HELP,
            )
        values = dict(zip(inputs, item, strict=True))
    else:
        values = {"": item} if len(inputs) != 1 else {next(iter(inputs)): item}
    if set(values) != set(inputs):
        raise DataError(
            where,
            expected=f"arrays named {_listed(inputs)}",
            found=_listed(values) if values.keys() != {""} else "one array without a name",
            remedy=f"Name the arrays after the model's inputs. {LABEL_HELP}",
        )
    return {name: _as_array(values[name], where=f"{where}, input {name!r}") for name in inputs}, label


def count(arrays: Mapping[str, Array], inputs: Mapping[str, InputInfo], *, where: str) -> int:
    """How many samples *arrays* hold (>= 1). *raises* `DataError` for wrong shapes and unequal counts."""
    counts = {name: _count_one(tuple(arrays[name].shape), inputs[name], where=where) for name in inputs}
    sizes = {n for n in counts.values() if n is not None}
    if len(sizes) > 1:
        raise DataError(
            where,
            expected="the same number of samples for every input",
            found=", ".join(f"{n} for {name!r}" for name, n in counts.items() if n is not None),
            remedy="Give every input one entry per sample.",
        )
    return sizes.pop() if sizes else 1


def pick(arrays: Mapping[str, Array], index: int, inputs: Mapping[str, InputInfo], *, where: str) -> Sample:
    """Sample *index* of *arrays*: copies of the model's dtype, with a batch axis of 1. Call `count` before."""
    sample = {}
    for name, info in inputs.items():
        x = arrays[name]
        depth = x.ndim - len(info.sample_shape)  # axes in front of the sample itself, see _count_one
        if depth == 2 or (depth == 1 and not info.is_batched):
            x = x[index]
        elif depth == 1:
            x = x[index : index + 1]
        elif info.is_batched:
            x = x[None]
        sample[name] = convert(x, info, where=f"{where}, input {name!r}")
    return sample


def convert(x: Array, info: InputInfo, *, where: str) -> Tensor:
    """A copy of *x* as a tensor of the input's dtype; same shape.

    Floats become the input's float dtype, integers and booleans any wider kind; an integer input takes
    integers that fit. *raises* `DataError` for anything that would lose its meaning, and for NaN and Inf.
    """
    source = x.dtype if isinstance(x, Tensor) else torch.from_numpy(np.empty(0, x.dtype)).dtype
    if not _is_safe(source, info.dtype):
        raise DataError(
            where,
            expected=f"values of dtype {_dtype_name(info.dtype)}",
            found=_dtype_name(source),
            remedy="Store the samples with the dtype of the input.",
        )
    if not info.dtype.is_floating_point and info.dtype != torch.bool and source != info.dtype:
        _check_limits(x, info.dtype, where=where)
    y = (x.clone() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, order="C"))).to(info.dtype)
    if info.dtype.is_floating_point and not bool(torch.isfinite(y).all()):
        bad = ~torch.isfinite(y)
        first = [int(i) for i in bad.nonzero()[0]]
        raise DataError(
            where,
            expected=f"finite {_dtype_name(info.dtype)} values",
            found=f"{int(y.isnan().sum())} NaN and {int(y.isinf().sum())} infinite of {y.numel()}, "
            f"the first at {first}",
            remedy="Remove or repair this sample.",
        )
    return y


def _count_one(shape: tuple[int, ...], info: InputInfo, *, where: str) -> int | None:
    """Samples in one array; None: the array is whole and serves every sample.

    Accepted: the sample itself, `[n, *sample]`, and for batched inputs also `[n, 1, *sample]`.
    """
    want = info.sample_shape
    depth = len(shape) - len(want)
    front = shape[: max(depth, 0)]
    fits = depth in (0, 1) or (depth == 2 and info.is_batched and front[1] == 1)
    if not fits or any(w not in (None, s) for w, s in zip(want, shape[depth:], strict=True)):
        raise DataError(
            f"{where}, input {info.name!r}",
            expected=f"shape {show_shape(('n', *want))}",
            found=f"shape {show_shape(shape)}",
            remedy="The first axis counts the samples; the others must be those of the model's input.",
        )
    if front and front[0] == 0:
        raise DataError(
            f"{where}, input {info.name!r}",
            expected="at least one sample",
            found=f"shape {show_shape(shape)}",
            remedy="Give data with samples in it.",
        )
    if front:
        return front[0]
    return 1 if info.is_batched else None


def show_shape(shape: tuple[int | str | None, ...]) -> str:
    """A shape for messages: `[n, 3, ?, ?]`, where ? is any length."""
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def _as_array(value: object, *, where: str) -> Array:
    if isinstance(value, Tensor):
        if value.layout == torch.strided and not value.is_quantized:
            return value.detach().cpu()
    elif isinstance(value, np.ndarray | np.generic | float | int):
        x = np.asarray(value)
        if x.dtype.kind in "buif":
            native = x.astype(x.dtype.newbyteorder("="), copy=False)
            return native if native.dtype.itemsize <= 8 else native.astype(np.float64)
        raise DataError(
            where, expected="an array of numbers", found=f"dtype {x.dtype}", remedy="Store plain numbers."
        )
    raise DataError(
        where,
        expected="a dense tensor or array",
        found=f"a {type(value).__name__}",
        remedy="Give torch tensors or NumPy arrays.",
    )


def _is_safe(source: torch.dtype, target: torch.dtype) -> bool:
    if source == target or source == torch.bool:
        return True
    if source.is_complex or target.is_complex or target == torch.bool:
        return False
    return target.is_floating_point or not source.is_floating_point


def _check_limits(x: Array, dtype: torch.dtype, *, where: str) -> None:
    """*x*: integers. They must fit *dtype*; a silent wrap-around would be another sample."""
    limits = torch.iinfo(dtype)
    codes = x.numpy() if isinstance(x, Tensor) else x
    if codes.size and (int(codes.min()) < limits.min or int(codes.max()) > limits.max):
        raise DataError(
            where,
            expected=f"{_dtype_name(dtype)} values in {limits.min} … {limits.max}",
            found=f"{int(codes.min())} … {int(codes.max())}",
            remedy="Store the samples with the dtype of the input.",
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"

"""Binding, counting, picking and converting arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.data import InputInfo
from bitwright.data.sample import bind, convert, count, pick
from bitwright.errors import DataError

ONE = {"x": InputInfo("x", (1, 3), torch.float32)}
TWO = {"a": InputInfo("a", (None, 3), torch.float32), "b": InputInfo("b", (None, 2), torch.int64)}


def _count(x: Any, inputs: dict[str, InputInfo]) -> int:
    return count(bind(x, inputs, where="t")[0], inputs, where="t")


def test_arrays_are_bound_by_order_and_by_name() -> None:
    a, b = np.zeros((1, 3), np.float32), torch.zeros(1, 2)

    for item in ((a, b), [a, b], {"b": b, "a": a}):
        arrays, label = bind(item, TWO, where="t")
        assert list(arrays) == ["a", "b"]
        assert (arrays["a"].shape[1], arrays["b"].shape[1], label) == (3, 2, None)


@pytest.mark.parametrize("key", ["label", "labels", "y"])
def test_a_dictionary_may_carry_a_label(key: str) -> None:
    arrays, label = bind({"anything": np.zeros((1, 3)), key: 7}, ONE, where="t")

    assert list(arrays) == ["x"]
    assert label == 7


def test_a_label_key_that_names_an_input_is_that_input() -> None:
    inputs = {"y": InputInfo("y", (1, 3), torch.float32)}

    arrays, label = bind({"y": np.ones((1, 3))}, inputs, where="t")
    assert label is None
    assert arrays["y"].shape == (1, 3)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"a": np.zeros((1, 3)), "c": np.zeros((1, 2))}, r"arrays named 'a', 'b'; found 'a', 'c'"),
        ({"a": np.zeros((1, 3))}, r"arrays named 'a', 'b'; found 'a'"),
        ({"label": 3}, r"arrays named 'a', 'b'; found nothing"),
        (np.zeros((1, 3)), r"found one array without a name"),
        ((np.zeros((1, 3)),), r"2 array\(s\), for 'a', 'b'; found a tuple of 1"),
        (({}, {}), r"input 'a': expected a dense tensor or array; found a dict"),
        ((np.array(["s"]), 1), r"input 'a': expected an array of numbers"),
        ({"a": 1, "b": 2, "y": 3, "label": 3}, r"one label key; found label and y"),
    ],
)
def test_items_that_do_not_match_the_inputs_are_refused(item: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bind(item, TWO, where="t")


def test_a_pair_of_input_and_label_is_not_guessed_but_explained() -> None:
    with pytest.raises(DataError, match=r"found a tuple of 2\. Labels go into a dictionary"):
        bind((np.zeros((1, 3)), 5), ONE, where="t")


@pytest.mark.parametrize(
    ("input_shape", "shape", "n"),
    [
        ((1, 3), (3,), 1),
        ((1, 3), (1, 3), 1),
        ((None, 3), (5, 3), 5),
        ((1, 3), (5, 1, 3), 5),
        ((1, None), (5, 8), 5),
        ((2, 3), (2, 3), 1),  # whole: no batch axis
        ((2, 3), (5, 2, 3), 5),
        ((), (), 1),
        ((), (5,), 5),
    ],
)
def test_the_number_of_samples_follows_from_the_shape(
    input_shape: tuple[int | None, ...], shape: tuple[int, ...], n: int
) -> None:
    inputs = {"x": InputInfo("x", input_shape, torch.float32)}
    x = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)

    assert _count(x, inputs) == n
    joined = [pick({"x": x}, i, inputs, where="t")["x"] for i in range(n)]
    assert all(y.ndim == len(input_shape) for y in joined)
    assert torch.cat([y.flatten() for y in joined]).tolist() == x.flatten().tolist()


@pytest.mark.parametrize("shape", [(1, 4), (4,), (5, 2, 3), (1, 1, 1, 3), (), (3, 1)])
def test_a_shape_that_is_not_the_inputs_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"t, input 'x': expected shape \[n, 3\]; found shape"):
        _count(np.zeros(shape), ONE)


def test_no_samples_at_all_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least one sample; found shape \[0, 3\]"):
        _count(np.zeros((0, 3)), ONE)


def test_inputs_must_agree_on_the_number_of_samples() -> None:
    with pytest.raises(DataError, match=r"found 4 for 'a', 5 for 'b'"):
        _count((np.zeros((4, 3)), np.zeros((5, 2), int)), TWO)


def test_a_whole_input_serves_every_sample() -> None:
    inputs = TWO | {"rate": InputInfo("rate", (), torch.int64)}
    arrays, _ = bind((np.zeros((4, 3)), np.zeros((4, 2), int), 16000), inputs, where="t")

    assert count(arrays, inputs, where="t") == 4
    assert pick(arrays, 3, inputs, where="t")["rate"] == torch.tensor(16000)


SAFE = {
    torch.float32: [np.float64, np.float32, np.float16, np.uint8, np.int64, np.bool_, np.uint16],
    torch.int32: [np.int64, np.uint8, np.int8, np.bool_, np.uint32, np.uint64],
    torch.uint8: [np.int64, np.bool_],
    torch.bool: [np.bool_],
}
KINDS = [np.float64, np.float32, np.float16, np.uint8, np.int8, np.int64, np.bool_, np.uint16, np.uint32]
KINDS += [np.uint64]


@pytest.mark.parametrize("target", SAFE)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_converted_only_where_their_meaning_stays(target: torch.dtype, kind: type) -> None:
    info = InputInfo("x", (1, 2), target)
    x = np.array([[0, 1]], kind)
    is_integer = np.issubdtype(kind, np.integer)
    allowed = kind in SAFE[target] or (is_integer and target != torch.bool)

    if allowed:
        y = convert(x, info, where="t")
        assert (y.dtype, y.tolist()) == (target, [[0, 1]])
    else:
        with pytest.raises(DataError, match=r"expected values of dtype .*; found"):
            convert(x, info, where="t")


@given(st.integers(-(2**40), 2**40))
def test_integers_are_kept_exactly_or_refused(value: int) -> None:
    info = InputInfo("x", (1,), torch.int16)
    x = np.array([value], np.int64)

    if -(2**15) <= value < 2**15:
        assert int(convert(x, info, where="t")) == value
    else:
        with pytest.raises(DataError, match=r"int16 values in -32768 … 32767; found"):
            convert(torch.from_numpy(x), info, where="t")


def test_nan_and_infinity_are_counted_and_located() -> None:
    x = np.zeros((1, 3), np.float32)
    x[0, 1:] = np.nan, np.inf

    with pytest.raises(
        DataError, match=r"t: expected finite .*found 1 NaN and 1 infinite of 3, the first at \[0, 1\]"
    ):
        convert(x, ONE["x"], where="t")


def test_a_double_beyond_float32_is_refused_instead_of_becoming_infinite() -> None:
    with pytest.raises(DataError, match="1 infinite"):
        convert(np.array([[1e300, 0, 0]]), ONE["x"], where="t")


def test_big_endian_read_only_and_reversed_arrays_are_taken() -> None:
    x = np.arange(3, dtype=">f4")[None, ::-1]
    x.flags.writeable = False

    arrays, _ = bind(x, ONE, where="t")
    assert pick(arrays, 0, ONE, where="t")["x"].tolist() == [[2, 1, 0]]


def test_a_sample_is_a_copy_of_the_users_tensor() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    arrays, _ = bind(x, ONE, where="t")

    sample = pick(arrays, 1, ONE, where="t")["x"]
    sample += 1
    assert not sample.requires_grad
    assert x.sum() == 0

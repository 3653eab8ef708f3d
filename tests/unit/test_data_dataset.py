"""`Dataset`: choosing, batching, reading again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.data import Dataset, InputInfo
from bitwright.errors import DataError

X = InputInfo("x", (None, 2), torch.float32)


def _numbers(n: int, *, labels: bool = True) -> Dataset:
    return Dataset(
        tuple(f"sample {i}" for i in range(n)),
        lambda i: {"x": torch.full((1, 2), float(i))},
        {"x": X},
        labels=torch.arange(n) * 10 if labels else None,
    )


def _values(dataset: Dataset) -> list[int]:
    return [int(sample["x"][0, 0]) for sample in dataset]


def test_a_dataset_can_be_read_again_and_from_the_end() -> None:
    data = _numbers(4)

    assert len(data) == 4
    assert _values(data) == _values(data) == [0, 1, 2, 3]
    assert torch.equal(data[-1]["x"], torch.full((1, 2), 3.0))
    with pytest.raises(IndexError):
        data[4]


def test_samples_are_read_only_when_asked_for() -> None:
    read: list[int] = []

    def reading(i: int) -> dict[str, torch.Tensor]:
        read.append(i)
        return {"x": torch.zeros(1, 2)}

    data = Dataset(tuple("abcdef"), reading, {"x": X})
    chosen = data.subset([5, 3, 1]).subset([0, 2])
    assert read == []

    next(iter(chosen.batches(1)))
    assert read == [5]


def test_a_subset_keeps_names_labels_and_samples_together() -> None:
    data = _numbers(5).subset([3, 1, -1]).subset([1, 2])

    assert data.names == ("sample 1", "sample 4")
    assert data.labels is not None
    assert data.labels.tolist() == [10, 40]
    assert _values(data) == [1, 4]


def test_a_subset_of_nothing_is_empty_and_keeps_its_label_type() -> None:
    data = _numbers(3).subset([])

    assert len(data) == 0
    assert data.labels is not None
    assert data.labels.dtype == torch.int64
    assert list(data.batches(2)) == []


@given(st.integers(1, 40), st.integers(0, 50), st.integers(0, 50), st.integers(0, 2**32))
def test_take_repeats_for_one_seed_and_a_smaller_choice_begins_a_larger_one(
    size: int, n: int, more: int, seed: int
) -> None:
    data = _numbers(size)
    few, many = data.take(n, seed), data.take(n + more, seed)

    assert few.names == data.take(n, seed).names
    assert len(set(few.names)) == len(few) == (n if 0 < n < size else size)
    if n > 0 and n + more < size:
        assert many.names[:n] == few.names


def test_take_depends_on_the_seed_but_never_on_the_machine() -> None:
    data = _numbers(100)

    assert _values(data.take(6, seed=0)) == [40, 35, 52, 97, 75, 25]
    assert _values(data.take(6, seed=0)) != _values(data.take(6, seed=1))


@pytest.mark.parametrize("n", [None, 0, 3, 99])
def test_taking_none_zero_or_too_many_gives_all_samples_in_order(n: int | None) -> None:
    assert _values(_numbers(3).take(n, seed=5)) == [0, 1, 2]


def test_taking_a_negative_number_is_refused() -> None:
    with pytest.raises(DataError, match=r"number of samples >= 0; found -1"):
        _numbers(3).take(-1)


@given(st.integers(1, 12), st.integers(1, 15))
def test_batches_hold_every_sample_once_in_order(n: int, size: int) -> None:
    batches = list(_numbers(n).batches(size))

    assert [len(b["x"]) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert torch.cat([b["x"] for b in batches])[:, 0].tolist() == list(range(n))


def test_a_batch_size_of_zero_is_refused_at_the_call() -> None:
    with pytest.raises(DataError, match="batch size >= 1"):
        _numbers(3).batches(0)


def test_samples_of_different_shape_need_a_batch_size_of_one() -> None:
    info = InputInfo("x", (None, None), torch.float32)
    data = Dataset(("a", "b"), lambda i: {"x": torch.zeros(1, i + 1)}, {"x": info})

    assert [tuple(b["x"].shape) for b in data.batches(1)] == [(1, 1), (1, 2)]
    with pytest.raises(DataError, match=r"a … b, input 'x'.*different shapes.*batch size of 1"):
        list(data.batches(2))


def test_a_whole_input_is_passed_once_if_the_batch_agrees_on_it() -> None:
    inputs = {"x": X, "rate": InputInfo("rate", (), torch.int64)}
    data = Dataset(
        ("a", "b", "c"),
        lambda i: {"x": torch.zeros(1, 2), "rate": torch.tensor(8 if i < 2 else 16)},
        inputs,
    )

    first = next(data.batches(2))
    assert first["x"].shape == (2, 2)
    assert first["rate"].shape == ()
    with pytest.raises(DataError, match="'rate'"):
        list(data.batches(3))


def test_a_state_whose_batch_is_another_axis_is_never_batched() -> None:
    info = InputInfo("state", (2, None, 4), torch.float32)
    data = Dataset(("a", "b"), lambda i: {"state": torch.zeros(2, 1, 4)}, {"state": info})

    with pytest.raises(DataError, match="without a batch axis"):
        list(data.batches(2))


@pytest.mark.parametrize(
    ("shape", "is_batched", "sample_shape"),
    [
        ((1, 3, 4), True, (3, 4)),
        ((None, 3, None), True, (3, None)),
        ((2, 1, 128), False, (2, 1, 128)),
        ((), False, ()),
    ],
)
def test_the_first_axis_is_the_batch_if_it_is_one_or_open(
    shape: tuple[int | None, ...], is_batched: bool, sample_shape: tuple[int | None, ...]
) -> None:
    info = InputInfo("x", shape, torch.float32)

    assert (info.is_batched, info.sample_shape) == (is_batched, sample_shape)

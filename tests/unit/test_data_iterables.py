"""Python objects and loader functions as data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bitwright.data import InputInfo, open_data
from bitwright.data.iterables import open_object
from bitwright.errors import DataError

ONE = {"x": InputInfo("x", (1, 3), torch.float32)}
TWO = {"a": InputInfo("a", (None, 3), torch.float32), "b": InputInfo("b", (None, 2), torch.int64)}
ROWS = torch.arange(12.0).reshape(4, 3)


def _stacked(data: Any, name: str = "x") -> Tensor:
    return torch.cat([sample[name] for sample in data])


@pytest.mark.parametrize(
    "source",
    [
        ROWS,
        ROWS.numpy(),
        {"x": ROWS},
        list(ROWS),
        [ROWS[:1], ROWS[1:]],
        [{"x": row[None]} for row in ROWS],
        TensorDataset(ROWS),
        DataLoader(TensorDataset(ROWS), batch_size=3),
        iter(ROWS),
        (row for row in ROWS.numpy()),
    ],
    ids=["tensor", "array", "dict", "rows", "batches", "dicts", "map", "loader", "iterator", "generator"],
)
def test_every_form_of_the_same_samples_gives_the_same_dataset(source: object) -> None:
    data = open_data(source, ONE)

    assert data.names == ("0", "1", "2", "3")
    assert data.labels is None
    for _ in range(2):
        assert torch.equal(_stacked(data), ROWS)
    assert data[2]["x"].shape == (1, 3)


def test_tuples_follow_the_order_of_the_inputs() -> None:
    items = [(torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.int64)), (torch.ones(3), np.array([5, 6]))]
    data = open_data(items, TWO)

    assert len(data) == 3
    assert data[2]["b"].tolist() == [[5, 6]]


def test_labels_come_under_the_key_label() -> None:
    items = [{"x": ROWS[:3], "label": torch.tensor([5, 6, 7])}, {"x": ROWS[3:], "label": 8}]

    for source in (items, iter(items)):
        data = open_data(source, ONE)
        assert data.labels is not None
        assert data.labels.tolist() == [5, 6, 7, 8]


def test_labels_may_be_an_attribute_of_a_sequence() -> None:
    class Numbers(list[Tensor]):
        labels = (3, 2, 1, 0)

    data = open_data(Numbers(ROWS), ONE)
    assert data.labels is not None
    assert data.labels.tolist() == [3, 2, 1, 0]


def test_a_dictionary_of_arrays_may_hold_labels() -> None:
    data = open_data({"x": ROWS, "y": np.arange(4)}, ONE)

    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2, 3]


def test_a_label_file_fits_python_data_too(tmp_path: Path) -> None:
    (tmp_path / "y.txt").write_text("1\n2\n")

    with pytest.raises(DataError, match=r"4 label\(s\).*found 2 labels"):
        open_data(ROWS, ONE, labels=tmp_path / "y.txt")


@pytest.mark.parametrize("has_label", [(True, False), (False, True), (False, False, True)])
@pytest.mark.parametrize("form", [list, iter])
def test_labels_with_some_samples_only_are_refused(has_label: tuple[bool, ...], form: Any) -> None:
    items = [{"x": ROWS[:1], **({"label": 1} if has else {})} for has in has_label]

    with pytest.raises(
        DataError, match=rf"item {len(items) - 1}: expected a label with every sample or with none"
    ):
        open_data(form(items), ONE)


def test_a_dataset_is_taken_as_it_is() -> None:
    data = open_data(ROWS, ONE).take(2)

    assert open_data(data, ONE) is data


def test_a_sequence_is_not_kept_in_memory_but_read_again() -> None:
    class Counting:
        reads = 0

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:
            self.reads += 1
            return ROWS[index]

    source = Counting()
    data = open_data(source, ONE)
    assert source.reads == 4
    assert torch.equal(data[3]["x"][0], ROWS[3])
    assert source.reads == 5


def test_a_shuffling_loader_is_read_once_so_that_labels_stay_with_their_samples() -> None:
    items = [{"x": torch.full((3,), float(i)), "label": i} for i in range(20)]
    data = open_data(DataLoader(items, batch_size=4, shuffle=True), ONE)  # type: ignore[arg-type]

    assert data.labels is not None
    assert _stacked(data)[:, 0].tolist() == data.labels.tolist()
    assert sorted(data.labels.tolist()) == list(range(20))


def test_a_generator_may_reuse_its_buffer() -> None:
    def rows() -> Iterator[Any]:
        buffer = np.zeros((1, 3), np.float32)
        for i in range(3):
            buffer[:] = i
            yield buffer

    assert _stacked(open_data(rows(), ONE))[:, 0].tolist() == [0, 1, 2]


def test_an_endless_generator_is_stopped_at_the_limit() -> None:
    def rows() -> Iterator[Tensor]:
        while True:
            yield ROWS

    with pytest.raises(DataError, match=r"at most 100 bytes .*; found more, after 8 samples"):
        open_object(rows(), ONE, where="data", limit=100)


def test_an_iterable_torch_dataset_with_a_length_is_iterated() -> None:
    class Stream(IterableDataset[Tensor]):
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[Tensor]:
            return iter(ROWS)

    assert torch.equal(_stacked(open_data(Stream(), ONE)), ROWS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, r"an iterable of samples.*found a int"),
        (None, r"found a NoneType"),
        (lambda: ROWS, r"found a function"),
        ([], r"at least one sample; found none"),
        (iter([]), r"at least one sample; found none"),
        (
            [ROWS, torch.zeros(2, 4)],
            r"data, item 1, input 'x': expected shape \[n, 3\]; found shape \[2, 4\]",
        ),
        ([ROWS, "text"], r"data, item 1, input 'x': .*found a str"),
        ([(ROWS, 1)], r"data, item 0: .*a tuple of 2\. Labels go into a dictionary under the key 'label'"),
    ],
)
def test_objects_that_are_no_data_are_refused(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(source, ONE)


def test_nan_in_an_item_is_reported_with_its_number() -> None:
    items = [ROWS, torch.full((1, 3), torch.nan)]

    with pytest.raises(DataError, match=r"item 1, input 'x': expected finite"):
        open_data(items, ONE)[4]
    with pytest.raises(DataError, match=r"item 1, input 'x': expected finite"):
        open_data(iter(items), ONE)


def test_an_error_of_the_users_code_keeps_its_message() -> None:
    class Broken:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Tensor:
            raise RuntimeError("disk on fire")

    def rows() -> Iterator[Tensor]:
        yield ROWS
        raise RuntimeError("disk on fire")

    for source in (Broken(), rows()):
        with pytest.raises(DataError, match="it raised RuntimeError: disk on fire") as caught:
            open_data(source, ONE)
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_sequence_that_shrinks_its_items_is_noticed() -> None:
    items = [ROWS]
    data = open_data(items, ONE)
    items[0] = ROWS[:2]

    with pytest.raises(
        DataError, match=r"item 0: expected more than 3 samples, as when it was opened; found 2"
    ):
        data[3]


LOADER = """
import torch
import {helper}

def samples():
    import {helper}
    for i in range({helper}.N):
        yield {{"x": torch.full((1, 3), float(i)), "label": i}}

def broken():
    raise KeyError("no such column")

def nothing():
    return None

number = 5
"""


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A loader file `my_<unique>.py` beside a module that it imports; import state is restored."""
    helper = f"helper_{abs(hash(tmp_path))}"
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / f"{helper}.py").write_text("N = 3\n")
    path = tmp_path / f"my_{helper}.py"
    path.write_text(LOADER.format(helper=helper))
    return path


def test_a_loader_function_in_a_file_gives_the_samples(loader: Path) -> None:
    data = open_data(f"{loader}:samples", ONE)

    assert _stacked(data)[:, 0].tolist() == [0, 1, 2]
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2]


def test_a_loader_function_in_a_module_of_the_current_folder_is_found(
    loader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(loader.parent)

    assert len(open_data(f"{loader.stem}:samples", ONE)) == 3


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "broken",
            r"my_.*:broken: expected samples from your code; found it raised KeyError: 'no such column'",
        ),
        ("nothing", r"an iterable of samples.*found a NoneType"),
        ("number", r"a function 'number'.*found a int"),
        ("missing", r"a function 'missing'.*found nothing of that name"),
    ],
)
def test_a_loader_function_that_gives_no_samples_is_refused(
    loader: Path, function: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_data(f"{loader}:{function}", ONE)


def test_a_loader_that_cannot_be_imported_is_refused(loader: Path) -> None:
    loader.write_text("import nonexistent_module_of_mine")

    with pytest.raises(
        DataError, match=r"found ModuleNotFoundError: No module named 'nonexistent_module_of_mine'"
    ):
        open_data(f"{loader}:samples", ONE)
    with pytest.raises(DataError, match=r"an importable module 'nonexistent.mine'"):
        open_data("nonexistent.mine:samples", ONE)
    with pytest.raises(DataError, match=r"gone.py; found FileNotFoundError"):
        open_data(f"{loader.parent / 'gone.py'}:samples", ONE)

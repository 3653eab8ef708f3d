"""Label files and label arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitwright.data.labels import as_labels, read_named_labels, read_row_labels
from bitwright.errors import DataError

NAMES = ("a.jpg", "my cat 2.jpg", "sub/b.jpg")


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_named_labels_come_in_the_order_of_the_files(tmp_path: Path) -> None:
    path = _file(tmp_path, "\ufeff# made by hand\n\nsub/b.jpg 5  # a dog\nmy cat 2.jpg\t3\n  ./a.jpg   0\r\n")
    labels = read_named_labels(path, NAMES)

    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 3, 5]


def test_the_last_part_of_a_path_is_enough_where_it_is_unique(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.jpg 1\nmy cat 2.jpg 2\nb.jpg 3\n")

    assert read_named_labels(path, NAMES).tolist() == [1, 2, 3]


def test_a_full_path_comes_before_the_last_part_of_another(tmp_path: Path) -> None:
    path = _file(tmp_path, "b.jpg 1\nsub\\b.jpg 2\n")

    assert read_named_labels(path, ("b.jpg", "sub/b.jpg")).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 1\nb.jpg cat\n", r"line 2: expected a file name and a label.*'b.jpg cat'"),
        ("a.jpg 1.5\n", r"line 1: expected a file name and a label"),
        ("a.jpg -1\n", r"line 1: expected a file name and a label, an integer >= 0"),
        ("# c\na.jpg\n", r"line 2: expected a file name and a label.*'a.jpg'"),
        ("a.jpg 1\nz.jpg 2\n", r"line 2: expected a file of the data folder; found 'z.jpg'"),
        (
            "a.jpg 1\n\na.jpg 1\n",
            r"line 3: expected one label for each file; found 'a.jpg' again, first in line 1",
        ),
        ("a.jpg 1\n", r"a label for each of 3 files; found 2 without: my cat 2.jpg, sub/b.jpg"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_named_labels(_file(tmp_path, text), NAMES)


def test_a_name_of_two_files_must_be_written_as_a_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: .*the name of 2 files\. Write the path"):
        read_named_labels(_file(tmp_path, "b.jpg 1\n"), ("x/b.jpg", "y/b.jpg"))


def test_a_long_list_of_files_without_label_is_cut(tmp_path: Path) -> None:
    names = tuple(f"{i:02}.jpg" for i in range(20))

    with pytest.raises(DataError, match=r"found 19 without: 01.jpg, .*, 10.jpg …\."):
        read_named_labels(_file(tmp_path, "00.jpg 1"), names)


def test_row_labels_are_one_integer_per_line(tmp_path: Path) -> None:
    assert read_row_labels(_file(tmp_path, "# c\n3\n 1 # dog\n\n2"), 3).tolist() == [3, 1, 2]


def test_row_labels_may_be_an_npy_file(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array([[4], [5]], np.uint8))

    assert read_row_labels(tmp_path / "y.npy", 2).tolist() == [4, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\nx\n", r"line 2: expected one label, an integer >= 0; found 'x'"),
        ("1\na.jpg 2\n", r"line 2: expected one label"),
        ("1\n2\n3\n", r"2 label\(s\).*found 3 labels"),
        ("", r"2 label\(s\).*found 0 labels"),
    ],
)
def test_bad_row_labels_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_row_labels(_file(tmp_path, text), 2)


def test_a_missing_or_binary_label_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")

    for name in ("missing.txt", "b.txt"):
        with pytest.raises(DataError, match=f"{name}: expected a readable text file of labels"):
            read_row_labels(tmp_path / name, 2)


@pytest.mark.parametrize("values", [[1, 2], np.array([1, 2], np.uint64), torch.tensor([[1], [2]])])
def test_label_arrays_become_int64(values: object) -> None:
    labels = as_labels(values, 2, where="t")

    assert (labels.dtype, labels.tolist()) == (torch.int64, [1, 2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "found dtype float64"),
        ([True, False], "found dtype bool"),
        (["a", "b"], "found dtype <U1"),
        ([1, -2], "found the label -2 of sample 1"),
        ([1], "found 1 labels"),
        (7, "found 1 labels"),
        (np.zeros((2, 3), int), r"found an array \[2, 3\]"),
        ([[1], [1, 2]], "2 label"),
        (None, "found 1 labels"),
    ],
)
def test_label_arrays_of_another_kind_are_refused(values: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_labels(values, 2, where="t")

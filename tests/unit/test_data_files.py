"""Array files, folders of them, and what is wrong with a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitwright.data import InputInfo, RawOptions, open_data
from bitwright.errors import DataError

ONE = {"x": InputInfo("x", (1, 2, 3), torch.float32)}
TWO = {"a": InputInfo("a", (None, 3), torch.float32), "b": InputInfo("b", (None, 2), torch.int64)}
ROWS = np.arange(24, dtype=np.float32).reshape(4, 2, 3)


def _stacked(data: Any, name: str = "x") -> Any:
    return torch.cat([sample[name] for sample in data]).numpy()


def test_the_first_axis_of_an_npy_file_counts_its_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    data = open_data(str(tmp_path / "x.npy"), ONE)

    assert data.names == ("x.npy[0]", "x.npy[1]", "x.npy[2]", "x.npy[3]")
    assert data[2]["x"].shape == (1, 2, 3)
    np.testing.assert_array_equal(_stacked(data), ROWS)


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 3)])
def test_an_npy_file_of_the_shape_of_the_input_is_one_sample(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "x.npy", np.ones(shape))

    data = open_data(tmp_path / "x.npy", ONE)
    assert len(data) == 1
    assert data[0]["x"].shape == (1, 2, 3)


def test_an_npy_file_in_fortran_order_is_read_right(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.asfortranarray(ROWS))
    np.savez(tmp_path / "x.npz", x=np.asfortranarray(ROWS))

    np.testing.assert_array_equal(_stacked(open_data(tmp_path / "x.npy", ONE)), ROWS)
    np.testing.assert_array_equal(_stacked(open_data(tmp_path / "x.npz", ONE)), ROWS)


def test_samples_of_a_file_are_checked_one_by_one(tmp_path: Path) -> None:
    bad = ROWS.copy()
    bad[2, 1, 0] = np.nan
    np.save(tmp_path / "x.npy", bad)
    data = open_data(tmp_path / "x.npy", ONE)

    assert torch.equal(data[1]["x"][0], torch.from_numpy(ROWS[1]))
    with pytest.raises(DataError, match=r"x.npy, sample 2, input 'x': expected finite .*at \[0, 1, 0\]"):
        data[2]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_holds_all_inputs_and_labels(tmp_path: Path, save: Any) -> None:
    a, b = np.random.default_rng(0).normal(size=(5, 3)), np.arange(10).reshape(5, 2)
    save(tmp_path / "d.npz", b=b, a=a, y=np.arange(5, dtype=np.int32))
    data = open_data(tmp_path / "d.npz", TWO)

    assert list(data[0]) == ["a", "b"]
    np.testing.assert_array_equal(_stacked(data, "a"), a.astype(np.float32))
    np.testing.assert_array_equal(_stacked(data, "b"), b)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2, 3, 4]


def test_a_model_with_one_input_takes_any_key(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", arr_0=ROWS)

    np.testing.assert_array_equal(_stacked(open_data(tmp_path / "d.npz", ONE)), ROWS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros((5, 3)), "c": np.zeros((5, 2), int)}, r"named 'a', 'b'; found 'a', 'c'"),
        ({"a": np.zeros((5, 3)), "b": np.zeros((4, 2), int)}, r"found 5 for 'a', 4 for 'b'"),
        (
            {"a": np.zeros((5, 4)), "b": np.zeros((5, 2), int)},
            r"input 'a': expected shape \[n, 3\]; found shape \[5, 4\]",
        ),
        ({"a": np.zeros((0, 3)), "b": np.zeros((0, 2), int)}, r"at least one sample"),
        (
            {"a": np.zeros((5, 3)), "b": np.zeros((5, 2), int), "y": np.arange(4)},
            r"5 label\(s\).*found 4 labels",
        ),
        ({"a": np.zeros((5, 3)), "b": np.zeros((5, 2), int), "y": np.zeros(5)}, r"found dtype float64"),
        ({"a": np.array([None]), "b": np.zeros((5, 2), int)}, r"expected a readable .npz"),
        ({}, r"named 'a', 'b'; found nothing"),
    ],
)
def test_an_npz_file_that_does_not_fit_is_refused_when_opened(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)

    with pytest.raises(DataError, match=message):
        open_data(tmp_path / "d.npz", TWO)


def test_a_float_for_an_integer_input_is_refused_with_the_sample_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", a=np.zeros((5, 3)), b=np.zeros((5, 2)))

    with pytest.raises(
        DataError, match=r"d.npz, sample 0, input 'b': expected values of dtype int64; found float64"
    ):
        open_data(tmp_path / "d.npz", TWO)[0]


def test_a_bin_file_is_cut_into_samples_of_the_input(tmp_path: Path) -> None:
    ROWS.tofile(tmp_path / "x.bin")

    data = open_data(tmp_path / "x.bin", ONE)
    assert len(data) == 4
    np.testing.assert_array_equal(_stacked(data), ROWS)


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3)])
def test_a_bin_file_may_state_its_own_layout(tmp_path: Path, shape: tuple[int, ...]) -> None:
    ROWS.astype(np.uint8).tofile(tmp_path / "x.bin")
    inputs = {"x": InputInfo("x", (None, None, 3), torch.float32)}

    data = open_data(tmp_path / "x.bin", inputs, raw=RawOptions(shape=shape, dtype=torch.uint8))
    np.testing.assert_array_equal(_stacked(data), ROWS)


@pytest.mark.parametrize("size", [0, 23, 25])
def test_a_bin_file_must_be_a_multiple_of_a_sample(tmp_path: Path, size: int) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(size))

    with pytest.raises(
        DataError, match=rf"a multiple of 24 bytes.*\[2, 3\] of float32; found {size} bytes.*--bin-shape"
    ):
        open_data(tmp_path / "x.bin", ONE)


def test_a_bin_file_for_an_open_shape_needs_its_shape(tmp_path: Path) -> None:
    ROWS.tofile(tmp_path / "x.bin")
    inputs = {"x": InputInfo("x", (1, None, 3), torch.float32)}

    with pytest.raises(DataError, match=r"the shape of one sample.*--bin-shape 3,224,224"):
        open_data(tmp_path / "x.bin", inputs)
    with pytest.raises(DataError, match=r"expected shape \[n, \?, 3\]; found shape \[6, 4\]"):
        open_data(tmp_path / "x.bin", inputs, raw=RawOptions(shape=(4,)))
    with pytest.raises(DataError, match="axes of at least 1"):
        RawOptions(shape=(0, 3))


@pytest.mark.parametrize("suffix", ["npy", "npz", "bin"])
def test_every_file_of_a_folder_is_one_sample(tmp_path: Path, suffix: str) -> None:
    for i in (2, 0, 1, 3):
        path = tmp_path / f"{i}.{suffix}"
        if suffix == "npy":
            np.save(path, ROWS[i] if i % 2 else ROWS[i : i + 1])
        elif suffix == "npz":
            np.savez(path, x=ROWS[i])
        else:
            ROWS[i].tofile(path)
    (tmp_path / "labels.txt").write_text("".join(f"{i}.{suffix} {9 - i}\n" for i in range(4)))
    data = open_data(tmp_path, ONE)

    assert data.names == tuple(f"{i}.{suffix}" for i in range(4))
    np.testing.assert_array_equal(_stacked(data), ROWS)
    assert data.labels is not None
    assert data.labels.tolist() == [9, 8, 7, 6]


def test_several_samples_in_a_file_of_a_folder_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)

    with pytest.raises(DataError, match=r"x.npy: expected one sample, .*found 4 samples"):
        open_data(tmp_path, ONE)[0]


def test_labels_inside_npz_files_of_a_folder_are_all_or_none(tmp_path: Path) -> None:
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", x=ROWS[i], label=i + 5)
    data = open_data(tmp_path, ONE)
    assert data.labels is not None
    assert data.labels.tolist() == [5, 6, 7]

    np.savez(tmp_path / "0.npz", x=ROWS[0])
    with pytest.raises(DataError, match=r"a label in every file or in none; found 1 without: 0.npz"):
        open_data(tmp_path, ONE)


def test_a_label_file_belongs_to_the_rows_of_an_array_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=ROWS, y=np.zeros(4, int))
    (tmp_path / "y.txt").write_text("3\n2\n1\n0\n")

    data = open_data(tmp_path / "x.npz", ONE, labels=str(tmp_path / "y.txt"))
    assert data.labels is not None
    assert data.labels.tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"expected a folder with pictures .*; found no files"),
        (["a.txt", "b.csv"], r"found 2 other file\(s\), e.g. a.txt"),
        (["a.npy", "b.npz", "c.npy"], r"files of one kind; found 2 .npy \(a.npy\), 1 .npz \(b.npz\)"),
        (["a.jpg", "b.bin"], r"found 1 .bin \(b.bin\), 1 picture \(a.jpg\)"),
        (["a.jpg", "b.gif"], r"b.gif: .*found a .gif picture\. Convert it"),
    ],
)
def test_a_folder_that_is_no_data_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")

    with pytest.raises(DataError, match=message):
        open_data(tmp_path, ONE)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
def test_a_damaged_array_file_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)

    with pytest.raises(DataError, match=rf"x.{suffix}: expected a readable .{suffix} file"):
        open_data(path, ONE)


def test_a_truncated_array_file_is_named(tmp_path: Path) -> None:
    for name, save in (("x.npy", np.save), ("x.npz", np.savez)):
        save(tmp_path / name, ROWS)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
        with pytest.raises(DataError, match=f"{name}: expected a readable"):
            open_data(tmp_path / name, ONE)


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object))

    with pytest.raises(DataError, match=r"x.npy: expected a readable .npy file of numbers"):
        open_data(tmp_path / "x.npy", ONE)


@pytest.mark.parametrize("source", ["nothing/here", "nothing.npy", "C:\\data"])
def test_a_path_that_does_not_exist_is_refused(source: str) -> None:
    with pytest.raises(DataError, match=r"no such file or folder\. Check the path"):
        open_data(source, ONE)
    with pytest.raises(DataError, match=r"no such file or folder"):
        open_data(Path("nothing/here"), ONE)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2")

    with pytest.raises(DataError, match=r"found a file .csv\..*loader function"):
        open_data(tmp_path / "x.csv", ONE)


def test_npy_and_bin_files_cannot_feed_two_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)

    with pytest.raises(DataError, match=r"one input for .npy data; found 2 inputs: a, b.*.npz files"):
        open_data(tmp_path / "x.npy", TWO)
    with pytest.raises(DataError, match=r"one input for .npy files"):
        open_data(tmp_path, TWO)


def test_a_model_without_inputs_takes_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a model with inputs"):
        open_data(tmp_path, {})

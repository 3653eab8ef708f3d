"""Files and folders of samples: what is in a path, and a `Dataset` of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitwright.data.arrays import RawOptions, one_input, read_bin, read_npy, read_npz
from bitwright.data.dataset import Dataset, InputInfo, Sample
from bitwright.data.images import (
    IMAGE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    ImageOptions,
    check_picture_input,
    read_picture,
)
from bitwright.data.labels import as_labels, read_named_labels
from bitwright.data.sample import LABEL_KEYS, Array, bind, count, pick
from bitwright.errors import DataError

_KINDS = dict.fromkeys(sorted(IMAGE_SUFFIXES), "picture") | {
    ".npy": ".npy",
    ".npz": ".npz",
    ".bin": ".bin",
}
ACCEPTED = "pictures (.jpg .jpeg .png .bmp .webp), .npy, .npz or .bin files"


@dataclass(frozen=True)
class _Reader:
    """Reads the files of one kind for one model."""

    inputs: Mapping[str, InputInfo]
    image: ImageOptions
    raw: RawOptions

    def arrays(self, path: Path) -> tuple[dict[str, Array], object]:
        """The arrays of *path* by input name, and its label or None."""
        kind = _KINDS[path.suffix.lower()]
        if kind == ".npz":
            return bind(read_npz(path), self.inputs, where=str(path))
        info = one_input(self.inputs, str(path), kind=f"{kind} data")
        if kind == "picture":
            return {info.name: read_picture(path, info, self.image)}, None
        return bind(
            read_npy(path) if kind == ".npy" else read_bin(path, info, self.raw), self.inputs, where=str(path)
        )

    def sample(self, path: Path) -> Sample:
        """The only sample of *path*."""
        arrays, _ = self.arrays(path)
        n = count(arrays, self.inputs, where=str(path))
        if n != 1:
            raise DataError(
                str(path),
                expected="one sample, as in every file of a data folder",
                found=f"{n} samples",
                remedy="Give this file itself as the data, or write one file per sample.",
            )
        return pick(arrays, 0, self.inputs, where=str(path))


def open_file(
    path: Path, inputs: Mapping[str, InputInfo], *, image: ImageOptions, raw: RawOptions
) -> Dataset:
    """The samples of one file: one picture, or the rows of an array file."""
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            str(path),
            expected=f"a folder of samples, or {ACCEPTED}",
            found=f"a file {path.suffix or 'without a suffix'}",
            remedy="Convert the data, or write a loader function: --data loader.py:samples.",
        )
    reader = _Reader(inputs, image, raw)
    if kind == "picture":
        check_picture_input(one_input(inputs, str(path), kind="pictures"), image, str(path))
        return Dataset((path.name,), lambda _: reader.sample(path), inputs, where=str(path))
    arrays, label = reader.arrays(path)
    n = count(arrays, inputs, where=str(path))
    names = tuple(f"{path.name}[{i}]" for i in range(n))
    labels = None if label is None else as_labels(label, n, where=str(path))
    return Dataset(
        names,
        lambda i: pick(arrays, i, inputs, where=f"{path}, sample {i}"),
        inputs,
        labels=labels,
        where=str(path),
    )


def open_folder(
    folder: Path,
    inputs: Mapping[str, InputInfo],
    *,
    image: ImageOptions,
    raw: RawOptions,
    labels: Path | None,
) -> Dataset:
    """One sample per file, sorted by path; labels from *labels*, else `labels.txt`, else the `.npz` files."""
    kind, names = _list_files(folder)
    info = None if kind == ".npz" else one_input(inputs, str(folder), kind=f"{kind} files")
    if info is not None and kind == "picture":
        check_picture_input(info, image, str(folder))
    reader = _Reader(inputs, image, raw)
    labels = labels or (folder / "labels.txt" if (folder / "labels.txt").is_file() else None)
    numbers = None
    if labels is not None:
        numbers = read_named_labels(labels, names)
    elif kind == ".npz":
        numbers = _labels_in_npz(folder, names, inputs)
    return Dataset(
        names, lambda i: reader.sample(folder / names[i]), inputs, labels=numbers, where=str(folder)
    )


def _list_files(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The kind of the samples in *folder* and their relative paths, sorted. Hidden files are no samples."""
    paths = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    visible = sorted(p.as_posix() for p in paths if not any(part.startswith(".") for part in p.parts))
    known: dict[str, list[str]] = {}
    for name in visible:
        suffix = Path(name).suffix.lower()
        if suffix in OTHER_IMAGE_SUFFIXES:
            raise DataError(
                str(folder / name),
                expected=ACCEPTED,
                found=f"a {suffix} picture",
                remedy="Convert it to .png, or remove it.",
            )
        if suffix in _KINDS:
            known.setdefault(_KINDS[suffix], []).append(name)
    if len(known) == 1:
        kind, names = known.popitem()
        return kind, tuple(names)
    if known:
        found = ", ".join(f"{len(names)} {kind} ({names[0]})" for kind, names in sorted(known.items()))
        raise DataError(
            str(folder),
            expected="files of one kind",
            found=found,
            remedy="Keep one kind in this folder; move the others elsewhere.",
        )
    found = f"{len(visible)} other file(s), e.g. {visible[0]}" if visible else "no files"
    raise DataError(
        str(folder), expected=f"a folder with {ACCEPTED}", found=found, remedy="Check the path of the data."
    )


def _labels_in_npz(folder: Path, names: tuple[str, ...], inputs: Mapping[str, InputInfo]) -> Tensor | None:
    """The labels inside the files: all have one, or none."""
    keys = [key for key in LABEL_KEYS if key not in inputs]
    found = {name: list(read_npz(folder / name, only=keys).values()) for name in names}
    bare = [name for name in names if not found[name]]
    if len(bare) == len(names):
        return None
    if bare:
        raise DataError(
            str(folder),
            expected="a label in every file or in none",
            found=f"{len(bare)} without: {', '.join(bare[:10])}{' …' if len(bare) > 10 else ''}",
            remedy="Label the others, too.",
        )
    labels = [int(as_labels(found[name][0], 1, where=str(folder / name))) for name in names]
    return torch.tensor(labels, dtype=torch.int64)

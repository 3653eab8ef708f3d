"""`open_data`: the one way from whatever the user has to a `Dataset`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bitwright.data.arrays import RawOptions
from bitwright.data.dataset import Dataset, InputInfo
from bitwright.data.files import ACCEPTED, open_file, open_folder
from bitwright.data.images import ImageOptions
from bitwright.data.iterables import open_object
from bitwright.data.labels import read_row_labels
from bitwright.data.loader import call_loader
from bitwright.errors import DataError

_DEFAULT_IMAGE = ImageOptions()
_DEFAULT_RAW = RawOptions()


def open_data(
    source: object,
    inputs: Mapping[str, InputInfo],
    *,
    image: ImageOptions = _DEFAULT_IMAGE,
    raw: RawOptions = _DEFAULT_RAW,
    labels: Path | str | None = None,
) -> Dataset:
    """The samples of *source* for a model with *inputs* (in the model's order).

    *source*: a file or folder, `module:function`, or a Python object; docs/data.md lists all forms. *image*
    is used for pictures, *raw* for `.bin` files. *labels*: a file that replaces labels found in the data.
    *raises* `DataError`: at once for what a listing shows (no such file, wrong names, labels that do not
    match), and when a sample is read for what only its content shows.
    """
    if not inputs:
        raise DataError("data", expected="a model with inputs", found="none", remedy="Check the model.")
    label_file = None if labels is None else Path(labels)
    if not isinstance(source, str | Path):
        dataset = open_object(source, inputs, where="data")
    elif (path := Path(source)).is_dir():
        return open_folder(path, inputs, image=image, raw=raw, labels=label_file)
    elif path.exists():
        dataset = open_file(path, inputs, image=image, raw=raw)
    elif (spec := str(source)).rpartition(":")[0] and spec.rpartition(":")[2].isidentifier():
        dataset = open_object(call_loader(spec), inputs, where=spec)
    else:
        raise DataError(
            spec,
            expected=f"a folder, {ACCEPTED}, or module:function",
            found="no such file or folder",
            remedy="Check the path.",
        )
    if label_file is None:
        return dataset
    return replace(dataset, labels=read_row_labels(label_file, len(dataset)))

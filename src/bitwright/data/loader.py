"""Loader functions: `package.module:function` and `path/to/file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from bitwright.data.iterables import failed
from bitwright.errors import BitwrightError, DataError


def call_loader(spec: str) -> object:
    """What the function named by *spec* returns when called without arguments.

    The current folder (or that of the file) becomes importable.
    *raises* `DataError` if it cannot be found or called, and with the original message if it fails.
    """
    place, _, name = spec.rpartition(":")
    is_file = place.endswith(".py")
    _make_importable(Path(place).resolve().parent if is_file else Path.cwd())
    module = _import_file(Path(place), spec) if is_file else _import_module(place, spec)
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(
            spec,
            expected=f"a function {name!r} in {place}",
            found="nothing of that name" if function is None else f"a {type(function).__name__}",
            remedy="Define it: no arguments, returns an iterable of samples.",
        )
    try:
        return function()
    except BitwrightError:
        raise
    except Exception as error:
        raise failed(spec, error) from error


def _import_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _not_imported(spec, f"an importable module {name!r}", error) from error


def _import_file(path: Path, spec: str) -> ModuleType:
    """Run the file as a module of its own name space; dataclasses and pickle need it in `sys.modules`."""
    name = f"bitwright_loader_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None, "the suffix .py has a loader"
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _not_imported(spec, f"a Python file {path}", error) from error
    return module


def _not_imported(spec: str, expected: str, error: Exception) -> DataError:
    return DataError(
        spec,
        expected=expected,
        found=f"{type(error).__name__}: {error}",
        remedy="Write module:function or path/to/file.py:function, and check that it imports.",
    )


def _make_importable(folder: Path) -> None:
    """Put *folder* first in the import path, as Python does for a script.

    It stays there: a generator or a dataset of the user imports its own modules whenever it is used.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

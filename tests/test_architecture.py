"""The floors of ARCHITECTURE.md, file sizes, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bitwright

SOURCE = Path(bitwright.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
#: Floor 0 has an order of its own: errors below names and tables, these below numbers.
FLOORS = {
    "version": -2, "errors": -2, "registry": -1, "table": -1, "files": -1,
    "numerics": 0,
    "graph": 1,
    "ops": 2,
    "plan": 3,
    "importers": 4, "rewrite": 4, "calibrate": 4, "data": 4, "search": 4, "exporters": 4, "runtime": 4, "report": 4, "train": 4,
    "analysis": 5,
    "demo": 6, "flow": 6,
    "cli": 7, "quantization": 7, "nn": 7,
}  # fmt: skip


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[ast.stmt, str]]:
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node, node.module))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_module_imports_only_from_floors_below(path: Path) -> None:
    package = package_of(path)
    if package in ("__init__", "__main__"):
        return
    for _, name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "bitwright":
            continue
        assert len(parts) > 1, f"{path} imports the package's own top"
        other = parts[1]
        same_package = other == package
        assert same_package or FLOORS[other] < FLOORS[package] or (package, other) == ("flow", "demo"), (
            f"{package} (floor {FLOORS[package]}) imports {other} (floor {FLOORS[other]})"
        )


#: Functions that may import: optional extras, and the loader of verbs.
LATE_IMPORTS = {
    ("demo/digits.py", "sklearn.datasets"),
    ("search/ray_runner.py", "ray"),
    ("flow/training_log.py", "torch.utils.tensorboard"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_is_imported_inside_functions(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]:
        for _, name in imports(function):
            place = str(path.relative_to(SOURCE))
            assert (place, name) in LATE_IMPORTS, f"{place} imports {name} inside {function.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 420


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_file_is_a_grab_bag(path: Path) -> None:
    forbidden = {"utils", "helpers", "common", "misc", "base", "core", "manager", "handler"}

    assert forbidden.isdisjoint(p.removesuffix(".py") for p in path.relative_to(SOURCE).parts)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, bitwright, bitwright.cli.main; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("name", bitwright.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    thing = getattr(bitwright, name)

    assert isinstance(thing, str) or thing.__doc__

"""What the benchmarks share: where the development models lie, how a figure is written down."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import psutil

HERE = Path(__file__).parent
RESULTS = HERE / "results"
T = TypeVar("T")


def data_folder() -> Path:
    """The development data: `$BITWRIGHT_DATA` or `../shared/data` beside the repository."""
    folder = Path(os.environ.get("BITWRIGHT_DATA", HERE.parent.parent / "shared" / "data"))
    if not (folder / "load.py").exists():
        sys.exit(f"The development data is not at {folder}; set BITWRIGHT_DATA.")
    return folder


def loader() -> ModuleType:
    """The data's own loader module."""
    spec = importlib.util.spec_from_file_location("load", data_folder() / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load"] = module
    spec.loader.exec_module(module)
    return module


def save(name: str, result: Any) -> None:
    """Write *result* to `results/NAME.json` and print it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**result, "machine": f"{os.cpu_count()} cores, {platform.machine()}"}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def timed(f: Callable[[], T]) -> tuple[T, float]:
    """The result of *f* and how many seconds it took."""
    start = time.perf_counter()
    result = f()
    return result, time.perf_counter() - start


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test: the two-sided p of *only_a* against *only_b* tosses of a fair coin."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


class PeakMemory:
    """Peak resident memory above the level at entry, in bytes, sampled every 10 ms."""

    def __enter__(self) -> PeakMemory:
        process = psutil.Process()
        self.base = self.peak = process.memory_info().rss
        self._stop = threading.Event()

        def watch() -> None:
            while not self._stop.wait(0.01):
                self.peak = max(self.peak, process.memory_info().rss)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        """Bytes above the level at entry."""
        return self.peak - self.base

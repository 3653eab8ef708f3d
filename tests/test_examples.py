"""Every script in examples/ runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.name)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the examples use scikit-learn's digits")
    result = subprocess.run(
        [sys.executable, script, tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()

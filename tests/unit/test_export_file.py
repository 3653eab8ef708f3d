"""Writing models and text: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from export_cases import residual

from bitwright.errors import OutputError
from bitwright.exporters.onnx_float import export_float, save_model
from bitwright.files import write_text


def test_a_saved_model_is_read_back_equal(tmp_path: Path) -> None:
    model = export_float(residual())
    save_model(model, tmp_path / "new" / "model.onnx")
    assert onnx.load(tmp_path / "new" / "model.onnx") == model
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model.onnx"]


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_place_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OutputError, match=r"model\.onnx: expected a place that can be written to"):
        save_model(export_float(residual()), blocked / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_that_name_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "inside").write_text("x")
    with pytest.raises(OutputError):
        write_text(tmp_path / "taken", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]

"""From flags to settings."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

from bitwright.cli.options import DataFlags, QuantizeFlags, ResultFlags
from bitwright.cli.search_options import SearchFlags
from bitwright.cli.settings import settings_of
from bitwright.cli.signature import flat
from bitwright.errors import BitwrightError
from bitwright.flow.settings import Settings

DATA = DataFlags(data="d")


def test_flags_that_are_left_out_give_the_settings_of_a_call_from_python() -> None:
    assert settings_of(DATA, QuantizeFlags(), SearchFlags()) == Settings()
    assert settings_of(DATA, QuantizeFlags()) == Settings()


def test_every_setting_can_be_reached_by_a_flag(tmp_path: Path) -> None:
    process = tmp_path / "process.py"
    process.write_text(
        "def double(outputs):\n    return {k: 2 * v for k, v in outputs.items()}\n"
        "def distance(output, reference):\n    return (output - reference).abs().flatten(1).sum(1)\n"
    )
    data = DataFlags(
        data="d",
        labels=Path("l.txt"),
        calibration_data="c.npz",
        input_shape=["x=-1,3,8,8"],
        input_num=7,
        seed=3,
        device="cuda",
        resize="256",
        crop="224,192",
        mean="123.675,116.28,103.53",
        scale="0.01,0.02,0.03",
        pixel_format="bgr",
        layout="nhwc",
        bin_shape="3,4",
        bin_dtype="float16",
    )
    search = SearchFlags(
        expected_cos=0.5,
        inference_num=9,
        methods="kl, mse,kl",
        output_weights="a=0.3,b=0.7",
        post_process=f"{process}:double",
        cosine_scale="half",
        save_state=Path("s.json"),
        loss=f"{process}:distance",
        probes=2,
        verify=3,
        operators="conv*, head",
        precisions="int8,int16",
        budget="macs=0.1",
        workers=2,
        ray="auto",
    )

    found = settings_of(
        data,
        QuantizeFlags(target="bm1684", method="octav,sketch"),
        search,
        max_float_ops=2,
        evaluate="metric.py:top1",
        export="both",
    )

    left = [f.name for f in fields(Settings) if getattr(found, f.name) == getattr(Settings(), f.name)]
    assert left == []
    assert (found.method, found.search_method) == ("octav", "sketch")
    assert (found.cost, found.budget) == ("macs", 0.1)
    assert found.operators == ("conv*", "head")
    assert callable(found.loss)
    assert "def distance" in found.loss_source
    assert found.methods == ("kl", "mse")
    assert found.output_weights == {"a": 0.3, "b": 0.7}
    assert (found.image.resize, found.image.crop) == (256, (224, 192))
    assert found.image.mean == (123.675, 116.28, 103.53)
    assert found.post_process is not None
    assert found.post_process({"y": np.ones(1)}) == {"y": 2.0}
    assert "def double" in found.post_process_source


def test_a_post_processing_class_is_made_and_may_go_unnamed(tmp_path: Path) -> None:
    file = tmp_path / "decode.py"
    file.write_text(
        "class PostProcess:\n    def __call__(self, outputs):\n        return {'n': len(outputs)}\n"
    )

    found = settings_of(DATA, QuantizeFlags(), SearchFlags(post_process=str(file)))

    assert found.post_process is not None
    assert found.post_process({"a": np.ones(1)}) == {"n": 1}


def test_the_last_equals_sign_separates_an_output_from_its_weight() -> None:
    found = settings_of(DATA, QuantizeFlags(), SearchFlags(output_weights="a=b=1"))
    assert found.output_weights == {"a=b": 1.0}


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ({"resize": "big"}, "--resize"),
        ({"crop": "0"}, "--crop"),
        ({"mean": "1,x"}, "--mean"),
        ({"mean": "1,2"}, "--mean"),
        ({"scale": "nan"}, "--scale"),
        ({"bin_shape": "3,-1"}, "--bin-shape"),
        ({"bin_dtype": "float31"}, "--bin-dtype"),
        ({"methods": " , "}, "--methods"),
        ({"output_weights": "a"}, "--output-weights"),
        ({"output_weights": "a=-1"}, "--output-weights"),
        ({"output_weights": "a=1,a=2"}, "--output-weights"),
        ({"output_weights": "a=inf"}, "--output-weights"),
        ({"output_weights": ""}, "--output-weights"),
        ({"post_process": "absent.py:f"}, "--post-process"),
        ({"post_process": "math:pi"}, "--post-process"),
    ],
)
def test_a_flag_that_cannot_be_read_is_named(flags: dict[str, str], where: str) -> None:
    data = replace(DATA, **{k: v for k, v in flags.items() if hasattr(DATA, k)})  # type: ignore[arg-type]
    search = SearchFlags(**{k: v for k, v in flags.items() if not hasattr(DATA, k)})  # type: ignore[arg-type]

    with pytest.raises(BitwrightError) as error:
        settings_of(data, QuantizeFlags(), search)

    assert error.value.where.startswith(where)


def test_a_post_processing_class_with_arguments_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "decode.py"
    file.write_text("class PostProcess:\n    def __init__(self, size):\n        pass\n")

    with pytest.raises(BitwrightError, match="expected a class that needs no arguments"):
        settings_of(DATA, QuantizeFlags(), SearchFlags(post_process=str(file)))


@pytest.mark.parametrize(
    ("model", "target", "folder"),
    [
        ("nets/mobile.v2.onnx", "bm1684x", "mobile.v2_bm1684x"),
        ("nets/a.py:build", "generic-int8", "build_generic-int8"),
        ("package.module:build", "chips/mine.yaml", "build_mine"),
    ],
)
def test_results_go_to_a_folder_named_after_model_and_target(model: str, target: str, folder: str) -> None:
    assert ResultFlags().folder(model, target) == Path(folder)
    assert ResultFlags(output=Path("out")).folder(model, target) == Path("out")


@dataclass(frozen=True)
class Pair:
    left: Annotated[int, "a note"]
    right: int = 2


def test_a_verb_shows_the_fields_of_its_dataclasses_as_parameters() -> None:
    @flat
    def add(first: int, pair: Pair, last: str = "x") -> int:
        return first + pair.left + pair.right + len(last)

    shown = inspect.signature(add).parameters
    assert list(shown) == ["first", "left", "right", "last"]
    assert shown["left"].annotation == Annotated[int, "a note"]
    assert [p.default for p in shown.values()] == [inspect.Parameter.empty, inspect.Parameter.empty, 2, "x"]
    assert add(first=1, left=10, right=20, last="xyz") == 34

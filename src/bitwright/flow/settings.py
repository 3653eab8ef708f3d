"""What a user can ask of a job; the command line's common flags, with the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bitwright.data.images import ImageOptions
from bitwright.search.sensitivity import METHODS
from bitwright.search.similarity import PostProcess


@dataclass(frozen=True)
class Settings:
    """Options of a job. Sample counts of 0 mean all."""

    target: str | Path = "onnxruntime"
    method: str = "max"
    methods: tuple[str, ...] = METHODS
    expected_cos: float = 0.99
    input_num: int = 100
    inference_num: int = 30
    max_float_ops: int | None = None
    seed: int = 0
    device: str = "cpu"
    labels: Path | None = None
    #: What to calibrate on, in any form that data may have; None: samples of the data itself.
    calibration_data: object = None
    #: Shapes of an ONNX model's inputs that the file leaves open, by name; -1 as first entry keeps the batch dynamic.
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    image: ImageOptions = field(default_factory=ImageOptions)
    bin_shape: tuple[int, ...] | None = None
    bin_dtype: str | None = None
    output_weights: Mapping[str, float] = field(default_factory=dict)
    post_process: PostProcess | None = None
    #: The text the post-processing came from: saved searches are only resumed with the same.
    post_process_source: str = ""
    cosine_scale: Literal["true", "half"] = "true"
    save_state: Path | None = None

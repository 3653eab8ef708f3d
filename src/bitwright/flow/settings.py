"""What a user can ask of a job; the command line's common flags, with the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bitwright.data.images import ImageOptions
from bitwright.plan.cost import Metric
from bitwright.plan.target import Precision
from bitwright.search.error_sketch import PROBES
from bitwright.search.losses import UserFunction
from bitwright.search.sensitivity import METHODS
from bitwright.search.similarity import PostProcess

SearchMethod = Literal["sketch", "exact", "sketch+verify"]
#: Which files a job writes: with Q/DQ pairs, in integers alone, or both.
Export = Literal["qdq", "integer", "both"]


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
    #: Whether composite operators are taken apart into parts with int16 inside; a target with `tables` does so anyway.
    tables: bool = False
    export: Export = "qdq"
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
    #: How sensitivity is found: by the error sketch, by partial re-execution of everything, or sketched and the top verified.
    search_method: SearchMethod = "sketch+verify"
    #: Random probes of the sketch for each output.
    probes: int = PROBES
    #: Operators that `sketch+verify` measures exactly.
    verify: int = 5
    #: The loss that ranks operators: a name of `LOSSES`, or a user's function (then `loss_source` is its text).
    loss: str | UserFunction = "cosine"
    loss_source: str = ""
    #: Only these operators are ranked: patterns with * and ?.
    operators: tuple[str, ...] = ()
    #: Precisions that the joint search may give, as far as the target allows them.
    precisions: tuple[Precision, ...] = ("int8", "float")
    #: What the joint search saves, and how much of it a plan may cost (None: no limit but `max_float_ops`).
    cost: Metric = "ops"
    budget: float | None = None
    #: Local processes for exact measurements and a user's metric; or a Ray cluster.
    workers: int = 1
    ray: str | None = None
    #: A user's metric of the whole network, `file.py:function`, larger is better; None: the similarity alone.
    evaluate: str | None = None

"""The recipe of `bitwright train`: a YAML file, every field with a default that suits quantization-aware training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from bitwright.errors import ModelError
from bitwright.train.batchnorm import BatchNormMode


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class QuantizerRecipe(_Strict):
    """How values are fake-quantized while training.

    *observer*: None stands for `mse` for int4 and where the scale is learned (`lsq`), else `min_max`. *options*: of the observer
    (`averaging_constant`, `percentile`, …); scales of int4 weights stay as they were calibrated unless told otherwise.
    """

    fake_quant: str = "fake_quant"
    observer: str | None = None
    dtype: Literal["int4", "int8", "int16"] = "int8"
    power_of_two: bool = False
    group_size: PositiveInt | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def observer_name(self) -> str:
        """The observer in use: a scale that is learned, or kept, has to start well."""
        return self.observer or ("mse" if self.fake_quant == "lsq" or self.dtype == "int4" else "min_max")


class CalibrationRecipe(_Strict):
    """The pass before training. *batches*: of the calibration data; 0: none, ranges start with the first training batch.

    *observer*, *options*: for activations; weights are calibrated by their own observer.
    """

    batches: int = Field(default=20, ge=0)
    observer: str = "mse"
    options: dict[str, Any] = Field(default_factory=dict)


class DataRecipe(_Strict):
    """`file.py:function` or `module:function`, called without arguments: a DataLoader, a Dataset, or two tensors (x, y)."""

    train: str
    validation: str
    calibration: str | None = None
    batch_size: PositiveInt = 64


class OptimizerRecipe(_Strict):
    """*rate* falls to a tenth at each of the *decays*, shares of all steps. There is no warm-up."""

    name: Literal["sgd", "adamw"] = "sgd"
    rate: PositiveFloat = 1e-3
    decays: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.6, 0.85)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=4e-5, ge=0)


class Recipe(_Strict):
    """Everything that `bitwright train` needs."""

    #: `file.py:function` or `module:function` that returns (module, example inputs).
    model: str
    #: Weights of the float model: .safetensors, or a state dict in .pt/.pth.
    checkpoint: str | None = None
    data: DataRecipe
    target: str = "generic"
    activation: QuantizerRecipe = QuantizerRecipe()
    weight: QuantizerRecipe = QuantizerRecipe()
    #: Parts that stay float, by name.
    leave_float: tuple[str, ...] = ()
    batchnorm: BatchNormMode = "trained"
    #: Training batches that trained statistics of batch normalisation are taken anew from after every epoch; 0: running averages.
    batchnorm_batches: int = Field(default=50, ge=0)
    calibration: CalibrationRecipe = CalibrationRecipe()
    epochs: PositiveInt = 3
    optimizer: OptimizerRecipe = OptimizerRecipe()
    #: `cross_entropy`, or `file.py:function` of (outputs, labels) that returns a scalar.
    loss: str = "cross_entropy"
    amp: Literal["none", "bf16"] = "none"
    device: str = "cpu"
    seed: int = Field(default=0, ge=0, lt=2**62)
    #: Write TensorBoard logs (needs the extra `tensorboard`).
    tensorboard: bool = False


def load_recipe(path: Path) -> Recipe:
    """The recipe in *path*; relative paths in it are meant from its folder. *raises* `ModelError` naming the field."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        found = " ".join(str(e).split())
        raise ModelError(str(path), expected="a recipe in YAML", found=found, remedy="Check the file.") from e
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as e:
        listed = "; ".join(
            f"{'.'.join(map(str, p['loc'])) or 'the file'}: {p['msg']}" for p in e.errors()[:5]
        )
        raise ModelError(
            str(path),
            expected="the fields of docs/training.md",
            found=listed,
            remedy="Mend them; `bitwright train --help` shows a recipe.",
        ) from e
    return _anchored(recipe, path.parent.resolve())


def _anchored(recipe: Recipe, folder: Path) -> Recipe:
    """*recipe* with the files that it names made absolute."""
    data = recipe.data.model_copy(
        update={
            key: _spec(value, folder)
            for key, value in recipe.data.model_dump().items()
            if isinstance(value, str)
        }
    )
    changed: dict[str, Any] = {
        "model": _spec(recipe.model, folder),
        "data": data,
        "loss": _spec(recipe.loss, folder),
    }
    if recipe.checkpoint is not None:
        changed["checkpoint"] = str(folder / recipe.checkpoint)
    if recipe.target.endswith((".yaml", ".yml")):
        changed["target"] = str(folder / recipe.target)
    return recipe.model_copy(update=changed)


def _spec(spec: str, folder: Path) -> str:
    place, colon, name = spec.rpartition(":")
    return f"{folder / place}{colon}{name}" if place.endswith(".py") else spec

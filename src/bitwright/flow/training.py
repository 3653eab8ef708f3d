"""Quantization-aware training as a job: float -> calibrated -> trained -> file, with checkpoints and resume."""

from __future__ import annotations

import hashlib
import io
import math
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import DataError, ModelError, NumericsError, PlanError
from bitwright.files import write_bytes
from bitwright.flow.convert import convert
from bitwright.flow.export import export
from bitwright.flow.model_source import import_model, import_object, read_weights, source_text
from bitwright.flow.outputs import check_writable
from bitwright.flow.prepare import prepare
from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.recipe import QuantizerRecipe, Recipe, load_recipe
from bitwright.flow.training_calls import logits_of, loss_of, moved, right_answers
from bitwright.flow.training_data import Source, open_source
from bitwright.flow.training_log import TrainingLog
from bitwright.flow.training_result import Trained, write_training
from bitwright.graph.device import usable_device
from bitwright.ops.batchnorm import BatchNorm
from bitwright.plan.qconfig import (
    FakeQuantConfig,
    ModuleNameQconfigSetter,
    QConfig,
    QconfigSetter,
    UniformQconfigSetter,
)
from bitwright.plan.target import load_target
from bitwright.train.batchnorm import update_batchnorm
from bitwright.train.control import load_observer_params, set_fake_quantize
from bitwright.train.fake_quants import Quantizer
from bitwright.train.fake_quants.lsq import Lsq
from bitwright.train.prepared import PreparedModel
from bitwright.train.states import FakeQuantState

CHECKPOINT = "checkpoint.pt"


def run_training(
    recipe: Recipe | str | Path, *, output: str | Path, watcher: Watcher | None = None
) -> Trained:
    """Do what *recipe* (or the file) says; results in *output*.

    Writes `checkpoint.pt` after every epoch, from which the same command goes on; then `NAME_qat.onnx` with its plan,
    `history.csv`, `report.html`, `summary.json`. *raises* the errors of every stage; `NumericsError` for a loss that is not finite.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    watcher = watcher or Silence()
    folder = check_writable(Path(output))
    return _Job(recipe, folder, watcher).run()


class _Job:
    def __init__(self, recipe: Recipe, folder: Path, watcher: Watcher) -> None:
        self.recipe, self.folder, self.watcher = recipe, folder, watcher
        self.device = usable_device(recipe.device, "device")
        load_target(recipe.target)
        self._depends_on = _digest(recipe)
        watcher.stage("reading model and data")
        self.name, self.network, self.example = import_model(recipe.model)
        self._load_weights()
        self.network.to(self.device)
        self.train_data = self._source(recipe.data.train)
        self.validation = self._source(recipe.data.validation)
        self.loss = _loss(recipe.loss)
        self.log = TrainingLog(folder / "tensorboard" if recipe.tensorboard else None)

    def run(self) -> Trained:
        began = time.perf_counter()
        result = Trained(self.name, {"float": self._accuracy(self.network.eval(), "measuring float")})
        model = self._prepared(self._setter(self.recipe.activation, self.recipe.weight))
        if not self.recipe.calibration.batches:
            _check_observes(model)
        else:
            calibrated = self._calibrated()
            result.accuracy["calibrated"] = self._accuracy(calibrated, "measuring the calibrated model")
            load_observer_params(calibrated, model)
        self._train(model, result)
        result.accuracy["trained"] = self._accuracy(model, "measuring the trained model")
        self.watcher.stage("converting")
        exported = export(model, self.folder / f"{self.name}_qat.onnx")
        result.file = str(exported.path)
        result.accuracy["converted"] = self._accuracy(convert(model), "measuring the converted model")
        seconds = time.perf_counter() - began
        write_training(self.folder, result, self.recipe, model.report, exported.proof, seconds)
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        self.log.close()
        return result

    # --- model and data --------------------------------------------------------------------------------------

    def _load_weights(self) -> None:
        if self.recipe.checkpoint is None:
            return
        state = read_weights(Path(self.recipe.checkpoint))
        try:
            self.network.load_state_dict(state)
        except (RuntimeError, ValueError) as e:
            raise ModelError(
                self.recipe.checkpoint,
                expected=f"the weights of {self.recipe.model}",
                found=" ".join(str(e).split())[:300],
                remedy="Give the checkpoint of this very network.",
            ) from e

    def _source(self, spec: str) -> Source:
        return open_source(spec, self.recipe.data.batch_size)

    def _setter(self, activation: QuantizerRecipe, weight: QuantizerRecipe) -> list[QconfigSetter]:
        def config(part: QuantizerRecipe, **options: Any) -> FakeQuantConfig:
            own = {**options, **part.options}
            return FakeQuantConfig(
                part.fake_quant, part.observer_name, part.dtype, part.power_of_two, part.group_size, own
            )

        constant = 0.0 if weight.dtype == "int4" else 1.0
        qconfig = QConfig(config(activation), config(weight, averaging_constant=constant))
        setters: list[QconfigSetter] = [UniformQconfigSetter(qconfig, "recipe")]
        if self.recipe.leave_float:
            setters.insert(0, ModuleNameQconfigSetter(dict.fromkeys(self.recipe.leave_float)))
        return setters

    def _prepared(self, setter: list[QconfigSetter]) -> PreparedModel:
        self.watcher.stage("preparing")
        return prepare(
            self.network,
            _moved(self.example, self.device),
            setter,
            target=self.recipe.target,
            batchnorm=self.recipe.batchnorm,
        )

    # --- calibration -----------------------------------------------------------------------------------------

    def _calibrated(self) -> PreparedModel:
        r = self.recipe
        observing = QuantizerRecipe(
            observer=r.calibration.observer,
            dtype=r.activation.dtype,
            power_of_two=r.activation.power_of_two,
            options=r.calibration.options,
        )
        weight = r.weight.model_copy(update={"fake_quant": "fake_quant", "observer": r.weight.observer_name})
        model = self._prepared(self._setter(observing, weight)).eval()
        set_fake_quantize(model, FakeQuantState.CALIBRATION)
        source = self._source(r.data.calibration or r.data.train)
        self.watcher.stage("calibrating", r.calibration.batches)
        with torch.no_grad():
            for count, batch in enumerate(source.batches(seed=r.seed)):
                if count == r.calibration.batches:
                    break
                logits_of(model, batch, self.device, "calibrating")
                self.watcher.advance()
        set_fake_quantize(model, FakeQuantState.VALIDATION)
        return model

    # --- training --------------------------------------------------------------------------------------------

    def _train(self, model: PreparedModel, result: Trained) -> None:
        """Leaves *model* with the parameters of its best epoch, in state VALIDATION."""
        steps = self.train_data.length(training=True)
        if steps is None:
            raise DataError(
                self.recipe.data.train,
                expected="data of known length, which the schedule depends on",
                found="a loader without len()",
                remedy="Give the loader a __len__, or return a Dataset.",
            )
        optimizer, schedule = self._optimizer(model, steps * self.recipe.epochs)
        best: dict[str, Tensor] = {}
        first = self._resume(model, optimizer, schedule, result, best)
        self.log.begin(first + 1)
        for epoch in range(first, self.recipe.epochs):
            set_fake_quantize(model.train(), FakeQuantState.QAT)
            self.watcher.stage(f"epoch {epoch + 1} of {self.recipe.epochs}", steps)
            rate = float(optimizer.param_groups[0]["lr"])
            loss = self._epoch(model, optimizer, schedule, epoch)
            self._check_finite(model, epoch)
            self._update_batchnorm(model, epoch)
            set_fake_quantize(model.eval(), FakeQuantState.VALIDATION)
            top1 = self._accuracy(model, f"measuring epoch {epoch + 1}")
            result.history.append({"epoch": epoch + 1, "loss": loss, "top1": top1, "rate": rate})
            self.log.add(epoch + 1, loss=loss, top1=top1, rate=rate)
            if top1 >= max(h["top1"] for h in result.history):
                best = {k: v.detach().clone() for k, v in model.state_dict().items()}
                result.best_epoch = epoch + 1
            self._save(model, optimizer, schedule, result, best)
        model.load_state_dict(best)
        set_fake_quantize(model.eval(), FakeQuantState.VALIDATION)

    def _update_batchnorm(self, model: PreparedModel, epoch: int) -> None:
        count = self.recipe.batchnorm_batches
        if not count or not any(isinstance(m, BatchNorm) and not m.frozen for m in model.modules()):
            return
        self.watcher.stage("taking batch statistics")
        batches = islice(self.train_data.batches(seed=self.recipe.seed + epoch), count)
        update_batchnorm(model, (moved(b, self.device) for b in batches))

    def _optimizer(self, model: PreparedModel, steps: int) -> tuple[torch.optim.Optimizer, Any]:
        r = self.recipe.optimizer
        # A learned scale is no weight, and is not pulled towards zero; PACT's threshold is, as its paper says.
        scales = [q.scale for _, q in model.quantizers if isinstance(q, Lsq)]
        rest = [p for p in model.parameters() if not any(p is scale for scale in scales)]
        groups = [
            {"params": rest, "weight_decay": r.weight_decay},
            {"params": scales, "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if r.name == "sgd":
            optimizer = torch.optim.SGD(groups, lr=r.rate, momentum=r.momentum)
        else:
            optimizer = torch.optim.AdamW(groups, lr=r.rate)
        at = sorted({max(1, round(share * steps)) for share in r.decays})
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, at, gamma=0.1)

    def _epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, epoch: int) -> float:
        """One pass over the training data. *returns*: the mean loss."""
        torch.manual_seed(self.recipe.seed + epoch)
        total, count = 0.0, 0
        for batch in self.train_data.batches(seed=self.recipe.seed + epoch):
            optimizer.zero_grad()
            where = f"training, epoch {epoch + 1}, step {count + 1}"
            with self._autocast():
                logits = logits_of(model, batch, self.device, where)
                loss = loss_of(self.loss, logits, batch.labels.to(self.device), where)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise self._diverged(epoch, count, value)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total, count = total + value, count + 1
            self.watcher.advance(1, f"loss {total / count:.4f}")
        if not count:
            raise DataError(
                "data.train", expected="at least one batch", found="none", remedy="Check the recipe."
            )
        return total / count

    def _autocast(self) -> Any:
        if self.recipe.amp == "none":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _diverged(self, epoch: int, step: int, value: float) -> NumericsError:
        where = f"training, epoch {epoch + 1}, step {step + 1}"
        return self._not_finite(epoch, where, "a finite loss", str(value))

    def _check_finite(self, model: nn.Module, epoch: int) -> None:
        """*raises* `NumericsError` for weights that no checkpoint should hold: the gradient of a finite loss may be NaN."""
        trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)  # a mask may be infinite
        found = next((n for n, p in trained if not p.isfinite().all()), None)
        if found is not None:
            where = f"training, epoch {epoch + 1}"
            raise self._not_finite(epoch, where, "finite parameters", f"NaN or infinity in {found}")

    def _not_finite(self, epoch: int, where: str, expected: str, found: str) -> NumericsError:
        kept = f"The state after epoch {epoch} is in {self.folder / CHECKPOINT}. " if epoch else ""
        advice = (
            "Lower optimizer.rate, check labels, data and the loss for NaN, or calibrate with more batches."
        )
        return NumericsError(where, expected=expected, found=found, remedy=kept + advice)

    # --- checkpoints -----------------------------------------------------------------------------------------

    def _save(self, model: nn.Module, optimizer: Any, schedule: Any, result: Trained, best: Any) -> None:
        buffer = io.BytesIO()
        state = {
            "digest": self._depends_on,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "history": result.history,
            "best_epoch": result.best_epoch,
            "best": best,
        }
        torch.save(state, buffer)
        write_bytes(self.folder / CHECKPOINT, buffer.getvalue())

    def _resume(self, model: PreparedModel, optimizer: Any, schedule: Any, result: Trained, best: Any) -> int:
        """Take up a checkpoint of the same recipe. *returns*: epochs that are done."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return 0
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as e:  # torch raises whatever its unpickler met
            raise ModelError(
                str(path), expected="a checkpoint of bitwright train", found=str(e)[:200], remedy="Delete it."
            ) from e
        if not isinstance(state, dict) or state.get("digest") != self._depends_on:
            raise ModelError(
                str(path),
                expected="a checkpoint of this recipe",
                found="something else, or one of another recipe or another version of its code",
                remedy="Delete it, or give another --output.",
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        result.history, result.best_epoch = state["history"], state["best_epoch"]
        best.update(state["best"])
        self.watcher.note(f"going on after epoch {len(result.history)}, from {path}")
        return len(result.history)

    # --- results ---------------------------------------------------------------------------------------------

    def _accuracy(self, model: nn.Module, title: str) -> float:
        """Top-1 in 0..1 on the validation data."""
        right = total = 0
        self.watcher.stage(title, self.validation.length())
        with torch.no_grad():
            for batch in self.validation.batches():
                right += right_answers(logits_of(model, batch, self.device, title), batch.labels, title)
                total += len(batch.labels)
                self.watcher.advance()
        if not total:
            raise DataError(
                "data.validation", expected="at least one sample", found="none", remedy="Check the recipe."
            )
        return right / total


def _moved(example: Any, device: torch.device) -> Any:
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, dict):
        return {k: _moved(v, device) for k, v in example.items()}
    return tuple(_moved(v, device) for v in example) if isinstance(example, (tuple, list)) else example


def _check_observes(model: PreparedModel) -> None:
    """*raises* `PlanError` if training alone does not see all that is quantized: after an epoch that would be too late."""
    unseen = [m.value for m in model.in_evaluation_alone if isinstance(m, Quantizer) and not m.has_range]
    if unseen:
        raise PlanError(
            "calibration.batches",
            expected="1 or more, since the model computes other things in evaluation than in training",
            found=f"0, and {', '.join(unseen[:3])} is computed in evaluation alone",
            remedy="Calibrate with a few batches, or leave that part float (leave_float).",
        )


def _loss(spec: str) -> Any:
    return F.cross_entropy if spec == "cross_entropy" else import_object(spec, "loss")


def _digest(recipe: Recipe) -> str:
    """What a checkpoint depends on: the recipe, the weights that training begins with, the target, and the code that it names."""
    named = [recipe.model, recipe.data.train, recipe.data.validation, recipe.data.calibration, recipe.loss]
    codes = [source_text(s) for s in named if s and Path(s.rpartition(":")[0]).is_file()]
    files = [Path(name) for name in (recipe.checkpoint, recipe.target) if name]
    parts = [repr(recipe.model_dump(exclude={"device"})), *codes]
    held = [part.encode() for part in parts] + [f.read_bytes() for f in files if f.is_file()]
    return hashlib.sha256(b"\0".join(held)).hexdigest()

"""Setting states, and carrying ranges from one prepared model to another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import ModelError, PlanError, UnknownName
from bitwright.plan.qconfig import is_inside
from bitwright.table import Column, Table
from bitwright.train.fake_quants import Quantizer
from bitwright.train.observers.histogram import Histogram
from bitwright.train.prepared import Place, PreparedModel, quantizers_of
from bitwright.train.states import FakeQuantState, ModeNotice


def set_fake_quantize(model: nn.Module, state: FakeQuantState) -> None:
    """Put every quantizer of *model* (prepared, a submodule of one, or wrapped) into *state*.

    Warns where *state* is CALIBRATION or VALIDATION and *model* is in training mode. *raises* `ModelError` if there is no
    quantizer, or if the prepared model was changed; `UnknownName` for something that is no state.
    """
    if not isinstance(state, FakeQuantState):
        known = [f"FakeQuantState.{s.name}" for s in FakeQuantState]
        raise UnknownName("set_fake_quantize", kind="state", name=str(state), known=known)
    for module in model.modules():
        if isinstance(module, PreparedModel):
            module.check_unchanged()
    found = [q for _, q in quantizers_of(model)]
    if not found:
        raise ModelError(
            f"set_fake_quantize({type(model).__name__})",
            expected="quantizers",
            found="none",
            remedy="Give the model that prepare() returned; if you did, every operator was left float: see model.report.",
        )
    notice = ModeNotice()
    for quantizer in found:
        quantizer.state, quantizer.notice = state, notice
    if state.wants_eval and model.training:
        notice.give(state)
    if state is FakeQuantState.CALIBRATION:
        _warn_of_fixed(found)


def called(model: nn.Module, inputs: Any) -> Any:
    """What *model* returns for *inputs*: a tensor, a tuple or list of arguments, or a mapping from their names."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


@contextmanager
def evaluating(model: PreparedModel, state: FakeQuantState) -> Iterator[None]:
    """*model* in evaluation mode and *state*, without gradients; afterwards in the modes and states of before."""
    states = [(q, q.state) for _, q in model.quantizers]
    modes = [(m, m.training) for m in model.modules()]
    try:
        for quantizer, _ in states:
            quantizer.state = state
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for quantizer, before in states:
            quantizer.state = before
        for module, training in modes:
            module.training = training


def _warn_of_fixed(quantizers: Sequence[Quantizer]) -> None:
    activations = [q for q in quantizers if not q.is_weight and not q.observer.is_given]
    fixed = [q.value for q in activations if q.observer.averaging_constant == 0.0]
    if fixed:
        warnings.warn(
            f"calibrating with averaging constant 0: the range of {len(fixed)} values ({fixed[0]}, …) is that of the first batch, or"
            " stays as it was loaded. Calibrate a model that was prepared with default_calibration_qconfig_setter, then"
            " load_observer_params.",
            stacklevel=3,
        )


#: Path of a quantizer, and the quantizer.
_Named = tuple[str, Quantizer]
_COLUMNS = (
    Column("name", "quantizer"),
    Column("result", "result"),
    Column("lo", "min", "", 5),
    Column("hi", "max", "", 5),
    Column("scale", "scale", "", 7),
)


def load_observer_params(calibration_model: nn.Module, qat_model: nn.Module, verbose: bool = False) -> Table:
    """Copy ranges and scales from *calibration_model* to the quantizers of the same values in *qat_model*.

    Where formats differ (int8 calibrated, int16 trained) the scale is computed from the range. *returns*: what became of
    every quantizer (`loaded`, `rescaled`, `not calibrated`, `only in …`). Warns if some got nothing.
    *raises* `ModelError` if nothing matched, `PlanError` if *calibration_model* was never calibrated.
    """
    source, target = _by_value(calibration_model), _by_value(qat_model)
    if not any(q.has_range for _, q in source.values()):
        raise PlanError(
            "load_observer_params",
            expected="a calibrated model",
            found="one whose observers never ran" if source else "one without quantizers",
            remedy="Set FakeQuantState.CALIBRATION and run some batches through the first model.",
        )
    if not source.keys() & target.keys():
        raise ModelError(
            "load_observer_params",
            expected="two models prepared from the same network",
            found="no quantized value with the same name",
            remedy="Prepare the same float model twice.",
        )
    rows = [_loaded(source.get(value), target.get(value)) for value in {**source, **target}]
    table = Table("Ranges that were loaded", _COLUMNS, tuple(rows))
    _warn_of_misses(rows)
    if verbose:
        print(table)
    return table


def _loaded(source: _Named | None, target: _Named | None) -> Mapping[str, Any]:
    name = (target or source or ("",))[0]
    result = _load(None if source is None else source[1], None if target is None else target[1])
    return _row(name, result, None if target is None else target[1])


@torch.no_grad()
def _load(source: Quantizer | None, target: Quantizer | None) -> str:
    if source is None or target is None:
        return "only in the calibrated model" if target is None else "only in the model to train"
    if not source.has_range:
        return "not calibrated"
    if source.groups != target.groups:
        return "another granularity"
    if target.observer.is_given:
        return "kept its fixed scale"
    if source.is_weight and source.is_folded != target.is_folded:
        return "taken anew: batch normalisation is folded in one of the models"
    target.observer.set_range(source.observer.lo, source.observer.hi)
    target.observer.count_as(source.observer)
    same = source.spec == target.spec
    if same and type(source) is type(target):
        for name, tensor in _own_state(source).items():
            _own_state(target)[name].copy_(tensor)
    elif same:
        target.zero_point.copy_(source.zero_point)
        target.set_scale(source.step().to(target.zero_point.device))
    else:
        target.take_range()
    return "loaded" if same else "rescaled"


def _own_state(quantizer: Quantizer) -> dict[str, Tensor]:
    """Parameters and buffers of *quantizer*, those of its observer left out."""
    return dict([*quantizer.named_parameters(recurse=False), *quantizer.named_buffers(recurse=False)])


def _row(name: str, result: str, target: Quantizer | None) -> Mapping[str, Any]:
    if target is None or not target.has_range:
        return {"name": name, "result": result}
    return {
        "name": name,
        "result": result,
        "lo": float(target.observer.lo.min()),
        "hi": float(target.observer.hi.max()),
        "scale": float(target.step().max()),
    }


#: Results that leave a quantizer with what it needs.
_NO_MISS = ("kept its fixed scale", "taken anew: batch normalisation is folded in one of the models")


def _by_value(model: nn.Module) -> dict[str, _Named]:
    """Path and quantizer by the value that is quantized: the path may differ with the way batch normalisation is treated.

    The path of the prepared model itself counts only where there are several: one may be wrapped, the other not.
    """
    models = [(path, m) for path, m in model.named_modules() if isinstance(m, PreparedModel)]
    return {
        f"{path}.{place.value}" if len(models) > 1 else place.value: (place.path, _quantizer(module, place))
        for path, module in models
        for place in module.facts.places
    }


def _quantizer(module: PreparedModel, place: Place) -> Quantizer:
    found = module.get_submodule(place.path)
    assert isinstance(found, Quantizer)
    return found


def _warn_of_misses(rows: list[Mapping[str, Any]]) -> None:
    missed = [r["name"] for r in rows if r["result"] not in ("loaded", "rescaled", *_NO_MISS)]
    if missed:
        more = ", …" if len(missed) > 4 else ""
        warnings.warn(
            f"load_observer_params: {len(missed)} of {len(rows)} quantizers got no range: {', '.join(missed[:4])}{more}",
            stacklevel=3,
        )


def reset_scale(
    model: nn.Module, method: str = "percentile", *, percentile: float = 99.99, prefix: str = ""
) -> None:
    """Take the ranges of all `histogram` observers (or of those in the part of the model at the path *prefix*) again, by *method*,
    without data.

    *method*: `percentile`, `mse`, `kl` or `min_max`; *percentile*: 0 … 100. *raises* `PlanError` if there is no such observer with data,
    `UnknownName` for a part that there is not.
    """
    inside = [q for name, q in quantizers_of(model) if is_inside(name, prefix)]
    if not inside and prefix:
        raise UnknownName(
            "reset_scale", kind="part", name=prefix, known=[n for n, _ in model.named_modules() if n]
        )
    found = [q for q in inside if isinstance(q.observer, Histogram)]
    if not any(q.has_range for q in found):
        raise PlanError(
            f"reset_scale(prefix={prefix!r})",
            expected="calibrated histogram observers",
            found=f"{len(found)} of them, none calibrated",
            remedy='Prepare with get_default_qconfig(activation_observer="histogram") and calibrate.',
        )
    for quantizer in found:
        if quantizer.has_range:
            assert isinstance(quantizer.observer, Histogram)
            quantizer.observer.reset(method, percentile)
            quantizer.take_range()

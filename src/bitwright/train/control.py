"""Setting states, and carrying ranges from one prepared model to another."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import ModelError, PlanError, UnknownName
from bitwright.table import Column, Table
from bitwright.train.fake_quants import Quantizer
from bitwright.train.observers.histogram import Histogram
from bitwright.train.prepared import PreparedModel, quantizers_of
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


_COLUMNS = (
    Column("name", "quantizer"),
    Column("result", "result"),
    Column("lo", "min", "", 5),
    Column("hi", "max", "", 5),
    Column("scale", "scale", "", 7),
)


def load_observer_params(calibration_model: nn.Module, qat_model: nn.Module, verbose: bool = False) -> Table:
    """Copy ranges and scales from *calibration_model* to the quantizers of the same name in *qat_model*.

    Where formats differ (int8 calibrated, int16 trained) the scale is computed from the range. *returns*: what became of
    every quantizer (`loaded`, `rescaled`, `not calibrated`, `only in …`). Warns if some got nothing.
    *raises* `ModelError` if nothing matched, `PlanError` if *calibration_model* was never calibrated.
    """
    source, target = dict(quantizers_of(calibration_model)), dict(quantizers_of(qat_model))
    if not any(q.has_range for q in source.values()):
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
            found="no quantizer with the same name",
            remedy="Prepare the same float model twice.",
        )
    rows = [
        _row(name, _load(source.get(name), target.get(name)), target.get(name))
        for name in {**source, **target}
    ]
    table = Table("Ranges that were loaded", _COLUMNS, tuple(rows))
    _warn_of_misses(rows)
    if verbose:
        print(table)
    return table


@torch.no_grad()
def _load(source: Quantizer | None, target: Quantizer | None) -> str:
    if source is None or target is None:
        return "only in the calibrated model" if target is None else "only in the model to train"
    if not source.has_range:
        return "not calibrated"
    if source.groups != target.groups:
        return "another granularity"
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
        scale, zero = target.range_scales()
        target.zero_point.copy_(zero)
        target.set_scale(scale)
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


def _warn_of_misses(rows: list[Mapping[str, Any]]) -> None:
    missed = [r["name"] for r in rows if r["result"] not in ("loaded", "rescaled")]
    if missed:
        more = ", …" if len(missed) > 4 else ""
        warnings.warn(
            f"load_observer_params: {len(missed)} of {len(rows)} quantizers got no range: {', '.join(missed[:4])}{more}",
            stacklevel=3,
        )


def reset_scale(
    model: nn.Module, method: str = "percentile", *, percentile: float = 99.99, prefix: str = ""
) -> None:
    """Take the ranges of all `histogram` observers (whose name begins with *prefix*) again, by *method*, without data.

    *method*: `percentile`, `mse`, `kl` or `min_max`. *raises* `PlanError` if there is no such observer with data.
    """
    found = [
        q for name, q in quantizers_of(model) if name.startswith(prefix) and isinstance(q.observer, Histogram)
    ]
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
            quantizer.observer.set_range(*quantizer.observer.range_by(method, percentile))
            scale, zero = quantizer.range_scales()
            quantizer.zero_point.copy_(zero)
            quantizer.set_scale(scale)

"""Two models layer by layer on one input: statistics of each layer, never its values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.analysis.metrics import METRICS
from bitwright.analysis.outputs import named_tensors
from bitwright.analysis.trace import Layer, Trace, layers_of, values_by_layer
from bitwright.errors import ModelError
from bitwright.numerics.spec import QParams
from bitwright.table import Column, Table
from bitwright.train.prepared import PreparedModel

#: After the columns that the vendor's tools write come ours: variances, further metrics, and the own error in steps.
COLUMNS = (
    Column("index", "index"),
    Column("mod_name", "mod_name"),
    Column("base_op_type", "base_op_type"),
    Column("analy_op_type", "analy_op_type"),
    Column("shape", "shape"),
    Column("quant_dtype", "quant_dtype"),
    Column("qscale", "qscale", digits=8),
    Column("Cosine", "Cosine", digits=7),
    Column("L1", "L1", digits=7),
    Column("Atol", "Atol", digits=7),
    Column("max_qscale_diff", "max_qscale_diff"),
    Column("base_model_min", "base_model_min"),
    Column("analy_model_min", "analy_model_min"),
    Column("base_model_max", "base_model_max"),
    Column("analy_model_max", "analy_model_max"),
    Column("base_model_mean", "base_model_mean"),
    Column("analy_model_mean", "analy_model_mean"),
    Column("base_model_var", "base_model_var"),
    Column("analy_model_var", "analy_model_var"),
    Column("MSE", "MSE", digits=7),
    Column("KL", "KL", digits=7),
    Column("SQNR", "SQNR"),
    Column("Rtol", "Rtol"),
    Column("own_error", "own_error"),
)


@dataclass(frozen=True)
class LayerStatistics:
    """One layer in both models. *row*: the cells of `COLUMNS`; absent where the baseline has no such layer.

    *qparams*: of the analysed layer. *clipped*: share of the baseline's numbers that its codes cannot reach.
    """

    name: str
    kind: str
    row: Mapping[str, Any]
    qparams: QParams | None
    clipped: float


def compare_layers(baseline: nn.Module, analysed: PreparedModel, data: Any) -> list[LayerStatistics]:
    """Statistics of every layer of *analysed*, in its order. *raises* `ModelError` if the models share no layer."""
    layers = layers_of(analysed)
    base, kinds = values_by_layer(baseline, data, layers)
    trace = Trace(analysed, data)
    common = _comparable(layers, base, trace)
    if not common:
        raise ModelError(
            "layers of the two models",
            expected="layers of the same names and shapes",
            found=f"none; the analysed model has {_few(layers)}",
            remedy="Give the model that was prepared, or another state of the same prepared model, as baseline.",
        )
    known = dict(_quantized_inputs(layers, trace))
    known.update((layers[name].node, value) for name, value in common.items())
    own = trace.fed(known)
    return [
        statistics
        for name, layer in layers.items()
        for statistics in _of_layer(
            layer,
            kinds.get(name, ""),
            known.get(layer.node),
            trace.values[layer.node],
            own.get(layer.node),
        )
    ]


def _comparable(layers: Mapping[str, Layer], base: Mapping[str, Any], trace: Trace) -> dict[str, Any]:
    """Values of *base* that are of the shapes that the analysed model has there."""
    return {
        name: value
        for name, value in base.items()
        if type(value) is type(trace.values[layers[name].node])
        and _shapes(value) == _shapes(trace.values[layers[name].node])
        and _shapes(value)
    }


def _shapes(value: Any) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in named_tensors(value).items()}


def _quantized_inputs(layers: Mapping[str, Layer], trace: Trace) -> Iterator[tuple[fx.Node, Any]]:
    """What both models are given, for the layers that quantize it."""
    for layer in layers.values():
        source = layer.node.args[0] if layer.op is None and layer.node.args else None
        if isinstance(source, fx.Node) and source.op == "placeholder":
            yield layer.node, trace.values[source]


def _of_layer(layer: Layer, base_kind: str, a: Any, b: Any, own: Any) -> Iterator[LayerStatistics]:
    """One layer, or one entry for each tensor that it makes."""
    base, owns = named_tensors(a), named_tensors(own)
    made = named_tensors(b)
    quantizer = layer.quantizer
    shown = quantizer is not None and quantizer.state.quantizes and quantizer.has_range
    qparams = quantizer.qparams() if quantizer is not None and shown else None
    for part, y in made.items():
        x = base.get(part)
        row: dict[str, Any] = {
            "mod_name": layer.name if len(made) == 1 else f"{layer.name}[{part}]",
            "base_op_type": base_kind or ("Input" if layer.op is None else None),
            "analy_op_type": layer.kind,
            "shape": "x".join(map(str, y.shape)),
            "quant_dtype": str(y.dtype).removeprefix("torch.")
            if qparams is None
            else qparams.spec.dtype.name,
            "qscale": None if qparams is None else max(qparams.scale),
            **_spread("analy_model", y),
        }
        if x is not None and y.numel():
            row |= _spread("base_model", x) | _differences(x, y, qparams)
            row["own_error"] = _steps(x, owns[part], qparams) if part in owns else None
        clipped = 0.0 if x is None or qparams is None else _clipped(x, qparams)
        yield LayerStatistics(row["mod_name"], layer.kind, row, qparams, clipped)


def _spread(model: str, x: Tensor) -> dict[str, float]:
    if x.numel() == 0:
        return {}
    x = x.double()
    lo, hi = torch.aminmax(x)
    return {
        f"{model}_min": float(lo),
        f"{model}_max": float(hi),
        f"{model}_mean": float(x.mean()),
        f"{model}_var": float(x.var(correction=0)),
    }


def _differences(a: Tensor, b: Tensor, qparams: QParams | None) -> dict[str, Any]:
    difference = (a.double() - b.double()).abs()
    found = {name: METRICS.get(name, where="layers").measure(a, b) for name in METRICS}
    relative = difference / a.double().abs().clamp_min(torch.finfo(torch.float32).eps)
    return {
        **found,
        "Atol": float(difference.max()),
        "Rtol": float(relative.max()),
        "max_qscale_diff": _steps(a, b, qparams),
    }


def _steps(a: Tensor, b: Tensor, qparams: QParams | None) -> float | None:
    """The largest difference in steps of the layer's codes."""
    if qparams is None:
        return None
    return float(((a.double() - b.double()).abs() / qparams.scale_tensor(a).double()).max())


def _clipped(x: Tensor, qparams: QParams) -> float:
    """The share of *x* that lies more than half a step beyond the ends of the codes."""
    scale, zero = qparams.scale_tensor(x), qparams.zero_point_tensor(x)
    codes, d = x / scale + zero, qparams.spec.dtype
    return float(((codes < d.qmin - 0.5) | (codes > d.qmax + 0.5)).double().mean())


def _few(names: Collection[str]) -> str:
    return ", ".join(list(names)[:4]) + (", …" if len(names) > 4 else "")


def layer_table(
    layers: Collection[LayerStatistics], prefixes: Collection[str] = (), kinds: Collection[str] = ()
) -> Table:
    """The layers whose names begin with one of *prefixes* and that are of one of *kinds*; empty: all."""
    chosen = [
        {"index": index, **layer.row}
        for index, layer in enumerate(layers)
        if (not prefixes or layer.name.startswith(tuple(prefixes))) and (not kinds or layer.kind in kinds)
    ]
    return Table("Layer by layer", COLUMNS, tuple(chosen))

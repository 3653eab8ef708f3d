"""From a trained prepared model to what runs on integers: the plan, and a callable int8 module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from bitwright.calibrate.biases import bias_entry
from bitwright.errors import DataError, PlanError
from bitwright.exporters.onnx_float import save_model
from bitwright.exporters.onnx_qdq import export_qdq
from bitwright.flow.outputs import check_writable
from bitwright.graph.graph import Graph, GraphInput
from bitwright.numerics.affine import THRESHOLD_FLOOR
from bitwright.numerics.spec import QParams
from bitwright.ops.batchnorm import channels_of, fold_factor, over_channels, times_channels
from bitwright.ops.table import without_tables
from bitwright.plan.plan import Plan, ValueEntry
from bitwright.plan.reads import is_quantized
from bitwright.rewrite.fold_batchnorm import fold_batchnorm
from bitwright.runtime.session import Session
from bitwright.train.fake_quants import Quantizer
from bitwright.train.prepared import Place, PreparedModel, check_float32, prepared_in
from bitwright.train.states import FakeQuantState


@dataclass(frozen=True)
class Decided:
    """A prepared model as other stages take it.

    *graph*: with batch normalisation folded and weights on their codes. *plan*: with the learned parameters.
    """

    graph: Graph
    plan: Plan


def decided(model: nn.Module) -> Decided:
    """What *model* (prepared, or wrapping such) has learned.

    *raises* `PlanError` naming an observer that never ran, `ModelError` if the model was changed since `prepare`.
    """
    prepared = prepared_in(model)
    prepared.check_unchanged()
    check_float32(prepared)
    _check_calibrated(prepared)
    return _Decision(prepared).made()


def _check_calibrated(prepared: PreparedModel) -> None:
    silent = [path for path, q in prepared.quantizers if not q.has_range]
    if silent:
        raise PlanError(
            silent[0],
            expected="a calibrated or trained model",
            found=f"{len(silent)} observers that never ran",
            remedy="Run some batches in state CALIBRATION or QAT, or load_observer_params, before converting.",
        )


class _Decision:
    """Folds batch normalisation, and says what each quantizer's scale becomes by that."""

    def __init__(self, prepared: PreparedModel) -> None:
        self.prepared = prepared
        self.facts = prepared.facts
        self.graph = without_tables(prepared.float_graph()).cpu().eval()
        self.places = {place.value: place for place in self.facts.places}
        self.factors: dict[str, tuple[Tensor, int, int]] = {}

    def made(self) -> Decided:
        plan, weights = self.facts.plan, dict[str, QParams]()
        for name, entry in plan.values.items():
            if entry.role == "weight" and name in self.places:
                weights[name] = self._weight(name)
        folded = fold_batchnorm(self.graph)
        values: dict[str, ValueEntry] = {}
        for name, entry in plan.values.items():
            values[name] = replace(entry, qparams=self._qparams(name, entry, weights, values))
        for name, entry in plan.values.items():
            if entry.role == "bias":
                values[name] = bias_entry(folded, self.facts.target, plan, values, name)
        return Decided(folded, replace(plan, values=values))

    def _qparams(
        self,
        name: str,
        entry: ValueEntry,
        weights: Mapping[str, QParams],
        values: Mapping[str, ValueEntry],
    ) -> QParams | None:
        if entry.role == "weight":
            return weights.get(name)
        if name in self.places:
            return self._quantizer(self.places[name]).qparams()
        source = None if entry.same_as is None else values.get(entry.same_as)
        return None if source is None else source.qparams

    def _quantizer(self, place: Place) -> Quantizer:
        found = self.prepared.get_submodule(place.path)
        assert isinstance(found, Quantizer)
        return found

    @torch.no_grad()
    def _weight(self, name: str) -> QParams:
        """Puts the weight *name* on its codes. *returns*: its parameters once batch normalisation is folded into it."""
        place, weight = self.places[name], self.graph.constant(name)
        quantizer = copy.deepcopy(self._quantizer(place)).cpu()
        q, factor = quantizer.qparams(), self._factor(name)
        quantizer.state = FakeQuantState.VALIDATION
        if not place.folded_by or factor is None:
            rounded = quantizer.eval()(weight)
        else:
            rounded = over_channels(quantizer.eval()(times_channels(weight, *factor)), *factor)
        if self._is_read_only_quantized(name):
            weight.copy_(rounded)
        if factor is None or place.folded_by:
            return q
        least = THRESHOLD_FLOOR / q.spec.dtype.qmax
        each = factor[0].abs().double()
        scales = torch.tensor(q.scale, dtype=torch.float64)
        scales *= each.repeat_interleave(len(scales) // len(each))
        return replace(q, scale=tuple(scales.clamp(min=least).float().tolist()))

    def _factor(self, weight: str) -> tuple[Tensor, int, int] | None:
        """What folding will multiply the channels of *weight* by, their axis, and groups; None if nothing is folded."""
        readers = self.graph.value(weight).readers
        factors = [self._factor_of(norm) for norm in self.facts.norms.get(readers[0].op, ())]
        if not factors:
            return None
        rank = self.graph.constant(weight).dim()
        return torch.stack(factors).prod(0), *channels_of(self.graph.op(readers[0].op), rank)

    def _factor_of(self, norm: str) -> Tensor:
        inputs = self.graph.op_inputs(norm)
        gain, variance = (None if v is None else self.graph.constant(v) for v in (inputs[1], inputs[4]))
        assert variance is not None
        return fold_factor(gain, variance, float(self.graph.op(norm).epsilon))  # type: ignore[arg-type]

    def _is_read_only_quantized(self, name: str) -> bool:
        return all(is_quantized(self.facts.plan, r.op) for r in self.graph.value(name).readers)


def warn_of_saturation(plan: Plan) -> None:
    """Tells whoever called the function that calls this one."""
    values = plan.values.items()
    found = [f"{name} ({e.why})" for name, e in values if e.role == "bias" and e.qparams and e.why]
    if found:
        warnings.warn(f"biases do not fit into the chip's format: {'; '.join(found[:4])}", stacklevel=3)


# --- the int8 module -------------------------------------------------------------------------------------------


class QuantizedModel(nn.Module):
    """The converted network: called like the float model, computed by ONNX Runtime on integers, on the CPU.

    *plan*: every scale and zero point. *model*: the file's contents. `save` writes it. It has no parameters and no
    gradient.
    """

    def __init__(
        self, plan: Plan, model: onnx.ModelProto, inputs: Sequence[GraphInput], outputs: Any
    ) -> None:
        """*outputs*: where the model's outputs stand in the structure that the float model returns."""
        super().__init__()
        self.plan, self.model = plan, model
        self._inputs, self._structure = tuple(inputs), outputs
        self._session = Session(model)
        self.eval()

    @classmethod
    def of(cls, graph: Graph, plan: Plan, model: onnx.ModelProto) -> QuantizedModel:
        """The *model* that *graph* was exported as under *plan*, with outputs in the same structure."""
        info = graph.info
        return cls(plan, model, info.inputs, _named(graph.graph.output_node().args[0], iter(info.outputs)))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return _filled(self._structure, self.outputs(self._feeds(args, kwargs)))

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of the file by name, for *inputs* by name; on the device of the inputs."""
        return self._session.tensors(inputs)

    def _feeds(self, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [i.name for i in self._inputs]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or set(given) != set(names):
            raise DataError(
                "converted model",
                expected=f"the inputs {', '.join(names)}",
                found=f"{len(args)} positional, and {', '.join(kwargs) or 'none by name'}",
                remedy="Call it as the float model.",
            )
        for spec in self._inputs:
            x = given[spec.name]
            if not isinstance(x, Tensor) or x.is_quantized or x.dtype is not spec.dtype:
                found = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
                raise DataError(
                    f"input {spec.name} of the converted model",
                    expected=f"a tensor of {spec.dtype}: the model quantizes its inputs itself",
                    found=found,
                    remedy="Pass the tensor that the float model takes, e.g. x.float().",
                )
        return given

    def save(self, path: str | Path) -> Path:
        """Write the ONNX file. *raises* `OutputError`."""
        place = Path(path)
        check_writable(place.parent)
        save_model(self.model, place)
        return place

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        return self  # nothing in it ever changes

    def __reduce__(self) -> tuple[Any, ...]:
        # An engine's session cannot be pickled; the model it runs can.
        return QuantizedModel, (self.plan, self.model, self._inputs, self._structure)

    def extra_repr(self) -> str:
        return f"inputs={[i.name for i in self._inputs]}, outputs={list(self._session.outputs)}"


@dataclass(frozen=True)
class _Output:
    """Where an output of the model stands in what is returned."""

    name: str


def _named(structure: Any, names: Iterator[str]) -> Any:
    """*structure*, of dictionaries, lists and (named) tuples, with an output in the place of each node."""
    return _mapped(structure, lambda leaf: _Output(next(names)) if isinstance(leaf, fx.Node) else leaf)


def _filled(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """*structure* with a tensor in the place of each output."""
    return _mapped(structure, lambda leaf: tensors[leaf.name] if isinstance(leaf, _Output) else leaf)


def _mapped(structure: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(structure, dict):
        return {key: _mapped(part, change) for key, part in structure.items()}
    if isinstance(structure, (list, tuple)):
        parts = [_mapped(part, change) for part in structure]
        if hasattr(structure, "_fields"):
            return type(structure)(*parts)
        # A list of fx, which nobody can append to, becomes a plain one.
        return parts if isinstance(structure, list) else type(structure)(parts)
    return change(structure)


def convert(model: nn.Module) -> QuantizedModel:
    """The true int8 (or int16, or mixed) form of a calibrated or trained *model*, which is not changed.

    The mode that *model* is in does not matter.
    *raises* `PlanError` for observers that never ran, `ModelError` for operators without an ONNX form.
    """
    found = decided(model)
    warn_of_saturation(found.plan)
    return QuantizedModel.of(found.graph, found.plan, export_qdq(found.graph, found.plan))

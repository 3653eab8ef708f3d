"""Executing a prepared model node by node: every layer's value, and what follows from changing one module."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.errors import DataError, ModelError
from bitwright.graph.op import Op
from bitwright.train.fake_quants import QUANTIZER_NAMES, Quantizer
from bitwright.train.prepared import quantizers_of


def kind_of(op: Op | None) -> str:
    """The kind of *op* in reports; `Input` where a quantized input of the model has none."""
    return "Input" if op is None else op.kind


@dataclass(frozen=True)
class Layer:
    """What one operator makes. *node*: of its value as others read it, after its *quantizer* if it has one."""

    name: str
    node: fx.Node
    op: Op | None
    quantizer: Quantizer | None

    @property
    def kind(self) -> str:
        """The operator's kind; `Input` for a quantized input of the model."""
        return kind_of(self.op)


def layers_of(model: fx.GraphModule) -> dict[str, Layer]:
    """The layers of *model* by name, in the order of execution. A rectifier that its quantizer computes is a layer as well."""
    layers: dict[str, Layer] = {}
    for node in model.graph.nodes:
        if node.op != "call_module":
            continue
        path = str(node.target)
        module = model.get_submodule(path)
        if isinstance(module, Op):
            layers[path] = Layer(path, node, module, None)
        elif isinstance(module, Quantizer) and not module.is_weight:
            owner, _, leaf = path.rpartition(".")
            if leaf.startswith(QUANTIZER_NAMES["activation"]):
                index = leaf.removeprefix(QUANTIZER_NAMES["activation"]).removeprefix("_")
                name = f"{owner}[{index}]" if index else owner
                layers[name] = Layer(name, node, operator_at(model, owner), module)
    return layers


def operator_at(model: nn.Module, path: str) -> Op | None:
    """The operator at *path* of *model*, if there is one."""
    found = model.get_submodule(path)
    return found if isinstance(found, Op) else None


class Trace(fx.Interpreter):
    """One execution of *model* on *data*, all values kept. *values*: node -> what it made; *result*: what the model returns.

    Memory: the activations of one input.
    """

    def __init__(self, model: fx.GraphModule, data: Any) -> None:
        super().__init__(model, garbage_collect_values=False)  # type: ignore[no-untyped-call]
        self.nodes: list[fx.Node] = list(model.graph.nodes)
        inputs = bind(model, data)
        self.env = {}
        for node in self.nodes:
            made = inputs[str(node.target)] if node.op == "placeholder" else self.run_node(node)
            self.env[node] = made
        self.values: dict[fx.Node, Any] = self.env
        self.result: Any = self.values[self.nodes[-1]]

    def rerun(self, changed: Collection[str]) -> Any:
        """The output now that the modules *changed* compute something else: they, and what follows from them, run again."""
        self.env = dict(self.values)
        stale: set[fx.Node] = set()
        for node in self.nodes:
            if node.target in changed or any(source in stale for source in node.all_input_nodes):
                stale.add(node)
                self.env[node] = self.run_node(node)
        return self.env[self.nodes[-1]]

    def fed(self, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """What each node of *values* makes if all that it reads are *values*, or follow from them: its own error only."""
        self.env = dict(self.values)
        own: dict[fx.Node, Any] = {}
        stale: set[fx.Node] = set()
        for node in self.nodes:
            if any(source in stale for source in node.all_input_nodes):
                self.env[node] = self.run_node(node)
                stale.add(node)
            if node in values:
                own[node], self.env[node] = self.env[node], values[node]
                stale.add(node)
        return own


def bind(model: nn.Module, data: Any) -> dict[str, Any]:
    """The arguments of *model*, by name, that *data* is: a mapping of them, a tuple or list, or the only one.

    *raises* `DataError` if they do not fit.
    """
    args, kwargs = arguments(data)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as e:
        raise DataError(
            "data of the analysis",
            expected="what the model is called with: a tensor, a tuple, or a mapping from argument names",
            found=f"{_described(data)} ({e})",
            remedy="Leave labels out: give a generator such as (x for x, _ in loader).",
        ) from e
    bound.apply_defaults()
    return dict(bound.arguments)


def arguments(data: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments that *data* stands for."""
    if isinstance(data, Mapping):
        return (), {str(k): v for k, v in data.items()}
    return (tuple(data), {}) if isinstance(data, (tuple, list)) else ((data,), {})


def _described(data: Any) -> str:
    if isinstance(data, Mapping):
        return f"a mapping of {', '.join(map(str, data))}"
    return f"{len(data)} items" if isinstance(data, (tuple, list)) else type(data).__name__


def call(model: nn.Module, data: Any) -> Any:
    """What *model* returns for *data*. *raises* `DataError` if the arguments do not fit."""
    bind(model, data)
    args, kwargs = arguments(data)
    return model(*args, **kwargs)


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Evaluate *models* without gradients, in evaluation mode; they are as before afterwards.

    *raises* `ModelError` if a quantizer would follow what it sees.
    """
    for model in models:
        _check_states(model)
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_states(model: nn.Module) -> None:
    for path, quantizer in quantizers_of(model):
        if quantizer.state.observes:
            raise ModelError(
                f"quantizer {path}",
                expected="a state that observes nothing, so that the analysis changes nothing",
                found=quantizer.state.name,
                remedy="Call set_fake_quantize(model, FakeQuantState.VALIDATION) (or FLOAT) first.",
            )


def values_by_layer(
    model: nn.Module, data: Any, wanted: Collection[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the layers *wanted* of *model* make for *data*, and of what kind they are, by name.

    In a module that is no graph, a layer is a submodule that is called exactly once.
    """
    if isinstance(model, fx.GraphModule):
        trace, layers = Trace(model, data), layers_of(model)
        values = {name: trace.values[layer.node] for name, layer in layers.items() if name in wanted}
        return values, {name: layer.kind for name, layer in layers.items()}
    return _hooked(model, data, wanted)


def _hooked(model: nn.Module, data: Any, wanted: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    seen: dict[str, list[Any]] = {}
    kinds: dict[str, str] = {}
    handles = []
    for path, module in model.named_modules():
        if path in wanted:
            kinds[path], outputs = type(module).__name__, seen.setdefault(path, [])
            # A copy: what follows may write into it.
            handles.append(
                module.register_forward_hook(lambda _m, _i, out, kept=outputs: kept.append(_copied(out)))
            )
    try:
        call(model, data)
    finally:
        for handle in handles:
            handle.remove()
    return {path: outputs[0] for path, outputs in seen.items() if len(outputs) == 1}, kinds


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(map(_copied, output)) if type(output) in (tuple, list) else output

"""`PreparedModel`: a captured network with a quantizer at every value that a plan quantizes, ready to be trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.errors import ModelError
from bitwright.graph.graph import Graph, GraphInfo
from bitwright.graph.op import Op
from bitwright.graph.structure import Record, graph_of, held_by, keep_state, module_of, records_of
from bitwright.ops.table import replace_operator
from bitwright.plan.plan import Plan
from bitwright.plan.target import Target
from bitwright.table import Table
from bitwright.train.checkpoint import EXTRA, check_format
from bitwright.train.fake_quants import Quantizer


@dataclass(frozen=True)
class Place:
    """Where a quantizer stands. *value*: what it quantizes; *path*: its module.

    *folded_by*: the batch normalisations whose factors the weight is multiplied by before, and divided by after.
    """

    value: str
    path: str
    folded_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What a prepared model knows of itself. *operators*: nodes of the graph without quantizers.

    *plan*: the decisions, without parameters, for the graph with batch normalisation folded. *norms*: operator -> the batch
    normalisations that are folded into it there, in their order. *report*: what each operator got, and why. *example*: input
    name -> tensor.
    """

    operators: tuple[Record, ...]
    info: GraphInfo
    plan: Plan
    norms: Mapping[str, tuple[str, ...]]
    target: Target
    places: tuple[Place, ...]
    report: Table
    example: Mapping[str, Tensor]


class ByMode(nn.Module):
    """In the graph of a model that returns something else in training: where both kinds of outputs meet. What runs is one of two
    functions, each with what its own outputs need.
    """

    def forward(self, in_evaluation: Any, in_training: Any) -> Any:
        """The one of both that belongs to the mode."""
        return in_training if self.training else in_evaluation


class PreparedModel(fx.GraphModule):
    """A network that is called, trained, copied and saved like the module it was made from, under the same parameter names.

    Quantizers are `<operator>.activation_post_process` and `<operator>.weight_fake_quant`. A checkpoint of the float model
    loads; one of a prepared model holds ranges and scales too. `report` says what every operator got, and why.
    """

    @classmethod
    def build(cls, root: nn.Module, graph: fx.Graph, facts: Facts) -> PreparedModel:
        """A model over the modules of *root*."""
        made = cls(root, graph, "PreparedModel")
        _keep_operators(made, root, facts)
        keep_state(made, root, {})
        made.__dict__["facts"] = facts
        made.__dict__["_kinds"] = {
            target: type(made.get_submodule(target))
            for target in {*_calls(graph), *_calls(graph_of(list(facts.operators)))}
        }
        made.__dict__["_called"] = _calls(graph)
        for path, module in root.named_modules():
            made.get_submodule(path).training = module.training
        made._part_modes()
        made.register_load_state_dict_post_hook(_allow_float_checkpoint)  # type: ignore[no-untyped-call]
        return made

    facts: Facts

    def _part_modes(self) -> None:
        """Run in each mode only what its outputs need: a loss that needs labels, or statistics, would be of the other one."""
        by_mode = [n for n in self.graph.nodes if _is_by_mode(self, n)]
        if not by_mode:
            return
        in_evaluation, in_training = (_function(self.graph, self, which) for which in (0, 1))

        @wraps(in_evaluation)  # for those who read its signature
        def forward(self: PreparedModel, *args: Any, **kwargs: Any) -> Any:
            return (in_training if self.training else in_evaluation)(self, *args, **kwargs)

        type(self).forward = forward  # fx makes a class for each module  # type: ignore[method-assign]

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedModel:
        root = module_of(copy.deepcopy(held_by(self), memo))
        return PreparedModel.build(root, graph_of(records_of(self.graph)), self.facts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (held_by(self), records_of(self.graph), self.facts)

    def _get_name(self) -> str:
        return "PreparedModel"

    # --- what is in it ---------------------------------------------------------------------------------------

    @property
    def report(self) -> Table:
        """What each operator got, and why."""
        return self.facts.report

    @property
    def quantizers(self) -> Iterator[tuple[str, Quantizer]]:
        """Path and module of every quantizer."""
        return quantizers_of(self)

    @property
    def in_evaluation_alone(self) -> list[nn.Module]:
        """Operators and quantizers that do not run in training, as the network computes something else there."""
        by_mode = next((n for n in self.graph.nodes if _is_by_mode(self, n)), None)
        if by_mode is None:
            return []
        here, there = (_needed_for(by_mode.args[which]) for which in (0, 1))
        return [self.get_submodule(str(n.target)) for n in here if n.op == "call_module" and n not in there]

    def float_graph(self) -> Graph:
        """The operators without the quantizers, over the same parameters."""
        return Graph.build(self, graph_of(list(self.facts.operators)), self.facts.info)

    def quantizer_of(self, value: str) -> Quantizer | None:
        """What quantizes *value*, or the value whose codes it passes on; None if nothing does."""
        paths = {place.value: place.path for place in self.facts.places}
        name: str | None = value
        while name is not None and name not in paths:
            entry = self.facts.plan.values.get(name)
            name = None if entry is None else entry.same_as
        if name is None:
            return None
        found = self.get_submodule(paths[name])
        assert isinstance(found, Quantizer)
        return found

    def put_operator(self, path: str, op: Op) -> None:
        """Let *op* compute what the operator at *path* computed."""
        replace_operator(self, path, op)
        self.__dict__["_kinds"][path] = type(op)

    def check_unchanged(self) -> None:
        """*raises* `ModelError` if operators were replaced or the graph was edited since `prepare`."""
        for path, kind in self.__dict__["_kinds"].items():
            try:
                found = type(self.get_submodule(path))
            except AttributeError:
                found = None  # type: ignore[assignment]
            if found is not kind:
                raise _changed(path, kind, found)
        if _calls(self.graph) != self.__dict__["_called"]:
            raise _changed("graph", fx.Graph, None)

    # --- checkpoints -----------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self._check_formats(state_dict, prefix)
        own = {f"{prefix}{key}" for key in self._quantizer_keys()}
        from_float = not own & set(state_dict)
        self.__dict__["_excused"] = own if from_float else set()
        if from_float and self._would_change(state_dict, prefix):
            self._forget_ranges()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_formats(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """*raises* `ModelError` for scales of other formats, before anything is loaded."""
        for path, quantizer in self.quantizers:
            name = f"{prefix}{path}"
            check_format(f"checkpoint, {name}", quantizer.spec, state_dict.get(f"{name}.{EXTRA}"))

    def _would_change(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        new = ((p, state_dict.get(f"{prefix}{name}")) for name, p in self.named_parameters())
        return any(
            isinstance(x, Tensor) and not (x.shape == p.shape and torch.equal(x.to(p), p)) for p, x in new
        )

    def _forget_ranges(self) -> None:
        """Ranges of other weights would clip these."""
        stale = [quantizer for _, quantizer in self.quantizers if quantizer.has_range]
        for quantizer in stale:
            quantizer.forget()
        if any(not quantizer.has_range for quantizer in stale):
            warnings.warn(
                "a float checkpoint was loaded into a calibrated model: its ranges are forgotten; calibrate again",
                stacklevel=2,
            )

    def _quantizer_keys(self) -> set[str]:
        """Keys of `state_dict` that the float model does not have."""
        return {f"{path}.{key}" for path, quantizer in self.quantizers for key in quantizer.state_dict()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As for any module; the checkpoint may be one of the float model. *raises* `ModelError` if names do not fit."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        if strict and (result.missing_keys or result.unexpected_keys):
            raise _misfit(result.missing_keys, result.unexpected_keys)
        return result


def quantizers_of(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Path and module of every quantizer in *model*, each once."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Quantizer))


def check_float32(model: nn.Module) -> None:
    """*raises* `ModelError` for a parameter of *model* that is not float32: of others no scale is exact."""
    wrong = [(n, p.dtype) for n, p in model.named_parameters() if p.dtype is not torch.float32]
    if wrong:
        raise ModelError(
            wrong[0][0],
            expected="float32 parameters, from which scales are exact",
            found=str(wrong[0][1]),
            remedy="Call model.float(); for faster training use torch.autocast instead of .half() or .bfloat16().",
        )


def prepared_in(model: nn.Module) -> PreparedModel:
    """The prepared model that *model* is or merely wraps (DDP, averaging, compilation). *raises* `ModelError` otherwise."""
    inner = model
    while not isinstance(inner, PreparedModel):
        wrapped = [getattr(inner, name, None) for name in ("module", "_orig_mod")]
        following = next((m for m in wrapped if isinstance(m, nn.Module)), None)
        if following is None:
            parts = [path for path, m in model.named_modules() if isinstance(m, PreparedModel)]
            raise ModelError(
                type(model).__name__,
                expected="a model that prepare() returned",
                found=f"one of which only {', '.join(parts)} is prepared" if parts else "a float model",
                remedy="Give the prepared part itself."
                if parts
                else "Call bitwright.prepare(model, example_inputs) first.",
            )
        inner = following
    return inner


def _is_by_mode(model: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), ByMode)


def _needed_for(outputs: Any) -> dict[fx.Node, None]:
    """The nodes that *outputs* are made of."""
    found: dict[fx.Node, None] = {}
    open_ends: list[fx.Node] = []
    fx.map_arg(outputs, open_ends.append)
    while open_ends:
        node = open_ends.pop()
        if node not in found:
            found[node] = None
            open_ends += node.all_input_nodes
    return found


def _function(graph: fx.Graph, model: nn.Module, which: int) -> Callable[..., Any]:
    """What computes the outputs number *which* of `ByMode`, and nothing else."""
    alone = graph_of(records_of(graph))
    output = next(n for n in alone.nodes if n.op == "output")
    (by_mode,) = (n for n in alone.nodes if _is_by_mode(model, n))
    output.args = (by_mode.args[which],)
    for node in reversed([n for n in alone.nodes if n.op not in ("placeholder", "output")]):
        if not node.users:
            alone.erase_node(node)
    code = alone.python_code("self")
    made = dict(code.globals)
    exec(code.src, made)
    function: Callable[..., Any] = made["forward"]
    return function


def _restored(held: Mapping[str, Any], records: list[Record], facts: Facts) -> PreparedModel:
    return PreparedModel.build(module_of(held), graph_of(records), facts)


def _keep_operators(made: nn.Module, root: nn.Module, facts: Facts) -> None:
    """Give *made* the operators that a quantizer computes on the way (ReLU), which fx leaves behind."""
    for op, _, target, *_ in facts.operators:
        if op == "call_module":
            owner, _, leaf = str(target).rpartition(".")
            made.get_submodule(owner)._modules[leaf] = root.get_submodule(str(target))


def _calls(graph: fx.Graph) -> list[str]:
    """The modules that *graph* calls, in order."""
    return [str(n.target) for n in graph.nodes if n.op == "call_module"]


def _allow_float_checkpoint(module: nn.Module, incompatible: Any) -> None:
    excused = module.__dict__.get("_excused", set())
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in excused]


def _changed(path: str, kind: type, found: type | None) -> ModelError:
    return ModelError(
        path,
        expected=f"the {kind.__name__} that prepare() put there",
        found="nothing of it" if found is None else found.__name__,
        remedy="Change the float model, and prepare it again; what quantizes a value was decided for the old graph.",
    )


def _misfit(missing: list[str], unexpected: list[str]) -> ModelError:
    parts = [
        f"{len(keys)} {word} ({', '.join(keys[:4])}{', …' if len(keys) > 4 else ''})"
        for word, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    wrapper = next((w for w in ("module.", "_orig_mod.") if any(k.startswith(w) for k in unexpected)), "")
    if wrapper:
        remedy = f"It was saved from a wrapped model: strip the prefix {wrapper!r}."
    elif all(_is_of_quantizer(key) for key in (*missing, *unexpected)):
        remedy = (
            "It was saved from a model that was prepared with another qconfig, target or batchnorm: prepare this one"
            " alike, or pass strict=False to take what fits."
        )
    else:
        remedy = "Load it into the float model first, or pass strict=False to take what fits."
    return ModelError(
        "checkpoint",
        expected="the parameter names of this model",
        found=" and ".join(parts),
        remedy=remedy,
    )


def _is_of_quantizer(key: str) -> bool:
    return any("_post_process" in part or "_fake_quant" in part for part in key.split("."))

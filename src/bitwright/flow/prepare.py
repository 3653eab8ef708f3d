"""`prepare`: from a float model to one that can be calibrated and trained as its chip will compute it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from bitwright.errors import ModelError
from bitwright.flow.bench import read_model
from bitwright.flow.wishes import Choice, attributes_of, choose, granted, report_of
from bitwright.graph.device import device_of
from bitwright.graph.graph import Graph, GraphInput
from bitwright.graph.op import Op, Role
from bitwright.graph.replay import Replay
from bitwright.graph.training_branch import TrainingBranch, is_faithful, join_training
from bitwright.importers.from_torch import capture_training
from bitwright.importers.torch_export import bind_example
from bitwright.importers.torch_training import TrainingBranchWarning
from bitwright.ops.attention import Attention
from bitwright.ops.dropout import Dropout
from bitwright.ops.recurrent import StackedRecurrent
from bitwright.plan.assign import assign
from bitwright.plan.plan import LEARNED, Plan
from bitwright.plan.qconfig import QconfigSetter, as_setters
from bitwright.plan.reads import masked_groups
from bitwright.plan.setters import default_qat_qconfig_setter
from bitwright.plan.target import Precision, Target, load_target
from bitwright.rewrite.decompose_attention import decompose_attention
from bitwright.rewrite.decompose_composites import decompose_composites
from bitwright.rewrite.fold_batchnorm import fold_batchnorm
from bitwright.train.batchnorm import BatchNormMode, check_mode, freeze_batchnorm
from bitwright.train.insert import Wishes, insert_quantizers
from bitwright.train.prepared import PreparedModel, check_float32


def prepare(
    model: nn.Module | Graph | str | Path,
    example_inputs: Any = None,
    qconfig_setter: QconfigSetter | Sequence[QconfigSetter] | None = None,
    *,
    target: str | Path | Target = "generic",
    batchnorm: BatchNormMode = "trained",
    verbose: bool = False,
) -> PreparedModel:
    """A trainable copy of *model* whose values are quantized as *target* computes them. *model* is not changed.

    *example_inputs*: one batch: a tensor, a tuple, or a mapping from argument names (not needed for an ONNX file).
    *qconfig_setter*: what each operator gets; several: the first with an opinion counts. A `qconfig` attribute on a module
    of *model* beats every setter, the innermost one first; `qconfig = None` keeps that part float. Where some modules have
    the attribute and there is no setter, the rest is float; where there is neither, everything gets the default for
    training. *batchnorm*: `trained`, `frozen` (statistics stay), or `folded` into the weights. *verbose*: print the report.

    The result is in state QAT and in the mode (train or eval) of *model*. *raises* `ModelError` for what cannot be traced,
    `UnknownName` for names that match nothing, `PlanError` for wishes that contradict each other.
    """
    chip = target if isinstance(target, Target) else load_target(target)
    check_mode(batchnorm)
    wished = attributes_of(model)
    setters = as_setters(qconfig_setter) or (() if wished else (default_qat_qconfig_setter,))
    if isinstance(model, nn.Module):
        _check_parameters(model)
    captured, branches = _captured(model, example_inputs)
    _warn_of_lost_dropout(model, captured)

    def spelled_out(graph: Graph) -> Graph:
        graph = decompose_attention(graph)
        graph = decompose_composites(graph) if chip.tables else graph
        return fold_batchnorm(graph) if batchnorm == "folded" else graph

    graph, branch = spelled_out(captured), None
    if branches:
        branch = _branch(model, example_inputs, graph, spelled_out, branches)
    folded = fold_batchnorm(graph).eval()
    example = _few(_example(model, graph, example_inputs), graph)
    choices = choose(folded, wished, setters, () if branch is None else branch.ops)
    infinite = _infinite_values(folded, example)
    plan = _plan(folded, chip, choices, infinite)
    got = granted(plan, choices)
    wishes = Wishes(got, report_of(folded, plan, choices, got))
    prepared = insert_quantizers(graph, folded, plan, chip, wishes, example, branch)
    _take_modes(prepared, model)
    if batchnorm == "frozen":
        freeze_batchnorm(prepared)
    _warn_of_refusals(plan, choices)
    if branch is not None:
        _warn_of_variants(prepared, branch)
    if verbose:
        print(prepared.report)
    return prepared


def _check_parameters(model: nn.Module) -> None:
    """*raises* `ModelError` for parameters that are not float32, and for weights that are computed at every call."""
    check_float32(model)
    for path, module in model.named_modules():
        found = _computed_weight(module)
        if found is not None:
            raise ModelError(
                path or type(model).__name__,
                expected="weights that are parameters: their codes are what the chip holds",
                found=f"{found[0]}, which computes the weight at every call",
                remedy=f"Remove it first: {found[1]}.",
            )


#: Kind of hook that computes a weight -> what takes it away.
_HOOKS = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(module)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(module)",
}


def _computed_weight(module: nn.Module) -> tuple[str, str] | None:
    """What computes a weight of *module* at every call, and the call that takes it away; None: nothing does."""
    if isinstance(parametrizations := getattr(module, "parametrizations", None), nn.ModuleDict):
        name = next(iter(parametrizations))
        call = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        return f"a parametrization of {name} (weight norm, spectral norm, …)", call
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            name = str(getattr(hook, "_tensor_name", "weight"))
            return f"a pruning mask on {name}", f"torch.nn.utils.prune.remove(module, {name!r})"
        if type(hook).__name__ in _HOOKS:
            return type(hook).__name__, _HOOKS[type(hook).__name__]
    return None


def _take_modes(prepared: PreparedModel, model: object) -> None:
    """Every operator is in the mode (train or eval) of the author's module that it stands in."""
    if not isinstance(model, nn.Module) or isinstance(model, Graph):
        prepared.eval()
        return
    modes = {path: m.training for path, m in model.named_modules(remove_duplicate=False)}
    for path, module in prepared.named_modules():
        parts = path.split(".")
        known = (".".join(parts[:i]) for i in range(len(parts), -1, -1))
        module.training = next(modes[name] for name in known if name in modes)


def _branch(
    model: object,
    example_inputs: Any,
    graph: Graph,
    spelled_out: Callable[[Graph], Graph],
    told: Sequence[warnings.WarningMessage],
) -> TrainingBranch | None:
    """What training computes besides *graph*. *told*: the warnings of it, which are given where it cannot be kept."""
    assert isinstance(model, nn.Module)
    captured = capture_training(model, example_inputs, dynamic=graph.info.dynamic_batch)
    found = None
    if captured is not None:
        trained = spelled_out(captured)
        found = join_training(graph, trained)
        example = _placed(_example(model, graph, example_inputs), graph)
        if found is not None and not is_faithful(found, trained, example):
            found = None
    for warning in told if found is None else ():
        warnings.warn(warning.message, stacklevel=3)
    return found


def _captured(
    model: nn.Module | Graph | str | Path, example_inputs: Any
) -> tuple[Graph, list[warnings.WarningMessage]]:
    """The graph of *model* in evaluation mode, and what was told of branches that it lacks."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", TrainingBranchWarning)
        graph = _read(model, example_inputs)
    branches = [w for w in told if issubclass(w.category, TrainingBranchWarning)]
    for warning in told:
        if warning not in branches:
            warnings.warn(warning.message, stacklevel=3)
    return graph, branches


def _read(model: nn.Module | Graph | str | Path, example_inputs: Any) -> Graph:
    if isinstance(model, nn.Module) and any(isinstance(m, PreparedModel) for m in model.modules()):
        raise ModelError(
            "prepare",
            expected="a float model",
            found="a model that is prepared already, or holds one that is",
            remedy="Prepare the float model again, and load_observer_params or load_state_dict into the result.",
        )
    try:
        return read_model(model, example_inputs)[1]
    except ModelError as error:
        untraceable = "forward" in error.expected or "operator" in error.expected
        if not isinstance(model, nn.Module) or not untraceable:
            raise
        raise ModelError(
            error.where,
            expected=error.expected,
            found=error.found,
            remedy=f"{error.remedy} To leave that part out, prepare the others by themselves: "
            "model.part = bitwright.prepare(model.part, inputs_of_part).",
        ) from error


def _warn_of_lost_dropout(model: object, captured: Graph) -> None:
    """Dropout that torch hides inside a module is lost where that module became something unusual (with projections, …)."""
    if not isinstance(model, nn.Module):
        return
    kept = [op.name for op in captured.ops if _drops(op)]
    lost = [
        path or type(model).__name__
        for path, module in model.named_modules()
        if _hides_dropout(module)
        and any(_is_in(op, path) for op in captured.op_names)
        and not any(_is_in(op, path) for op in kept)
    ]
    if lost:
        warnings.warn(
            f"prepare: the dropout inside {', '.join(lost)} is left out, also in training; all other dropout is kept",
            stacklevel=3,
        )


def _drops(op: Op) -> bool:
    return isinstance(op, Dropout) or (isinstance(op, (Attention, StackedRecurrent)) and op.dropout > 0.0)


def _is_in(op: str, path: str) -> bool:
    return not path or op == path or op.startswith(f"{path}.")


def _hides_dropout(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0.0)
    return isinstance(module, nn.RNNBase) and bool(module.dropout > 0.0 and module.num_layers > 1)


def _example(model: object, graph: Graph, example_inputs: Any) -> dict[str, Tensor]:
    """Input name -> one batch, on the CPU; of an ONNX file zeros."""
    names = [i.name for i in graph.info.inputs]
    if isinstance(model, nn.Module) and not isinstance(model, Graph):
        tensors = bind_example(model, example_inputs).tensors.values()
        return {n: t.detach().cpu().clone() for n, t in zip(names, tensors, strict=True)}
    if example_inputs is None:
        return {i.name: torch.zeros([d or 1 for d in i.shape], dtype=i.dtype) for i in graph.info.inputs}
    given = example_inputs
    if not isinstance(given, Mapping):
        listed = given if isinstance(given, (tuple, list)) else (given,)
        given = dict(zip(names, listed, strict=False)) if len(listed) == len(names) else {}
    for spec in graph.info.inputs:
        _check_example(given.get(spec.name), spec, names)
    return {n: given[n].detach().cpu() for n in names}


def _check_example(x: object, spec: GraphInput, names: Sequence[str]) -> None:
    fits = (
        isinstance(x, Tensor)
        and x.dim() == len(spec.shape)
        and all(d is None or d == n for d, n in zip(spec.shape, x.shape, strict=True))
    )
    if not fits:
        shape = "x".join("N" if d is None else str(d) for d in spec.shape)
        raise ModelError(
            f"example inputs, {spec.name}",
            expected=f"a tensor of {shape} for it; the inputs are {', '.join(names)}",
            found=f"a tensor of {'x'.join(map(str, x.shape))}" if isinstance(x, Tensor) else type(x).__name__,
            remedy="Give a tensor for each input, in this order or as a mapping from these names.",
        )


def _placed(example: Mapping[str, Tensor], graph: Graph) -> dict[str, Tensor]:
    """*example* where the parameters of *graph* are."""
    device = device_of(graph)
    return {n: x.to(device) for n, x in example.items()}


def _few(example: dict[str, Tensor], graph: Graph) -> dict[str, Tensor]:
    """Two samples of *example* where the batch may be any: it stays in the model."""
    return {n: x[:2].clone() for n, x in example.items()} if graph.info.dynamic_batch else example


def _infinite_values(folded: Graph, example: Mapping[str, Tensor]) -> set[str]:
    """Values that hold infinity for the example (masks): no code stands for that."""
    found = {
        v.name for v in folded.values.values() if v.is_constant and _is_infinite(folded.constant(v.name))
    }

    def look(name: str, x: Tensor) -> None:
        if _is_infinite(x):
            found.add(name)

    Replay(folded).run(_placed(example, folded), observe=look)
    return found


def _is_infinite(x: Tensor) -> bool:
    return bool(x.is_floating_point() and x.isinf().any())


def _plan(folded: Graph, target: Target, choices: Mapping[str, Choice], infinite: set[str]) -> Plan:
    asked: dict[str, Precision] = {
        name: "float" if c.qconfig is None else c.qconfig.precision for name, c in choices.items()
    }
    plan = assign(folded, target, asked=asked, method=LEARNED)
    for group, why in masked_groups(folded, plan, infinite).items():
        plan = plan.with_precision([group], "float", why)
    return _with_reasons(plan, asked)


def _with_reasons(plan: Plan, asked: Mapping[str, Precision]) -> Plan:
    """*plan* with a reason wherever an operator got another width than it asked for because of its group."""
    ops = dict(plan.ops)
    for name, entry in plan.ops.items():
        if entry.quantizable and entry.precision != asked[name] and not entry.why:
            others = [
                n for n, e in plan.ops.items() if e.group == entry.group and asked[n] == entry.precision
            ]
            if others:  # else int4 weights were asked for where there are no weights
                why = f"computed in one with {', '.join(others)}, which is {entry.precision}"
                ops[name] = replace(entry, why=why)
    return replace(plan, ops=ops)


def _warn_of_variants(prepared: PreparedModel, branch: TrainingBranch) -> None:
    """Operators that training computes otherwise, in float, are not trained for what the chip computes."""
    kinds = {branch.graph.op(name).kind for name in branch.ops}
    plan = prepared.facts.plan.ops
    into = {norm: name for name, norms in prepared.facts.norms.items() for norm in norms}  # whose plan says
    quantized = [
        op.name
        for op in prepared.in_evaluation_alone
        if isinstance(op, Op)
        and (entry := plan.get(into.get(op.name, op.name))) is not None
        and entry.precision != "float"
        and (op.kind in kinds or op.name in into or Role.WEIGHT in op.roles)
    ]
    if quantized:
        names = f"{', '.join(quantized[:3])}{', …' if len(quantized) > 3 else ''}"
        warnings.warn(
            f"prepare: training computes {names} otherwise or not at all (self.training), and what it has instead is float:"
            " quantized they are in evaluation alone, and calibration is what gives them ranges",
            stacklevel=3,
        )


def _warn_of_refusals(plan: Plan, choices: Mapping[str, Choice]) -> None:
    refused = {
        name: entry.why
        for name, entry in plan.ops.items()
        if (c := choices[name].qconfig) is not None
        and entry.quantizable
        and entry.why
        and entry.precision not in (c.precision, "int16")  # more bits than asked for do no harm
    }
    if refused:
        listed = "; ".join(f"{n}: {why}" for n, why in list(refused.items())[:3])
        warnings.warn(
            f"prepare: {len(refused)} operators did not get what was asked for ({listed}"
            f"{'; …' if len(refused) > 3 else ''}); see model.report",
            stacklevel=3,
        )

"""Any `nn.Module` to a `Graph`, by way of `torch.export`.

The exported graph is taken *undecomposed*, so that convolutions, norms and dropout are still what the author wrote;
writes in place become functional (`torch_functional`), every call becomes an operator (`ops`), named after the author's
modules (`torch_names`); what has no class of ours runs as an opaque operator. At the end the graph's answer is compared
with the model's own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from bitwright.errors import ModelError
from bitwright.graph.graph import Graph, GraphInfo, GraphInput
from bitwright.importers.assemble import Assembler, look_at_values
from bitwright.importers.torch_calls import Call, read_calls
from bitwright.importers.torch_dropout import all_in_evaluation, take_dropout
from bitwright.importers.torch_export import (
    Example,
    bind_example,
    explain,
    export,
    run_original,
    why_fixed,
)
from bitwright.importers.torch_functional import functionalize
from bitwright.importers.torch_names import canonical_paths, name_operators
from bitwright.importers.torch_training import (
    branches_of_training,
    export_training,
    warn_about_training_branches,
)
from bitwright.ops.opaque import Opaque

#: How far the graph's answer may be from the model's: relative to each element, and to the largest one.
RELATIVE, ABSOLUTE = 1e-4, 1e-5


def capture(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> Graph:
    """The graph of *model* in evaluation mode; it owns copies of the parameters, under their original paths.

    *example_inputs*: a tensor, a tuple of tensors, or a mapping from argument names to tensors; axis 0 of each is the
    batch. *dynamic_batch*: let the batch size vary; where the model does not allow it, it is fixed with a warning.
    *raises* `ModelError` for inputs that do not fit, for what torch.export cannot trace, and for what cannot be made
    functional.
    """
    example = bind_example(model, example_inputs)
    owned = _copy(model).eval()
    answer = run_original(owned, example)
    program, dynamic = _export(owned, example, dynamic_batch=dynamic_batch)
    trained = export_training(owned, _large_enough(example) if dynamic else example, dynamic=dynamic)
    if trained is not None:
        take_dropout(program, trained)
        warn_about_training_branches(owned, program, trained)
    graph = _Reader(owned, example, program, dynamic=dynamic).graph()
    _look(graph, example, dynamic=dynamic)
    _check(graph, example, answer, type(model).__name__)
    return graph


def capture_training(model: nn.Module, example_inputs: Any, *, dynamic: bool) -> Graph | None:
    """As `capture` (whose graph's batch is *dynamic* or not), but the author's own modules take the branches of training mode.

    None where that cannot be traced. The answer is not compared: in training it may be random.
    """
    example, owned = bind_example(model, example_inputs), _copy(model).eval()
    large = _large_enough(example) if dynamic else example
    with warnings.catch_warnings():  # what there is to tell was told of evaluation
        warnings.simplefilter("ignore")
        trained = export_training(owned, large, dynamic=dynamic)
        try:
            with branches_of_training(owned):
                program = export(owned, large, dynamic=dynamic)
            all_in_evaluation(program)
            if trained is not None:
                take_dropout(program, trained)
            graph = _Reader(owned, example, program, dynamic=dynamic).graph()
            _look(graph, example, dynamic=dynamic)
        except Exception:  # refusals have no common class
            return None
    return graph


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            type(model).__name__,
            expected="a model that copy.deepcopy can copy",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy="Capture works on a copy; remove tensors with a gradient history from the module's attributes.",
        ) from error


def _large_enough(example: Example) -> Example:
    """An example whose batch is at least 2: torch.export takes a length of 1 for a constant."""
    return example.doubled() if example.batch == 1 else example


def _export(model: nn.Module, example: Example, *, dynamic_batch: bool) -> tuple[ExportedProgram, bool]:
    reason = ""
    if dynamic_batch and example.batch:
        large = _large_enough(example)
        try:
            run_original(model, large)
            return export(model, large, dynamic=True), True
        except Exception as error:  # refusals have no common class; the fixed export tells real errors
            reason = f"the batch size is fixed at {example.batch}: {why_fixed(error)}"
    elif dynamic_batch:
        reason = _why_no_batch(example)
    try:
        program = export(model, example, dynamic=False)
    except Exception as error:
        raise explain(model, error) from error
    if reason:
        warnings.warn(f"capture: {reason}", stacklevel=3)
    return program, False


def _why_no_batch(example: Example) -> str:
    if example.batch == 0:
        return "the batch size is fixed at 0: the example is empty"
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in example.tensors.items())
    return f"all shapes are fixed: the inputs have no common first axis ({shapes})"


@dataclass(frozen=True)
class _Stored:
    """A parameter, buffer or constant of the exported program: where it will be stored, and what it is."""

    path: str
    tensor: Tensor


class _Reader:
    """Turns one exported program into a graph."""

    def __init__(
        self, model: nn.Module, example: Example, program: ExportedProgram, *, dynamic: bool
    ) -> None:
        self._model, self._program, self._dynamic = model, program, dynamic
        self._example = example
        self._paths = canonical_paths(model)
        self._state = _state(model)
        self._first = {id(tensor): path for path, tensor in reversed(self._state.items())}
        self._stored: dict[str, str] = {}
        self._assembler = Assembler()
        self._names: dict[fx.Node, Any] = {}

    def graph(self) -> Graph:
        stored, user_inputs = self._read_signature()
        arguments = self._arguments(stored)
        placeholders = [n.name for n in self._program.graph.nodes if n.op == "placeholder"]
        fixed = [(stored[name].path or "a constant") if name in stored else None for name in placeholders]
        flat = functionalize(self._program.graph_module, arguments, fixed)
        nodes = dict(zip(placeholders, (n for n in flat.nodes if n.op == "placeholder"), strict=True))
        calls, outputs = read_calls(flat, self._model, self._paths)
        self._store_state()
        names = name_operators([c.stack for c in calls], [c.token for c in calls])
        self._add_inputs([nodes[name] for name in user_inputs], {*names, *self._state})
        self._add_constants({nodes[name]: s for name, s in stored.items()}, calls)
        for call, name in zip(calls, names, strict=True):
            self._add(call, name)
        return self._finish(outputs)

    # --- inputs and constants --------------------------------------------------------------------------------

    def _read_signature(self) -> tuple[dict[str, _Stored], list[str]]:
        stored: dict[str, _Stored] = {}
        user_inputs = []
        for spec in self._program.graph_signature.input_specs:
            name = getattr(spec.arg, "name", "")
            if spec.kind is InputKind.USER_INPUT:
                user_inputs.append(name)
                continue
            target = str(spec.target)
            tensor = self._state.get(target)
            if tensor is not None:
                stored[name] = _Stored(self._first[id(tensor)], tensor)
                continue
            constant = self._program.constants.get(target)
            if not isinstance(constant, Tensor):
                raise ModelError(
                    type(self._model).__name__,
                    expected="parameters, buffers and constant tensors",
                    found=f"{spec.kind.name.lower()} {target!r}",
                    remedy="Keep only tensors in the module.",
                )
            # A tensor kept as a plain attribute has a path of the author's; a literal in the code has none.
            path = target if _has(self._model, target) else ""
            stored[name] = _Stored(path, constant.detach())
        return stored, user_inputs

    def _arguments(self, stored: Mapping[str, _Stored]) -> list[Any]:
        """Example arguments for the exported graph, in the order of its placeholders."""
        example = _large_enough(self._example) if self._dynamic else self._example
        inputs = iter(example.tensors.values())
        names = [n.name for n in self._program.graph.nodes if n.op == "placeholder"]
        return [stored[name].tensor if name in stored else next(inputs) for name in names]

    def _store_state(self) -> None:
        """All parameters and buffers at their first path, read or not, so that checkpoints still load."""
        outside = {
            f"{path}.{key}" if path else key
            for path, module in self._model.named_modules()
            for key in module._non_persistent_buffers_set
        }
        for path, tensor in self._state.items():
            if path == self._first[id(tensor)]:
                self._stored[path] = self._assembler.add_constant(
                    path, tensor, parameter=isinstance(tensor, nn.Parameter), persistent=path not in outside
                )

    def _add_inputs(self, nodes: list[fx.Node], taken: set[str]) -> None:
        for node, (name, tensor) in zip(nodes, self._example.tensors.items(), strict=True):
            while name in taken or any(t.startswith(f"{name}.") for t in taken):
                name += "_"
            shape: tuple[int | None, ...] = tuple(tensor.shape)
            self._assembler.add_input(
                GraphInput(name, (None, *shape[1:]) if self._dynamic else shape, tensor.dtype)
            )
            self._names[node] = name

    def _add_constants(self, stored: Mapping[fx.Node, _Stored], calls: list[Call]) -> None:
        counts: dict[str, int] = {}
        owners = {}
        for call in reversed(calls):
            owners.update(dict.fromkeys((i for i in call.inputs if isinstance(i, fx.Node)), call.owner))
        for node, held in stored.items():
            path, owner = held.path, owners.get(node, "")
            if path in self._stored:
                self._names[node] = self._stored[path]
                continue
            if not path:
                n = counts[owner] = counts.get(owner, -1) + 1
                path = f"{owner}._constant_{n}" if owner else f"_constant_{n}"
            self._names[node] = self._assembler.add_constant(
                path, held.tensor, parameter=False, persistent=False
            )

    # --- operators -------------------------------------------------------------------------------------------

    def _add(self, call: Call, name: str) -> None:
        outputs = [name] if call.count is None else [f"{name}.{i}" for i in range(call.count)]
        inputs = [self._names[i] if isinstance(i, fx.Node) else i for i in call.inputs]
        if len(outputs) == 1 and call.count is not None:
            outputs.append("")  # a tuple of one: the second place keeps it a tuple
        self._assembler.add_op(call.op, name, inputs, outputs)
        if isinstance(call.op, Opaque):
            self._assembler.opaque.append(name)
        if call.count is None:
            self._names[call.node] = name
        for index, element in call.elements.items():
            for node in element:
                self._names[node] = outputs[index]

    def _finish(self, outputs: Any) -> Graph:
        leaves = [self._names[o] if isinstance(o, fx.Node) else o for o in outputs]
        structure = self._program.call_spec.out_spec
        assert structure is not None
        batch = self._example.batch
        info = GraphInfo(
            "torch", (), (), dynamic_batch=self._dynamic, example_batch=batch if batch is not None else 1
        )
        self._store_second_names()
        return self._assembler.finish(_ordinary(pytree.tree_unflatten(leaves, structure)), info)

    def _store_second_names(self) -> None:
        """Shared tensors under their further paths, so that checkpoints still load."""
        for path, tensor in self._state.items():
            first = self._first[id(tensor)]
            if path != first:
                self._assembler.add_alias(path, self._stored[first])


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their paths, the first path of a shared one first."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _has(model: nn.Module, path: str) -> bool:
    held: Any = model
    for part in path.split("."):
        held = getattr(held, part, None)
    return isinstance(held, Tensor)


def _ordinary(outputs: Any) -> Any:
    """Output containers of other libraries (ordered mappings, …) as plain dicts; tuples and lists as they are."""
    if isinstance(outputs, Mapping):
        return {k: _ordinary(v) for k, v in outputs.items()}
    if isinstance(outputs, (list, tuple)) and type(outputs) in (list, tuple):
        return type(outputs)(_ordinary(v) for v in outputs)
    return outputs


def _look(graph: Graph, example: Example, *, dynamic: bool) -> None:
    """Fill `graph.info.values` from runs on the example and on twice the example."""
    names = [spec.name for spec in graph.info.inputs]
    once = dict(zip(names, example.tensors.values(), strict=True))
    twice = dict(zip(names, example.doubled().tensors.values(), strict=True)) if dynamic else None
    graph.info = replace(graph.info, values=look_at_values(graph, once, twice))
    graph.refresh()


def _check(graph: Graph, example: Example, answer: Any, name: str) -> None:
    """*raises* `ModelError` if a float output differs from the original *answer* by more than rounding."""
    with torch.no_grad():
        found = pytree.tree_leaves(graph(*example.tensors.values()))
    names = iter(graph.info.outputs)
    computed = [isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(graph.graph.output_node().args[0])]
    for ours, y, is_value in zip(found, pytree.tree_leaves(answer), computed, strict=True):
        value = next(names) if is_value else ""
        if not isinstance(y, Tensor):
            continue
        if not y.is_floating_point() or y.numel() == 0:
            continue
        largest = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
        if not torch.allclose(ours, y, rtol=RELATIVE, atol=ABSOLUTE * max(largest, 1e-30), equal_nan=True):
            error = (ours - y).abs().max().item()
            raise ModelError(
                f"output {value!r} of {name}",
                expected=f"the model's own answer within {RELATIVE:g} of each element",
                found=f"a difference of {error:.3g} (largest element {largest:.3g})",
                remedy="The forward may depend on chance or on state outside its inputs; remove that.",
            )

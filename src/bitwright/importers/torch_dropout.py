"""Dropout of which a graph in evaluation mode shows nothing (of attention weights, of a share of 0): taken from training mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

_ATTENTION, _DROPOUT = torch.ops.aten.scaled_dot_product_attention, torch.ops.aten.dropout


@contextmanager
def shown_dropout(model: nn.Module) -> Iterator[set[str]]:
    """Has every `nn.MultiheadAttention` show its dropout. *yields*: the paths of those."""
    hiding = {path: m for path, m in model.named_modules(remove_duplicate=False) if _hides(m)}
    modes = {path: m.training for path, m in hiding.items()}
    for module in hiding.values():
        module.training = True  # of the module alone: all that it does with it is dropout
    try:
        yield set(hiding)
    finally:
        for path, module in hiding.items():
            module.training = modes[path]


def _hides(module: nn.Module) -> bool:
    """True for `nn.MultiheadAttention` whose forward is torch's own."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and module.dropout > 0.0
    )


def call_in_evaluation(program: ExportedProgram, paths: set[str]) -> None:
    """Write the dropout that the modules at *paths* show as that of a `nn.Dropout` in evaluation."""
    for node in _calls(program, _DROPOUT):
        if _path(node) in paths:
            _set(node, "train", False)


def all_in_evaluation(program: ExportedProgram) -> None:
    """Write every dropout of *program* as that of a `nn.Dropout` in evaluation."""
    for node in _calls(program, _DROPOUT):
        _set(node, "train", False)


def take_dropout(program: ExportedProgram, trained: ExportedProgram) -> None:
    """Give *program* (evaluation) the shares that *trained*, the same model in training, drops of attention weights, and where evaluation
    drops a share of 0 (`p if self.training else 0.0`).
    """
    for node, example in _pairs(program, trained, _ATTENTION):
        _set(node, "dropout_p", _get(example, "dropout_p"))
    for node, example in _pairs(program, trained, _DROPOUT):
        if _get(node, "p") == 0.0:
            _set(node, "p", _get(example, "p"))
            _set(node, "train", False)


def _pairs(program: ExportedProgram, trained: ExportedProgram, packet: Any) -> list[tuple[fx.Node, fx.Node]]:
    """The calls of *packet* in both, if they stand in the same modules."""
    ours, theirs = list(_calls(program, packet)), list(_calls(trained, packet))
    if [_path(n) for n in ours] != [_path(n) for n in theirs]:
        return []
    return list(zip(ours, theirs, strict=True))


def _calls(program: ExportedProgram, packet: Any) -> Iterator[fx.Node]:
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from (n for n in module.graph.nodes if getattr(n.target, "overloadpacket", None) is packet)


def _path(node: fx.Node) -> str:
    """The path of the innermost module that *node* was recorded in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _argument(node: fx.Node, name: str) -> tuple[int, Any]:
    """Place and default of the argument *name*."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    return next((i, a.default_value) for i, a in enumerate(arguments) if a.name == name)


def _get(node: fx.Node, name: str) -> Any:
    index, default = _argument(node, name)
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def _set(node: fx.Node, name: str, value: Any) -> None:
    index, _ = _argument(node, name)
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)

"""What fx modules are made of, taken apart and put together again: for copies, pickles and checkpoints.

fx itself pickles generated code and traces it again, follows links between nodes with one stack frame each, and leaves out
state that no node reads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

#: Key in the meta of a constant's node: the value's name, which may not be possible as an attribute path.
VALUE_NAME = "value_name"
#: What a pickled module takes along of an `nn.Module`.
_HELD = ("training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
#: A node, flat.
Record = tuple[Any, ...]


def held_by(module: nn.Module) -> dict[str, Any]:
    """Parameters, buffers, submodules and mode of *module*, but not its class."""
    return {key: vars(module)[key] for key in _HELD}


def module_of(held: Mapping[str, Any]) -> nn.Module:
    """A plain module that holds what `held_by` gave."""
    module = nn.Module()
    vars(module).update(held)
    return module


@dataclass(frozen=True)
class _Place:
    """In a record's arguments: the result of node number *index*."""

    index: int


def records_of(graph: fx.Graph) -> list[Record]:
    """The nodes of *graph*, flat: linked as they are, pickling them would take a stack frame for each."""
    places: dict[fx.Node, Any] = {node: _Place(i) for i, node in enumerate(graph.nodes)}
    return [
        (
            n.op,
            n.name,
            n.target,
            fx.map_arg((n.args, n.kwargs), places.__getitem__),
            n.meta.get(VALUE_NAME),
        )
        for n in graph.nodes
    ]


def graph_of(records: list[Record]) -> fx.Graph:
    """Inverse of `records_of`."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for op, name, target, arguments, value_name in records:
        args, kwargs = map_aggregate(arguments, lambda a: nodes[a.index] if isinstance(a, _Place) else a)
        node = graph.create_node(op, target, args, kwargs, name=name)
        if value_name is not None:
            node.meta[VALUE_NAME] = value_name
        nodes.append(node)
    return graph


def keep_state(made: nn.Module, source: nn.Module, memo: dict[int, Any] | None) -> None:
    """Give *made* what fx leaves behind: parameters and buffers of *source* that no operator reads, the order of all, and which
    buffers stay out of checkpoints. *memo*: of the deep copy that is being made.
    """
    held = {*made.state_dict(keep_vars=True)}
    state = source.state_dict(keep_vars=True)
    for path, tensor in state.items():
        if path in held:
            continue
        *parts, leaf = path.split(".")
        owner: nn.Module = made
        for part in parts:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        own = copy.deepcopy(tensor, memo) if memo else tensor
        (owner.register_parameter if isinstance(own, nn.Parameter) else owner.register_buffer)(leaf, own)
    modules = dict(made.named_modules())
    for path, module in source.named_modules():
        target = modules.get(path)
        if target is None:
            continue
        _order_as(target, module)
        if module._non_persistent_buffers_set:
            target._non_persistent_buffers_set |= module._non_persistent_buffers_set & target._buffers.keys()


def _order_as(made: nn.Module, source: nn.Module) -> None:
    """Put parameters, buffers and submodules in the order of *source*: optimizers know parameters by their place."""
    for held in ("_parameters", "_buffers", "_modules"):
        own: dict[str, Any] = vars(made)[held]
        ordered = {name: own[name] for name in vars(source)[held] if name in own}
        ordered |= own
        own.clear()
        own.update(ordered)

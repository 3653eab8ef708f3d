"""Making an exported graph functional: no operator writes to a tensor that something else reads.

Every write `x_` becomes its functional form `x`, and later reads of the written tensor, of the tensors it is a view of and
of other views of those see the new value. Which tensors share memory is not guessed from operator names: the graph is run
once on the example and storages are compared. What cannot be expressed raises `ModelError`; nothing is ever silently wrong.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.errors import ModelError

#: (view, parent, new value of the view) -> new value of the parent; emits what it needs.
_Scatter = Callable[["_Rewriter", fx.Node, fx.Node, fx.Node], fx.Node]
_RESHAPES = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_as",
    "reshape_as",
    "_unsafe_view",
}
_NO_WRITE = {"detach_", "requires_grad_"}


def functionalize(module: fx.GraphModule, arguments: Sequence[Any], fixed: Sequence[str | None]) -> fx.Graph:
    """A functional copy of the graph of *module*, with its regions (`torch.no_grad`) inlined.

    *arguments*: of the graph, in placeholder order. *fixed*: in that order, the parameters and buffers, which must not be
    written, by name; None for inputs. *raises* `ModelError`.
    """
    graph = inlined(module)
    storages: dict[fx.Node, int] = {}
    if any(_written(node) for node in graph.nodes):
        storages = _storages(module, graph, arguments)
    placeholders = (n for n in graph.nodes if n.op == "placeholder")
    names = {node: name for node, name in zip(placeholders, fixed, strict=True) if name is not None}
    return _Rewriter(graph, storages, names).run()


def inlined(module: fx.GraphModule) -> fx.Graph:
    """The graph of *module* with the bodies of gradient-mode regions in place of their calls. *raises* `ModelError` for other control flow."""
    flat = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule):
            continue
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            if node.target.__name__ != "wrap_with_set_grad_enabled":
                raise ModelError(
                    where(node),
                    expected="straight-line tensor code",
                    found=f"torch.{node.target.__name__}",
                    remedy="Remove the control flow, or capture the submodules around it.",
                )
            _, body, *inputs = node.args
            assert isinstance(body, fx.Node)
            inner = getattr(module, str(body.target))
            env[node] = _inline(flat, inlined(inner), [env[i] for i in inputs])  # type: ignore[index]
            continue
        if node.op == "call_function" and node.target is operator.getitem:
            source = env[node.args[0]]  # type: ignore[index]
            if isinstance(source, (tuple, list)):
                env[node] = source[node.args[1]]  # type: ignore[index]
                continue
        env[node] = flat.node_copy(node, lambda n: env[n])
    return flat


def _inline(flat: fx.Graph, body: fx.Graph, inputs: Sequence[fx.Node]) -> Any:
    env: dict[fx.Node, fx.Node] = {}
    rest = iter(inputs)
    for node in body.nodes:
        if node.op == "placeholder":
            env[node] = next(rest)
        elif node.op == "output":
            return fx.map_arg(node.args[0], lambda n: env[n])
        else:
            env[node] = flat.node_copy(node, lambda n: env[n])
    raise AssertionError("a region without an output")


def _written(node: fx.Node) -> fx.Node | None:
    """The node whose tensor this call writes to, or None."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(found, (list, tuple)):
                raise ModelError(
                    where(node),
                    expected="operators that write to one tensor at most",
                    found=kind(node),
                    remedy="Use the out-of-place operator.",
                )
            if isinstance(found, fx.Node):
                return found
    return None


def _storages(module: fx.GraphModule, graph: fx.Graph, arguments: Sequence[Any]) -> dict[fx.Node, int]:
    """For every node that computes a tensor, an identifier of the memory it lies in, found by running the graph."""
    values: dict[fx.Node, Any] = {}
    copies = (a.detach().clone() if isinstance(a, Tensor) else a for a in arguments)
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(copies)
            elif node.op == "get_attr":
                values[node] = getattr(module, str(node.target))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])  # type: ignore[arg-type,misc]
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    # The values are kept alive until here, so that no two storages had the same address.
    return {n: v.untyped_storage()._cdata for n, v in values.items() if isinstance(v, Tensor)}


class _Rewriter:
    """Copies a graph node by node; `_now` holds what each old node's tensor contains at the current point."""

    def __init__(
        self, graph: fx.Graph, storages: Mapping[fx.Node, int], fixed: Mapping[fx.Node, str]
    ) -> None:
        self.old, self.new = graph, fx.Graph()
        self._storages, self._fixed = storages, fixed
        self._now: dict[fx.Node, Any] = {}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._stale: set[fx.Node] = set()
        self._unknown: dict[fx.Node, str] = {}

    def run(self) -> fx.Graph:
        for node in self.old.nodes:
            self._find_parent(node)
            target = _written(node)
            if target is not None:
                self._copy_write(node, target)
            else:
                self._now[node] = self._emit(node)
        return self.new

    def _find_parent(self, node: fx.Node) -> None:
        storage = self._storages.get(node)
        sources = node.all_input_nodes
        if node.op == "call_function" and node.target is operator.getitem:
            sources = sources[0].all_input_nodes  # an element of a split tensor: a view of what was split
        if storage is None:
            return
        for source in sources:
            if self._storages.get(source) == storage:
                self._parent[node] = source
                return

    def _emit(self, node: fx.Node) -> fx.Node:
        copied = self.new.node_copy(node, self.read)
        copied.meta = dict(node.meta)
        return copied

    def call(self, like: fx.Node, overload: Any, *args: Any, val: Any, **kwargs: Any) -> fx.Node:
        """A new call with the author's context of *like* and the shape of *val*."""
        made = self.new.call_function(overload, args, kwargs)
        made.meta = {**like.meta, "val": val}
        return made

    def read(self, node: fx.Node) -> Any:
        """The node of the new graph that holds what old *node*'s tensor contains now."""
        if node in self._unknown:
            raise ModelError(
                where(node),
                expected="a tensor that is not read after something sharing its memory was written",
                found=self._unknown[node],
                remedy="Write to a clone, or use the out-of-place operator.",
            )
        if node in self._stale:
            self._stale.discard(node)
            if _written(node) is not None or self._is_same_view(node):
                self._now[node] = self.read(self._parent[node])
            elif node.target is operator.getitem:  # an element of a split: split the new content
                source, index = node.args
                assert isinstance(source, fx.Node)
                self._now[node] = self.call(
                    node, node.target, self._emit(source), index, val=node.meta["val"]
                )
            else:
                self._now[node] = self._emit(node)
        return self._now[node]

    def _is_same_view(self, node: fx.Node) -> bool:
        return node.op == "call_function" and _name(node) in ("alias", "detach", "dropout", "feature_dropout")

    def _copy_write(self, node: fx.Node, target: fx.Node) -> None:
        name = _name(node)
        self._parent[node] = target
        if name in _NO_WRITE:
            self._now[node] = self.read(target)
            return
        value = self._functional(node, target)
        self._now[node] = value
        self._write(node, target, value)

    def _functional(self, node: fx.Node, target: fx.Node) -> Any:
        name, val = _name(node), target.meta["val"]
        assert isinstance(node.target, torch._ops.OpOverload)
        if name == "copy_":
            source = node.args[1]
            seen = source.meta["val"] if isinstance(source, fx.Node) else None
            if isinstance(seen, Tensor) and seen.dtype == val.dtype and tuple(seen.shape) == tuple(val.shape):
                return self.read(source)  # type: ignore[arg-type]
        packet = getattr(torch.ops.aten, _out_of_place(name), None)
        overload = getattr(packet, node.target._overloadname, None)
        if packet is None or overload is None or torch.Tag.inplace_view in node.target.tags:
            raise ModelError(
                where(node),
                expected="in-place operators that have an out-of-place form",
                found=kind(node),
                remedy="Use the out-of-place operator.",
            )
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.read)  # type: ignore[arg-type,misc]
        return self.call(node, overload, *args, val=val, **kwargs)

    def _write(self, node: fx.Node, target: fx.Node, value: fx.Node) -> None:
        """Tensor *target* now holds *value*: carry this to the tensors it is a view of; others are read anew."""
        group = {n for n in self._now if self._storages.get(n) == self._storages.get(target)} - {node}
        self._stale |= group
        child = target
        self._set(child, value)
        while child in self._parent:
            parent = self._parent[child]
            try:
                value = self._scatter(child, parent, value)
            except _NoScatter as reason:
                for other in self._stale & group:
                    self._unknown[other] = f"{kind(node)} on a view ({reason})"
                return
            self._set(parent, value)
            child = parent
        if child in self._fixed:
            raise ModelError(
                where(node),
                expected="a forward that changes no parameter or buffer",
                found=f"{kind(node)} writes to {self._fixed[child]!r}",
                remedy="Return the new state as an output and pass it as an input, or remove the write in evaluation.",
            )

    def _set(self, node: fx.Node, value: fx.Node) -> None:
        self._stale.discard(node)
        self._now[node] = value

    def _scatter(self, child: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
        """The new content of *parent* after its view *child* became *value*."""
        if _written(child) is not None or self._same_layout(child, parent):
            return value
        name = _name(child)
        args = fx.map_arg(child.args, self._now.__getitem__)  # type: ignore[arg-type]
        val, aten = parent.meta["val"], torch.ops.aten
        if name == "slice":
            return self.call(child, aten.slice_scatter.default, self._now[parent], value, *args[1:], val=val)
        if name == "select":
            return self.call(child, aten.select_scatter.default, self._now[parent], value, *args[1:], val=val)
        if name == "narrow":
            _, axis, start, length = args
            if not (isinstance(start, int) and isinstance(length, int)):
                raise _NoScatter("its bounds depend on the batch")
            return self.call(
                child,
                aten.slice_scatter.default,
                self._now[parent],
                value,
                axis,
                start,
                start + length,
                val=val,
            )
        if name == "diagonal":
            return self.call(
                child, aten.diagonal_scatter.default, self._now[parent], value, *args[1:], val=val
            )
        if name in ("transpose", "t", "permute"):
            return self._untranspose(child, value, args, val)
        if name in _RESHAPES:
            shape = [d if isinstance(d, int) else -1 for d in val.shape]
            if shape.count(-1) <= 1:
                return self.call(child, aten.reshape.default, value, shape, val=val)
        raise _NoScatter(f"through {kind(child)}")

    def _untranspose(self, child: fx.Node, value: fx.Node, args: Any, val: Any) -> fx.Node:
        aten = torch.ops.aten
        if _name(child) == "permute":
            order = [d % len(args[1]) for d in args[1]]
            return self.call(
                child, aten.permute.default, value, [order.index(i) for i in range(len(order))], val=val
            )
        axes = (0, 1) if _name(child) == "t" else tuple(args[1:])
        return self.call(child, aten.transpose.int, value, *axes, val=val)

    def _same_layout(self, child: fx.Node, parent: fx.Node) -> bool:
        a, b = child.meta.get("val"), parent.meta.get("val")
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        same_shape = len(a.shape) == len(b.shape) and all(
            str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True)
        )
        # The same elements in the same order: a slice or a shift cannot keep the shape, a transposition the strides.
        return (
            same_shape and [str(s) for s in a.stride()] == [str(s) for s in b.stride()] and a.dtype == b.dtype
        )


class _NoScatter(Exception):
    """A write that cannot be carried through a view."""


def _name(node: fx.Node) -> str:
    return (
        node.target.overloadpacket.__name__
        if isinstance(node.target, torch._ops.OpOverload)
        else str(node.target)
    )


def _out_of_place(name: str) -> str:
    """`relu` for `relu_`, `__and__` for `__iand__`; "" for what writes without saying so in its name."""
    if name.startswith("__i"):
        return f"__{name[3:]}"
    return name[:-1] if name.endswith("_") else ""


def kind(node: fx.Node) -> str:
    """The operator of a call as a user knows it: `aten.relu_`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target.overloadpacket.__name__}"
    return getattr(node.target, "__name__", str(node.target))


def where(node: fx.Node) -> str:
    """The author's module path and, if torch recorded it, the line of the author's code (not of generated code)."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    lines = [
        s.strip()
        for s in str(node.meta.get("stack_trace") or "").splitlines()
        if "File " in s and "<" not in s
    ]
    return f"module {path!r}" + (f" ({lines[-1]})" if lines else "")

"""Operators without a class of ours: executed as they are, never quantized, written by torch's own ONNX exporter."""

from __future__ import annotations

import copy
import logging
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.inliner
import torch
from torch import Tensor, fx, nn

from bitwright.errors import ModelError
from bitwright.graph.op import Emitter, Op, Role
from bitwright.ops.spelling import Built

OPSET = 21


@dataclass(frozen=True)
class Slot:
    """In an argument template: the place of input *index*."""

    index: int


@dataclass(frozen=True)
class Seen:
    """What export saw of an input: shape with None for dynamic dimensions; dtype None for a Python number."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype | None


class Opaque(Op):
    """A call of *target* with the arguments of a template; its tensors arrive as inputs."""

    roles = (Role.PARAMETER,)

    def __init__(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        seen: Sequence[Seen] = (),
    ) -> None:
        super().__init__()
        self.__dict__["kind"] = kind_of(target)
        self.target, self.args, self.kwargs, self.seen = target, args, dict(kwargs), tuple(seen)

    def __getstate__(self) -> dict[str, Any]:
        # torch's operators cannot be pickled, but found again by their names.
        is_torchs = isinstance(self.target, torch._ops.OpOverload)
        return {**vars(self), "target": str(self.target) if is_torchs else self.target}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.target, str):
            self.target = operator.attrgetter(self.target)(torch.ops)

    def forward(self, *xs: Any) -> Any:
        args, kwargs = _fill((self.args, self.kwargs), xs)
        return self.target(*args, **kwargs)

    def to_onnx(self, emit: Emitter, inputs: Sequence[str | None]) -> None:
        _copy_nodes(self._translate(), emit, [str(i) for i in inputs], self.outputs)

    def is_exportable(self) -> bool:
        """True if torch's exporter can write this call; found out by asking it, which takes a moment."""
        try:
            self._translate()
        except ModelError:
            return False
        return True

    def _translate(self) -> onnx.ModelProto:
        """The call as an ONNX model of its own, without functions."""
        found = "torch.onnx does not translate it"
        for dynamic in (True, False):
            try:
                return _export(self, dynamic=dynamic)
            except Exception as error:  # the exporter's errors have no common class
                found = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"operator {self.name!r} ({self.kind})",
            expected="an operator that can be written as ONNX",
            found=found,
            remedy="Replace it in the model by operators that ONNX has.",
        )

    def describe(self) -> str:
        shown = [f"·{a.index}" if isinstance(a, Slot) else str(a) for a in self.args]
        return ", ".join([*shown, *(f"{k}={v}" for k, v in self.kwargs.items())])


def kind_of(target: Callable[..., Any]) -> str:
    """`aten.cumsum` for overloads of that operator, `operator.mul` for Python functions."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target.overloadpacket.__name__}"
    return f"{getattr(target, '__module__', '').lstrip('_')}.{getattr(target, '__name__', str(target))}"


def opaque_from_node(node: fx.Node) -> Built:
    """The opaque operator for an fx call, with the nodes it reads as inputs."""
    inputs = list(node.all_input_nodes)
    slots = {n: Slot(i) for i, n in enumerate(inputs)}
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: slots[n])  # type: ignore[arg-type,return-value]
    seen = [what_was_seen(n.meta.get("val")) for n in inputs]
    assert callable(node.target)
    return Built(Opaque(node.target, _plain(args), _plain(kwargs), seen=seen), tuple(inputs))


def what_was_seen(value: Any) -> Seen:
    """Of a fake tensor of torch.export, or a number."""
    if not isinstance(value, Tensor):
        return Seen((), None)
    return Seen(tuple(d if isinstance(d, int) else None for d in value.shape), value.dtype)


def _plain(value: Any) -> Any:
    """fx's immutable containers as ordinary ones."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) is tuple else [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _fill(template: Any, xs: Sequence[Any]) -> Any:
    if isinstance(template, Slot):
        return xs[template.index]
    if isinstance(template, tuple):
        return tuple(_fill(t, xs) for t in template)
    if isinstance(template, list):
        return [_fill(t, xs) for t in template]
    return {k: _fill(v, xs) for k, v in template.items()} if isinstance(template, dict) else template


class _Call(nn.Module):
    """The module that is shown to torch's exporter: one opaque call."""

    def __init__(self, op: Opaque) -> None:
        super().__init__()
        self.op = op

    def forward(self, *xs: Any) -> Any:
        return self.op(*xs)


def _export(op: Opaque, *, dynamic: bool) -> onnx.ModelProto:
    if any(s.dtype is None for s in op.seen):
        raise ValueError("it reads a size that depends on the batch")
    if dynamic and not any(d is None for s in op.seen for d in s.shape):
        raise ValueError("nothing is dynamic")
    if not dynamic and any(d is None for s in op.seen for d in s.shape):
        raise ValueError("torch.onnx does not translate it with a dynamic batch")
    example = tuple(_example(s) for s in op.seen)
    batch = torch.export.Dim("batch")
    shapes = tuple({i: batch for i, d in enumerate(s.shape) if d is None} for s in op.seen)
    with warnings.catch_warnings(), _Quiet():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Call(copy.deepcopy(op)).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(shapes,) if dynamic else None,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return onnx.inliner.inline_local_functions(program.model_proto)


def _example(seen: Seen) -> Tensor:
    shape = [2 if d is None else d for d in seen.shape]
    assert seen.dtype is not None
    return (
        torch.rand(shape).to(seen.dtype)
        if seen.dtype.is_floating_point
        else torch.zeros(shape, dtype=seen.dtype)
    )


class _Quiet:
    """Silences the exporter's log while it is asked."""

    def __enter__(self) -> None:
        self._level = logging.root.manager.disable
        logging.disable(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._level)


def _copy_nodes(model: onnx.ModelProto, emit: Emitter, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Write the nodes of *model* with its inputs and outputs replaced by the caller's values."""
    graph = model.graph
    names = {spec.name: name for spec, name in zip(graph.input, inputs, strict=True)}
    for initializer in graph.initializer:
        names[initializer.name] = emit.constant(onnx.numpy_helper.to_array(initializer), initializer.name)
    produced = {spec.name: name for spec, name in zip(graph.output, outputs, strict=False) if name}
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ModelError(
                f"operator writes {node.domain}::{node.op_type}",
                expected="standard ONNX operators",
                found=f"domain {node.domain!r}",
                remedy="Replace it in the model by operators that ONNX has.",
            )
        for name in node.output:
            if name:
                names[name] = produced.get(name) or emit.temporary(name)
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        emit.node(
            node.op_type,
            [names.get(i) if i else None for i in node.input],
            [names.get(o, "") for o in node.output],
            **attributes,
        )
    for spec in graph.output:  # an output that is one of the inputs or constants
        if spec.name in produced and names.get(spec.name) != produced[spec.name]:
            emit.node("Identity", [names[spec.name]], [produced[spec.name]])

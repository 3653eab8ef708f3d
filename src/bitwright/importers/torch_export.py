"""Asking `torch.export` for a model's undecomposed graph, and explaining its refusals."""

from __future__ import annotations

import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bitwright.errors import ModelError
from bitwright.importers.torch_dropout import call_in_evaluation, shown_dropout

_REMEDY = "Rewrite that part without Python control flow on tensor contents, or capture a submodule; see torch.export."


@dataclass(frozen=True)
class Example:
    """Example inputs bound to the parameters of `forward`. *tensors*: by input name, in forward's order."""

    bound: inspect.BoundArguments
    tensors: Mapping[str, Tensor]

    def doubled(self) -> Example:
        """The same inputs twice along the batch."""
        return self.mapped(lambda t: torch.cat([t, t]))

    def mapped(self, change: Any) -> Example:
        """The same structure with every tensor changed."""
        arguments = {k: _map(change, v) for k, v in self.bound.arguments.items()}
        bound = inspect.BoundArguments(self.bound.signature, arguments)  # type: ignore[arg-type]
        return Example(bound, {name: change(t) for name, t in self.tensors.items()})

    @property
    def batch(self) -> int | None:
        """The common length of all inputs' first axis, or None if there is none."""
        lengths = {t.shape[0] if t.dim() else None for t in self.tensors.values()}
        return lengths.pop() if len(lengths) == 1 else None


def _map(change: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(change, v) for v in value)
    return {k: _map(change, v) for k, v in value.items()} if isinstance(value, dict) else value


def bind_example(model: nn.Module, example_inputs: Any) -> Example:
    """*example_inputs*: a tensor, a tuple (positional) or a mapping (by name). *raises* `ModelError`."""
    where = f"example inputs of {type(model).__name__}"
    signature = inspect.signature(model.forward)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ModelError(
            where,
            expected=f"arguments of forward{signature}",
            found=str(error),
            remedy="Give a tensor, a tuple of tensors, or a mapping from argument names to tensors.",
        ) from error
    tensors: dict[str, Tensor] = {}
    for name, value in _named_leaves(signature, bound):
        if not isinstance(value, Tensor):
            raise ModelError(
                where,
                expected=f"a tensor for {name!r}",
                found=type(value).__name__,
                remedy="Give tensors only; other arguments must have defaults in forward.",
            )
        tensors[name] = value
    if not tensors:
        raise ModelError(where, expected="at least one tensor", found="none", remedy="Give example inputs.")
    return Example(bound, tensors)


def _named_leaves(signature: inspect.Signature, bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}_{i}", v) for i, v in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def run_original(model: nn.Module, example: Example) -> Any:
    """What the model itself answers, in its current mode. *raises* `ModelError` if it cannot run on the example."""
    copied = example.mapped(torch.clone)  # the model may write to its inputs
    with torch.no_grad(), _plain_attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return model(*copied.bound.args, **copied.bound.kwargs)
        except Exception as error:
            shapes = ", ".join(f"{k} {list(t.shape)} {t.dtype}" for k, t in example.tensors.items())
            raise ModelError(
                _place(model, error),
                expected="a model that runs on its example inputs",
                found=f"{first_line(error)} (inputs: {shapes})",
                remedy="Check shapes and dtypes of the example inputs.",
            ) from error


def export(model: nn.Module, example: Example, *, dynamic: bool) -> ExportedProgram:
    """The undecomposed training graph. *dynamic*: the first axis of all inputs is one symbolic dimension.

    *raises* whatever torch raises; see `explain`.
    """
    batch = Dim("batch")
    shapes: Any = None
    if dynamic:
        shapes = {name: _map(lambda t: {0: batch}, value) for name, value in example.bound.arguments.items()}
    copied = example.mapped(torch.clone)
    with _plain_attention(), shown_dropout(model) as shown, warnings.catch_warnings(), _unprinted():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model, copied.bound.args, copied.bound.kwargs, dynamic_shapes=shapes, strict=False
        )
    call_in_evaluation(program, shown)
    return program


def explain(model: nn.Module, error: Exception) -> ModelError:
    """The user's error for a refusal of `torch.export`."""
    return ModelError(
        _place(model, error),
        expected="a forward that torch.export can trace",
        found=first_line(error),
        remedy=_REMEDY,
    )


def why_fixed(error: Exception) -> str:
    """One sentence of torch's on why the batch size cannot vary."""
    violations = [s.strip() for s in str(error).splitlines() if s.strip().startswith("- ")]
    return violations[0][2:].partition(". ")[0] if violations else first_line(error)


def _place(model: nn.Module, error: Exception) -> str:
    """File and line of the author's code in which *error* arose, as far as it can be told."""
    files = {_file_of(type(m)) for m in model.modules()} - {None}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    own = [f for f in frames if "/torch/" not in f.filename.replace("\\", "/")] or frames
    name = type(model).__name__
    return f"{name} ({own[-1].filename}:{own[-1].lineno})" if own else name


def _file_of(cls: type) -> str | None:
    try:
        return inspect.getfile(cls)
    except (TypeError, OSError):
        return None


def first_line(error: Exception) -> str:
    """The first line of its message, or its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _unprinted() -> Iterator[None]:
    """Keeps torch from printing whole graphs about a refusal, which `explain` says in a sentence."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keeps nn.MultiheadAttention from its fused inference path, which is one untranslatable operator."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)

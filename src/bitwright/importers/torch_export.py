"""Asking `torch.export` for a model's undecomposed graph, and explaining its refusals."""

from __future__ import annotations

import inspect
import io
import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
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
                found=f"{_first_line(error)} (inputs: {shapes})",
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
        found=_first_line(error),
        remedy=_REMEDY,
    )


def why_fixed(error: Exception) -> str:
    """One sentence of torch's on why the batch size cannot vary."""
    violations = [s.strip() for s in str(error).splitlines() if s.strip().startswith("- ")]
    return violations[0][2:].partition(". ")[0] if violations else _first_line(error)


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


def _first_line(error: Exception) -> str:
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


# --- branches on self.training -----------------------------------------------------------------------------------


class TrainingBranchWarning(UserWarning):
    """A graph lacks what the network computes in training alone."""


_MODE_DEPENDENT = ("batch_norm", "instance_norm", "rrelu")


def export_training(model: nn.Module, example: Example, *, dynamic: bool) -> ExportedProgram | None:
    """The graph of *model* (in evaluation mode) in training, for comparison; None where there is nothing to compare.

    It costs a second export, so it is made only where an author's class mentions `training`. Warns where that mode cannot be traced.
    """
    if not any(_mentions_training(type(m)) for m in model.modules()):
        return None
    model.train()
    try:
        return export(model, example, dynamic=dynamic)
    except Exception as error:  # refusals have no common class; evaluation is what counts
        warnings.warn(
            f"{type(model).__name__} mentions self.training, and cannot be traced in training ({_first_line(error)}); the graph"
            " keeps the evaluation branch, also in training",
            TrainingBranchWarning,
            stacklevel=3,
        )
        return None
    finally:
        model.eval()


def warn_about_training_branches(
    model: nn.Module, program: ExportedProgram, trained: ExportedProgram
) -> None:
    """Warns if *trained* computes something else than *program*, besides what batch norm and dropout do in training."""
    found, expected = _op_counts(trained.graph), _op_counts(program.graph)
    changed = sorted(k for k in {*found, *expected} if found[k] != expected[k])
    if not changed and _returned(trained) != _returned(program):
        changed = ["what is returned"]
    if changed:
        warnings.warn(
            f"{type(model).__name__} branches on self.training (differs in: {', '.join(changed)}); the graph keeps the"
            " evaluation branch, also in training",
            TrainingBranchWarning,
            stacklevel=3,
        )


@contextmanager
def branches_of_training(model: nn.Module) -> Iterator[None]:
    """Has the author's own modules of *model* (in evaluation mode) take their training branches, torch's modules stay as they are."""
    own = [m for m in model.modules() if _mentions_training(type(m))]
    for module in own:
        module.training = True  # of the module alone
    try:
        yield
    finally:
        for module in own:
            module.training = False


def _mentions_training(cls: type) -> bool:
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins", "typing", "abc", "collections"):
            continue
        try:
            if ".training" in inspect.getsource(base):
                return True
        except (OSError, TypeError):
            return True
    return False


def _returned(program: ExportedProgram) -> tuple[str, list[str]]:
    """The structure of the outputs, and what makes each of them."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    made = [n.name if n.op == "placeholder" else str(n.target) for n in output.all_input_nodes]
    plain = [m for m in made if not any(mode in m for mode in _MODE_DEPENDENT)]
    return str(program.call_spec.out_spec), plain


def _op_counts(graph: fx.Graph) -> Counter[str]:
    """How often each operator occurs, leaving out what capture maps to modules with both meanings."""
    names = [str(n.target) for n in graph.nodes if n.op == "call_function" and n.users]
    return Counter(name for name in names if not any(m in name for m in _MODE_DEPENDENT))

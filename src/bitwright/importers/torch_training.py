"""What a network computes in training alone (`if self.training:`): found by comparing the graphs of both modes."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.utils import _pytree as pytree

from bitwright.importers.torch_export import Example, export, first_line
from bitwright.importers.torch_functional import inlined


class TrainingBranchWarning(UserWarning):
    """A graph lacks what the network computes in training alone."""


#: Arguments of norms, dropout and recurrent layers that differ between modes as they should; statistics do not count in training.
_OF_THE_MODE = frozenset({"training", "train", "use_input_stats", "running_mean", "running_var"})


def export_training(model: nn.Module, example: Example, *, dynamic: bool) -> ExportedProgram | None:
    """The graph of *model* (in evaluation mode) in training, for comparison; None where there is nothing to compare.

    It costs a second export, so it is made only where an author's class mentions `training`. Warns where that mode cannot be traced.
    """
    if not any(_mentions_training(type(m)) for m in model.modules()):
        return None
    model.train()
    try:
        program = export(model, example, dynamic=dynamic)
        inlined(program.graph_module)  # refuses control flow that torch can trace
        return program
    except Exception as error:  # refusals have no common class; evaluation is what counts
        warnings.warn(
            f"{type(model).__name__} mentions self.training, and cannot be traced in training ({first_line(error)}); the graph"
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
    numbers: dict[Any, int] = {}
    expected, found = _Computed(program, numbers), _Computed(trained, numbers)
    changed = sorted(expected.names_beside(found) | found.names_beside(expected))
    if not changed and found.returned != expected.returned:
        changed = ["what is returned"]
    if changed:
        warnings.warn(
            f"{type(model).__name__} branches on self.training (differs in: {', '.join(changed)}); the graph keeps the"
            " evaluation branch, also in training",
            TrainingBranchWarning,
            stacklevel=3,
        )


class _Computed:
    """What a program computes. *numbers*: expression -> its number, the same for both programs that are compared."""

    def __init__(self, program: ExportedProgram, numbers: dict[Any, int]) -> None:
        self._numbers, self._of = numbers, dict[fx.Node, int]()
        self._names, self._reads = dict[int, str](), dict[int, list[int]]()
        self._counts: Counter[int] = Counter()
        inputs = iter(program.graph_signature.input_specs)
        self._counters: set[fx.Node] = set()
        for node in inlined(program.graph_module).nodes:
            if node.op == "placeholder":
                self._of[node] = self._number(_stored(program, next(inputs)))
                if "num_batches_tracked" in str(node.target):
                    self._counters.add(node)
            elif node.op == "output":
                shape = str(program.call_spec.out_spec)
                self.returned = (shape, self._number(("returned", *self._values(node.args))))
            elif not self._counts_batches(node):
                self._add(node)

    def names_beside(self, other: _Computed) -> set[str]:
        """Operators that *other* lacks or has fewer of, but of those which read such a one only the first."""
        more = self._counts - other._counts
        return {self._names[n] for n in more if not any(r in more for r in self._reads[n])}

    def _number(self, expression: Any) -> int:
        return self._numbers.setdefault(expression, len(self._numbers))

    def _counts_batches(self, node: fx.Node) -> bool:
        """True for the counter of a batch norm, which is moved once per call."""
        if not node.args or node.args[0] not in self._counters or not _writes(node):
            return False
        self._counters.add(node)
        return True

    def _add(self, node: fx.Node) -> None:
        arguments = [(name, *self._values(value)) for name, value in _arguments(node)]
        self._of[node] = number = self._number((node.op, str(node.target), *arguments))
        if node.op == "call_function" and (node.users or _writes(node)):
            self._counts[number] += 1
            self._names[number] = str(node.target)
            self._reads[number] = [self._of[n] for n in node.all_input_nodes if n in self._of]

    def _values(self, value: Any) -> Iterator[Any]:
        for leaf in pytree.tree_leaves(value):
            yield self._of.get(leaf, "counter") if isinstance(leaf, fx.Node) else repr(leaf)


def _stored(program: ExportedProgram, spec: InputSpec) -> Any:
    """What a placeholder stands for: an input or parameter by its name, a number in the code by what it is."""
    tensor = program.constants.get(str(spec.target)) if spec.kind is InputKind.CONSTANT_TENSOR else None
    if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
        held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return "constant", tensor.dtype, tuple(tensor.shape), hashlib.sha256(held.tobytes()).hexdigest()
    return spec.kind, spec.target or getattr(spec.arg, "name", None)


def _arguments(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """Names and values of the arguments of *node*, defaults too, but for those that are the mode's."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        yield "", (node.args, node.kwargs)
        return
    of_the_mode = _OF_THE_MODE if schema.name.startswith("aten::") else frozenset()
    for index, argument in enumerate(schema.arguments):
        if argument.name not in of_the_mode:
            default = node.kwargs.get(argument.name, argument.default_value)
            yield argument.name, node.args[index] if index < len(node.args) else default


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


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

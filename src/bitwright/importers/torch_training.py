"""What a network computes in training alone (`if self.training:`): found by comparing the graphs of both modes."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bitwright.importers.torch_export import Example, export, first_line


class TrainingBranchWarning(UserWarning):
    """A graph lacks what the network computes in training alone."""


#: Operators that capture maps to modules with both meanings: they differ in their options.
_NORMS, _DROPOUTS = ("batch_norm", "instance_norm", "rrelu"), ("dropout",)


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
        for node in program.graph.nodes:
            if node.op == "output":
                shape = str(program.call_spec.out_spec)
                self.returned = (shape, self._number(("returned", *self._arguments(node, ()))))
                continue
            self._of[node] = number = self._number(self._expression(node))
            if node.op == "call_function" and (node.users or _writes(node)):
                self._counts[number] += 1
                self._names[number] = str(node.target)
                self._reads[number] = [self._of[n] for n in node.all_input_nodes]

    def names_beside(self, other: _Computed) -> set[str]:
        """Operators that *other* lacks or has fewer of, but of those which read such a one only the first."""
        more = self._counts - other._counts
        return {self._names[n] for n in more if not any(r in more for r in self._reads[n])}

    def _number(self, expression: Any) -> int:
        return self._numbers.setdefault(expression, len(self._numbers))

    def _expression(self, node: fx.Node) -> Any:
        if node.op != "call_function":
            return node.op, str(node.target)
        name = str(node.target)
        if any(n in name for n in _NORMS):
            return name, *self._arguments(node, (bool, int, float))
        return name, *self._arguments(node, (bool,) if any(d in name for d in _DROPOUTS) else ())

    def _arguments(self, node: fx.Node, without: tuple[type, ...]) -> Iterator[Any]:
        """The arguments of *node*, without numbers of these types."""
        for argument in pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(argument, fx.Node):
                yield self._of[argument]
            elif not isinstance(argument, without):
                yield repr(argument)


def _writes(node: fx.Node) -> bool:
    """True for a write in place, but for the counter of a batch norm."""
    schema = getattr(node.target, "_schema", None)
    counts = any("num_batches_tracked" in str(n.target) for n in node.all_input_nodes)
    return bool(schema is not None and schema.is_mutable and not counts)


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

"""`SimulatedModel`: a plan as a module, for those who measure models their own way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, fx, nn

from bitwright.errors import ModelError
from bitwright.graph.graph import Graph
from bitwright.graph.replay import Environment, Replay
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads


class SimulatedModel(nn.Module):
    """The captured network as *plan* makes it (None: float), called like the graph, with outputs in the same structure.

    It evaluates only: no gradients, and no training mode. Its parameters are the graph's own, float; what is quantized of
    them is quantized when it runs. It can be pickled, and moved to another device (the graph moves along).
    """

    def __init__(self, graph: Graph, plan: Plan | None) -> None:
        super().__init__()
        self.graph, self.plan = graph, plan
        self._reads = {} if plan is None else quantized_reads(graph, plan)
        self._signature = inspect.signature(graph.forward)
        self._replay = Replay(graph)
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the class. *raises* `TypeError` for arguments that the graph does not take."""
        bound = self._signature.bind(*args, **kwargs)
        names = [spec.name for spec in self.graph.info.inputs]
        env = self._replay.run(dict(zip(names, bound.arguments.values(), strict=True)), self._reads)
        return _filled(self.graph.graph.output_node().args[0], self.graph, env)

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode is the only one. *raises* `ModelError` if asked for training."""
        if mode:
            raise ModelError(
                "simulated model",
                expected="eval() or train(False): a plan is only evaluated",
                found="train()",
                remedy="Leave the model in evaluation mode.",
            )
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # To another device or dtype: the replay looks its constants up once.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._replay = Replay(self.graph)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SimulatedModel, (self.graph, self.plan)


def _filled(structure: Any, graph: Graph, env: Environment) -> Any:
    """The output's *structure* with values in the places of nodes, in ordinary containers."""
    if isinstance(structure, fx.Node):
        return env[graph.value_name(structure)]
    if isinstance(structure, tuple):
        parts = [_filled(part, graph, env) for part in structure]
        return type(structure)(*parts) if hasattr(structure, "_fields") else tuple(parts)
    if isinstance(structure, list):
        return [_filled(part, graph, env) for part in structure]
    if isinstance(structure, dict):
        return {key: _filled(part, graph, env) for key, part in structure.items()}
    return structure

"""Small networks that the tests quantize, and how they are made ready."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.calibrate.collect import collect
from bitwright.calibrate.solve import Solver
from bitwright.calibrate.statistics import Statistics
from bitwright.graph.graph import Graph
from bitwright.importers.from_torch import capture
from bitwright.plan.assign import assign
from bitwright.plan.plan import Plan
from bitwright.plan.target import load_target
from bitwright.rewrite.decompose_attention import decompose_attention
from bitwright.rewrite.fold_batchnorm import fold_batchnorm
from bitwright.search.evaluator import Evaluator
from bitwright.search.similarity import Similarity


class Residual(nn.Module):
    """conv-bn-relu, depthwise, residual add, pool, flatten, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project = nn.Conv2d(8, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.project(F.relu6(self.depthwise(x)))
        x = self.pool(F.relu(x + y))
        return self.fc(x.flatten(1))


class Block(nn.Module):
    """One pre-norm transformer block over 6 tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head(x.mean(1))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """*module* in eval mode with seeded weights and batch-norm statistics that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator) * 0.2)
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.2)
                m.weight.copy_(torch.rand(m.num_features, generator=generator) + 0.3)
    return module.eval()


def pictures(n: int = 12, seed: int = 1) -> Tensor:
    """`[n, 3, 8, 8]` standard normal."""
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def tokens(n: int = 12, seed: int = 1) -> Tensor:
    """`[n, 6, 16]` standard normal."""
    return torch.randn(n, 6, 16, generator=torch.Generator().manual_seed(seed))


def ready(module: nn.Module, x: Tensor) -> Graph:
    """Captured and rewritten as `tune` does it."""
    return fold_batchnorm(decompose_attention(capture(module, x[:2]))).eval()


def calibrated(graph: Graph, x: Tensor) -> Statistics:
    """Statistics over *x* in batches of 4."""
    name = graph.info.inputs[0].name
    return collect(graph, [{name: x[i : i + 4]} for i in range(0, len(x), 4)])


def solved(graph: Graph, x: Tensor, target: str = "generic-int8", method: str = "max") -> tuple[Solver, Plan]:
    """A solver and the all-int8 plan."""
    solver = Solver(graph, load_target(target), calibrated(graph, x))
    return solver, solver.solve(assign(graph, load_target(target), method=method))


def bench(
    module: nn.Module,
    x: Tensor,
    target: str = "generic-int8",
    similarity: Similarity | None = None,
    *,
    chunk: int = 5,
) -> tuple[Evaluator, Solver, Plan]:
    """An evaluator of *module* on *x*, a solver and the all-int8 plan."""
    graph = ready(module, x)
    solver, plan = solved(graph, x, target)
    name = graph.info.inputs[0].name

    def batches(size: int) -> Iterator[dict[str, Tensor]]:
        return ({name: x[i : i + size]} for i in range(0, len(x), size))

    evaluator = Evaluator(graph, batches, similarity)
    evaluator.chunk_samples = chunk
    return evaluator, solver, plan

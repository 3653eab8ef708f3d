"""What the training benchmarks share: CIFAR-10 pictures, the ResNet-20 that was fine-tuned on them, and one training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shared import data_folder

BATCH = 64
#: The rate falls from here to 0 along a cosine.
RATE = 0.01


class Cifar:
    """15,000 training and 5,000 test pictures, normalised, as tensors."""

    def __init__(self, load: Any) -> None:
        self.train_x, self.train_y = self._set(load, "cifar10_jpeg_train15k.npz")
        self.test_x, self.test_y = self._set(load, "cifar10_jpeg_test_even5k.npz")

    @staticmethod
    def _set(load: Any, name: str) -> tuple[Tensor, Tensor]:
        pictures, labels = load.jpeg_set(name)
        return torch.from_numpy(load.prep_cifar_resnet(pictures)), torch.from_numpy(labels.astype(np.int64))

    def batches(self, epochs: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches, cropped and flipped; the same for every run with this *seed*."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.train_x), generator=generator)
            for i in range(0, len(order) - BATCH + 1, BATCH):
                chosen = order[i : i + BATCH]
                yield augmented(self.train_x[chosen], generator), self.train_y[chosen]

    def steps(self, epochs: int) -> int:
        """How many batches `batches` gives."""
        return epochs * (len(self.train_x) // BATCH)

    def score(self, network: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Of the test pictures: `top1`, %, and the mean cross-entropy `loss`, nats."""
        right, loss = 0, 0.0
        with torch.no_grad():
            for i in range(0, len(self.test_x), 250):
                logits, labels = network(self.test_x[i : i + 250]), self.test_y[i : i + 250]
                right += int((logits.argmax(1) == labels).sum())
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        return {"top1": round(100 * right / len(self.test_x), 2), "loss": round(loss / len(self.test_x), 5)}

    def accuracy(self, network: Callable[[Tensor], Tensor]) -> float:
        """Top-1 on the test pictures, %."""
        return self.score(network)["top1"]


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """*x* `[n, 3, 32, 32]`, each picture shifted by up to 4 pixels and flipped at random."""
    n = len(x)
    padded = F.pad(x, [4] * 4)
    top, left = torch.randint(0, 9, (2, n), generator=generator)
    rows = top[:, None] + torch.arange(32)
    columns = left[:, None] + torch.arange(32)
    flip = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def train(network: nn.Module, data: Cifar, epochs: int, seed: int = 0) -> None:
    """SGD with momentum on *data*; the same steps, pictures and rates for every network."""
    torch.manual_seed(seed)
    # A learned scale is no weight: no decay.
    scales = [p for n, p in network.named_parameters() if n.endswith((".scale", ".alpha"))]
    known = {id(p) for p in scales}
    rest = [p for p in network.parameters() if id(p) not in known]
    groups = [{"params": rest, "weight_decay": 1e-4}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, data.steps(epochs))
    for x, y in data.batches(epochs, seed):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        schedule.step()


def resnet20(load: Any) -> nn.Module:
    """The ResNet-20 that was fine-tuned on these JPEG pictures."""
    network = load.cifar10_resnet(20)
    network.load_state_dict(load_file(data_folder() / "models" / "cifar10_resnet20_jpegft.safetensors"))
    return network.eval()

"""A recipe of `bitwright train` on a small network, and code that it may name, right and wrong."""

from __future__ import annotations

from pathlib import Path

import yaml

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.dropout(x.mean((2, 3))))

def net():
    torch.manual_seed(0)
    return Net().eval(), torch.zeros(2, 1, 6, 6)

def data():
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(48) % 3
    return torch.randn(48, 1, 6, 6, generator=generator) + y[:, None, None, None], y

def broken():
    x, y = data()
    return x.clone().fill_(float("nan")), y

def uneven():
    x, y = data()
    return x, y[:-1]

def odd():
    x, y = data()
    return x[:33], y[:33]  # batches of 16, 16 and 1

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(zip(*data()))

    def __len__(self):
        return 48

def stream():
    return torch.utils.data.DataLoader(Stream(), 16)

def vector(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels, reduction="none")

def generator():
    return (batch for batch in [data()])

def shuffled():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), 16, shuffle=True)

def unlabelled():
    return [data()[0]]

def wide():
    x, y = data()
    return x.repeat(1, 2, 1, 1), y

def bytes():
    x, y = data()
    return x.to(torch.uint8), y

def one_hot():
    x, y = data()
    return x, nn.functional.one_hot(y, 3).float()

class Torn(torch.utils.data.Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, i):
        raise OSError(f"no picture {i}")

def torn():
    return Torn()

def without_example():
    return net()[0], None

class Doubled(Net):
    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        x = self.head(x)
        return x if self.training else x.softmax(1)

class Masked(Net):
    def __init__(self):
        super().__init__()
        self.mask = nn.Parameter(torch.full((3,), -float("inf")), requires_grad=False)

    def forward(self, x):
        return super().forward(x) + torch.where(x.mean((1, 2, 3))[:, None] > 1e9, self.mask, 0.0)

def masked():
    return Masked().eval(), torch.zeros(2, 1, 6, 6)

def doubled():
    return Doubled().eval(), torch.zeros(2, 1, 6, 6)

class Empty(Net):
    def forward(self, x):
        return () if len(x) == 16 else super().forward(x)

def empty():
    return Empty().eval(), torch.zeros(2, 1, 6, 6)

class Greedy(Net):
    def forward(self, x):
        if len(x) == 16:
            raise MemoryError
        return super().forward(x)

def greedy():
    return Greedy().eval(), torch.zeros(2, 1, 6, 6)

def detached(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels).detach()

def hits(outputs, labels):
    return (outputs.argmax(1) == labels).sum()

def steep(outputs, labels):
    # finite, with a gradient that is not
    return nn.functional.cross_entropy(outputs, labels) + (outputs * 0).square().sum().sqrt()
"""


def written(folder: Path) -> Path:
    """*folder*, with the code in a file of its own name."""
    (folder / f"net_{folder.name}.py").write_text(CODE)
    return folder


def recipe(folder: Path, **changes: object) -> Path:
    """A recipe in *folder*, with fields changed (None: left out)."""
    code = f"net_{folder.name}.py"
    fields = {
        "model": f"{code}:net",
        "data": {"train": f"{code}:data", "validation": f"{code}:data", "batch_size": 16},
        "calibration": {"batches": 2},
        "epochs": 2,
        "optimizer": {"rate": 0.05},
    }
    fields |= changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in fields.items() if v is not None}))
    return path

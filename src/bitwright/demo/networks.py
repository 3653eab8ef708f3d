"""The two demo networks, written as a user would write them: no quantization stubs, no helper layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.registry import Registry

CLASSES = 10
PICTURE_SHAPE = (1, 16, 16)
# Added to scores that must not count: finite, as in the published BERT, so that half precision makes no NaN.
MASKED = -10_000.0
NORM_EPSILON = 1e-3  # as in the published TensorFlow MobileNetV2
WEIGHTS = Path(__file__).parent / "weights"

DEMO_NETWORKS: Registry[Callable[[], nn.Module]] = Registry("demo network")


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen (1x1), filter each channel (3x3 depthwise), narrow (1x1, no activation).

    Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", section 3.
    """

    def __init__(self, channels_in: int, channels_out: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion > 1:
            self.expand = nn.Sequential(
                nn.Conv2d(channels_in, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden, eps=NORM_EPSILON),
                nn.ReLU6(inplace=True),
            )
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(hidden, eps=NORM_EPSILON)
        self.project = nn.Conv2d(hidden, channels_out, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(channels_out, eps=NORM_EPSILON)
        self.has_shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """*x*: `[n, channels_in, h, w]`. *returns*: `[n, channels_out, h / stride, w / stride]`."""
        y: Tensor = self.expand(x)
        y = F.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.has_shortcut else y


class DigitsMobileNet(nn.Module):
    """A small MobileNetV2 for 16x16 digits: ten inverted residuals with live BatchNorm and ReLU6."""

    # expansion, output channels, repeats, stride of the first repeat
    STAGES = ((1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 3, 2), (6, 16, 3, 1), (6, 24, 1, 1))
    STEM_CHANNELS = 8
    HEAD_CHANNELS = 64

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, self.STEM_CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.STEM_CHANNELS, eps=NORM_EPSILON),
            nn.ReLU6(inplace=True),
        )
        blocks: list[nn.Module] = []
        channels = self.STEM_CHANNELS
        for expansion, channels_out, repeats, first_stride in self.STAGES:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                blocks.append(InvertedResidual(channels, channels_out, expansion=expansion, stride=stride))
                channels = channels_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Conv2d(channels, self.HEAD_CHANNELS, 1, bias=False)
        self.head_norm = nn.BatchNorm2d(self.HEAD_CHANNELS, eps=NORM_EPSILON)
        self.classifier = nn.Linear(self.HEAD_CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """*x*: `[n, 1, 16, 16]` float32, normalised ink. *returns*: `[n, 10]` logits."""
        x = self.blocks(self.stem(x))
        x = F.relu6(self.head_norm(self.head(x)))
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


class SelfAttention(nn.Module):
    """Multi-head self-attention with one joint projection to queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """*x*: `[n, tokens, width]`. *mask*: `[tokens, tokens]`, added to the scores. *returns*: like *x*."""
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        joined: Tensor = self.out(y.transpose(1, 2).reshape(n, tokens, width))
        return joined


class TransformerBlock(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """*x*: `[n, tokens, width]`. *mask*: `[tokens, tokens]`, added to the scores. *returns*: like *x*."""
        x = x + self.attention(self.attention_norm(x), mask)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class DigitsTransformer(nn.Module):
    """A small vision transformer for 16x16 digits: 4x4 patches, a class token, learned positions.

    Some blocks attend locally: a patch sees the class token and its neighbours, by a mask added to the scores.
    """

    WIDTH, HEADS, MLP_WIDTH, DEPTH, PATCH = 32, 4, 96, 4, 4
    LOCAL_BLOCKS = (1, 3)

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        side = PICTURE_SHAPE[1] // self.PATCH
        self.patches = nn.Conv2d(1, self.WIDTH, self.PATCH, stride=self.PATCH)
        self.class_token = nn.Parameter(torch.randn(1, 1, self.WIDTH) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, side * side + 1, self.WIDTH) * 0.02)
        self.register_buffer("mask", local_mask(side), persistent=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(self.WIDTH, self.HEADS, self.MLP_WIDTH) for _ in range(self.DEPTH)
        )
        self.norm = nn.LayerNorm(self.WIDTH)
        self.classifier = nn.Linear(self.WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """*x*: `[n, 1, 16, 16]` float32, normalised ink. *returns*: `[n, 10]` logits."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        for index, block in enumerate(self.blocks):
            x = block(x, self.mask if index in self.LOCAL_BLOCKS else None)
        logits: Tensor = self.classifier(self.norm(x[:, 0]))
        return logits


def local_mask(side: int) -> Tensor:
    """What to add to the scores of a class token and *side* x *side* patches so that attention stays local.

    *returns*: `[1 + side^2, 1 + side^2]` float32: 0 from and to the class token and between patches that touch,
    corners included; `MASKED` elsewhere.
    """
    index = torch.arange(side * side)
    places = torch.stack((index // side, index % side), dim=1)
    distance = (places[:, None] - places[None, :]).abs().amax(dim=-1)
    mask = torch.zeros(len(index) + 1, len(index) + 1)
    mask[1:, 1:] = (distance > 1) * MASKED
    return mask


DEMO_NETWORKS.add("cnn", DigitsMobileNet)
DEMO_NETWORKS.add("transformer", DigitsTransformer)


def load_demo(name: str) -> nn.Module:
    """The demo network *name* ("cnn" or "transformer") with its committed weights, in eval mode.

    *raises* `UnknownName` for any other name.
    """
    network = DEMO_NETWORKS.get(name, where="bitwright demo")()
    network.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return network.eval()

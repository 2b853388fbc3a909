"""The networks of the image examples: any number of channels, sizes and widths, and no BatchNorm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

CLASSES = 10


def norm(channels: int) -> nn.Module:
    """GroupNorm, not BatchNorm: batch statistics mix samples, so no sample would have a gradient of its own."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def small(channels: int, size: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.GroupNorm(4, width),
        nn.Tanh(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.GroupNorm(4, width),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(4),  # nothing to do for images of 8 x 8
        nn.Flatten(),
        nn.LayerNorm(16 * width),
        nn.Linear(16 * width, CLASSES),
    )


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.activation = activation()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm1(self.conv1(x)))
        return self.activation(self.norm2(self.conv2(y)) + self.shortcut(x))


def residual_blocks(width: int, activation: type[nn.Module] = nn.ReLU) -> tuple[list[nn.Module], int]:
    """The eight blocks of ResNet-18 behind a stem of `width` channels, and how many channels come out."""
    blocks: list[nn.Module] = []
    before = width
    for after, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        blocks += [ResidualBlock(before, after, stride, activation), ResidualBlock(after, after, 1, activation)]
        before = after
    return blocks, before


def resnet18(channels: int, size: int, width: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """ResNet-18 for images of 32 x 32: a 3 x 3 stem, no pooling behind it, and GroupNorm."""
    blocks, features = residual_blocks(width, activation)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        norm(width),
        activation(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(features, CLASSES),
    )


def vgg19(channels: int, size: int, width: int) -> nn.Module:
    """VGG-19 without norm layers: 16 convolutions and 3 linear layers."""
    layers: list[nn.Module] = []
    for factor, count in ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.ReLU()]
            channels = factor * width
        layers.append(nn.MaxPool2d(2))
    features = channels * (size // 32) ** 2
    layers += [nn.Flatten(), nn.Linear(features, 8 * width), nn.ReLU(), nn.Linear(8 * width, 8 * width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(8 * width, CLASSES))
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


class ViT(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021): patches of 4 x 4, six layers."""

    def __init__(self, channels: int, size: int, width: int, depth: int = 6, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches_BTd = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), patches_BTd], 1) + self.positions
        return self.head(self.norm(self.encoder(tokens))[:, 0])

"""Models and batches of any size, for growth.py: random weights, per-sample losses of shape [B]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from workloads import CLASSES, Workload, class_loss, features, labels, token_loss

AXES = ("B", "T", "depth", "width")
VOCAB = 1024


@dataclass(frozen=True)
class Sizes:
    B: int
    T: int  # tokens, or the side of an image; an MLP has none
    depth: int
    width: int


def gpt2(sizes: Sizes) -> Workload:
    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_positions=sizes.T,
                n_embd=sizes.width,
                n_layer=sizes.depth,
                n_head=max(sizes.width // 64, 1),
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def batch() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(VOCAB, (sizes.B, sizes.T + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return Workload("gpt2", f"V={VOCAB}, tied", build, batch, token_loss)


def mlp(sizes: Sizes) -> Workload:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(sizes.depth):
            linear = nn.Linear(sizes.width, sizes.width)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")  # or a deep one has no gradient
            layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes.width, CLASSES))

    return Workload("mlp", "linear + ReLU", build, features(sizes.B, sizes.width), class_loss)


def cnn(sizes: Sizes) -> Workload:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for i in range(sizes.depth):
            layers += [nn.Conv2d(sizes.width if i else 3, sizes.width, 3, padding=1)]
            layers += [nn.GroupNorm(8, sizes.width), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes.width, CLASSES))

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(sizes.B, 3, sizes.T, sizes.T), labels(sizes.B)

    return Workload("cnn", "3x3 conv + GroupNorm + ReLU, T the side of the image", build, batch, class_loss)


FAMILIES: dict[str, tuple[Callable[[Sizes], Workload], Sizes, tuple[str, ...]]] = {
    "gpt2": (gpt2, Sizes(B=4, T=64, depth=2, width=128), AXES),
    "mlp": (mlp, Sizes(B=64, T=1, depth=2, width=256), ("B", "depth", "width")),
    "cnn": (cnn, Sizes(B=16, T=16, depth=2, width=32), AXES),
}
"""How to make one, its sizes to start from, and those that make sense for it."""

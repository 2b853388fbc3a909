"""The models that the benchmarks time: random weights, no dropout, fixed batch, per-sample losses of shape [B]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
LSTM_VOCAB = 10_000


@dataclass(frozen=True)
class Workload:
    """One model with its batch: `make_batch()` gives input and targets."""

    name: str
    note: str
    build: Callable[[], nn.Module]
    make_batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Any, Tensor], Tensor]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """As `make_batch()`, of another size: its samples again and again."""
        inputs, targets = self.make_batch()
        index = torch.arange(size) % len(targets)
        return inputs[index], targets[index]


def class_loss(outputs: Any, targets: Tensor) -> Tensor:
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    return F.cross_entropy(logits, targets, reduction="none")


def token_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Each sample's cross-entropy, averaged over its own tokens."""
    tokens = F.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten(), reduction="none")
    return tokens.view(targets.shape).mean(1)


def labels(batch_size: int) -> Tensor:
    return torch.randint(CLASSES, (batch_size,))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, CLASSES))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for channels_in, channels in ((3, 32), (32, 64), (64, 64), (64, 128)):
        layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 2 * 2, CLASSES))


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(32, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.GroupNorm(32, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 for small images, with GroupNorm(32, ·) in place of BatchNorm."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    channels_in = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [ResidualBlock(channels_in, channels, stride), ResidualBlock(channels, channels, 1)]
        channels_in = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


class Bottleneck(nn.Module):
    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(channels_in, width, 1, bias=False), nn.GroupNorm(32, width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.GroupNorm(32, width), nn.ReLU()),
            *(nn.Conv2d(width, channels, 1, bias=False), nn.GroupNorm(32, channels)),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.GroupNorm(32, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet-50 as for ImageNet, with GroupNorm(32, ·) in place of BatchNorm."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, padding=1))
    channels_in = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(channels_in, width, stride if block == 0 else 1))
            channels_in = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels_in, CLASSES))


def vgg19() -> nn.Module:
    layers: list[nn.Module] = []
    channels_in = 3
    for channels, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(count):
            layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU()]
            channels_in = channels
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)]
    model = nn.Sequential(*layers)
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=224,
            patch_size=16,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=6,
            intermediate_size=1536,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=CLASSES,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=768, n_layer=4, n_head=12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    )


def gpt2_lora() -> nn.Module:
    """The same, frozen, with low-rank adapters on the attention's projections."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    return get_peft_model(gpt2(), config)  # pyright: ignore[reportArgumentType]


def beit() -> nn.Module:
    from transformers import BeitConfig, BeitForImageClassification

    return BeitForImageClassification(
        BeitConfig(
            num_hidden_layers=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            drop_path_rate=0.0,
            num_labels=CLASSES,
        )
    )


def texts(batch_size: int, length: int) -> Callable[[], tuple[Tensor, Tensor]]:
    def batch() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(50257, (batch_size, length + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=CLASSES,
        )
    )


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(LSTM_VOCAB, 256)
        self.lstm = nn.LSTM(256, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(ids))
        return self.head(states[:, -1])


def features(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(shape), labels(shape[0]))


def token_ids(vocab: int, *shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randint(3, vocab, shape), labels(shape[0]))


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("mlp", "784-1024-1024-10, B=256", mlp, features(256, 784), class_loss),
        Workload("cnn", "4 conv + GroupNorm, 32², B=64", cnn, features(64, 3, 32, 32), class_loss),
        Workload("resnet18", "GroupNorm, 32², B=32", resnet18, features(32, 3, 32, 32), class_loss),
        Workload("vgg19", "no norms, 32², B=32", vgg19, features(32, 3, 32, 32), class_loss),
        Workload("vit", "6x384, 224², B=8", vit, features(8, 3, 224, 224), class_loss),
        Workload("gpt2", "4x768, V=50257 tied, T=128, B=8", gpt2, texts(8, 128), token_loss),
        Workload("bert", "4x256, T=128, B=16", bert, token_ids(30522, 16, 128), class_loss),
        Workload("lstm", "2x256, T=64, B=32", LSTMClassifier, token_ids(LSTM_VOCAB, 32, 64), class_loss),
        Workload("resnet50", "GroupNorm, 64², B=16", resnet50, features(16, 3, 64, 64), class_loss),
        Workload("gpt2_512", "the same, T=512, B=2", gpt2, texts(2, 512), token_loss),
        Workload("gpt2_1024", "the same, T=1024, B=2", gpt2, texts(2, 1024), token_loss),
        Workload("gpt2_lora", "the same with LoRA, r=8, T=128, B=8", gpt2_lora, texts(8, 128), token_loss),
        Workload("beit", "2x768, 224², B=8", beit, features(8, 3, 224, 224), class_loss),
    )
}

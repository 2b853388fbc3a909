"""A few steps of a small GPT-2 on the standard library's documentation strings, with clipped per-sample gradients.

    python examples/gpt2.py --steps 20
    python examples/gpt2.py --fused --compile

The model reads bytes and starts from random weights; its head is tied to its embedding. A sample is one window of
text, and its loss is the mean over its own tokens. No noise is added, so this run is NOT yet private.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from dpcompile import dpcompile

VOCAB = 256  # bytes
POSITIONS = 64
MODULES = (
    "argparse", "asyncio", "collections", "contextlib", "csv", "dataclasses", "datetime", "decimal", "difflib",
    "email", "enum", "fractions", "functools", "heapq", "html", "http.client", "inspect", "io", "itertools", "json",
    "logging", "math", "multiprocessing", "os", "pathlib", "pickle", "random", "re", "shutil", "socket",
    "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "typing", "unittest",
    "urllib.request", "uuid", "zipfile",
)  # fmt: skip


def documentation() -> Tensor:
    """The documentation strings of `MODULES`, their classes, functions and methods, as one row of bytes."""
    texts: dict[str, None] = {}  # an ordered set: the same text is often inherited
    for name in MODULES:
        module = importlib.import_module(name)
        public = [member for key, member in sorted(vars(module).items()) if not key.startswith("_")]
        methods = [method for owner in public if inspect.isclass(owner) for method in vars(owner).values()]
        for item in (module, *public, *methods):
            if inspect.ismodule(item) or callable(item):
                texts[inspect.getdoc(item) or ""] = None
    return torch.frombuffer(bytearray("\n\n".join(texts).encode()), dtype=torch.uint8).long()


def draw_windows(text: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` random windows [count, POSITIONS] and the bytes that follow each position."""
    starts = torch.randint(len(text) - POSITIONS, (count, 1))
    windows = text[starts + torch.arange(POSITIONS + 1)]
    return windows[:, :-1], windows[:, 1:]


def sample_losses(outputs: Any, targets: Tensor) -> Tensor:
    """Each sample's cross-entropy, averaged over its own tokens: shape [B]."""
    return F.cross_entropy(outputs.logits.transpose(1, 2), targets, reduction="none").mean(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="R, the bound on one sample's gradient")
    parser.add_argument("--fused", action="store_true", help="compile the loss into the same graph")
    parser.add_argument("--compile", action="store_true", help="run the emitted graph through torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or args.batch_size < 1 or args.width % 32:
        parser.error("--steps and --batch-size must be at least 1 and --width a multiple of 32")

    torch.manual_seed(args.seed)
    text = documentation()
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.width // 32,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    x, y = draw_windows(text, args.batch_size)
    fused: dict[str, Any] = {"loss_fn": sample_losses, "sample_targets": y} if args.fused else {}
    dp_model = dpcompile(GPT2LMHeadModel(config), x, max_grad_norm=args.max_grad_norm, **fused)
    print(dp_model.plan)

    step_model = torch.compile(dp_model, fullgraph=True) if args.compile else dp_model
    optimizer = torch.optim.AdamW(dp_model.parameters(), lr=1e-3)
    first = last = float("nan")
    started = time.perf_counter()
    for step in tqdm(range(args.steps), unit="step"):
        x, y = draw_windows(text, args.batch_size)
        optimizer.zero_grad()
        loss = step_model(x, targets=y) if args.fused else sample_losses(step_model(x), y).mean()
        loss.backward()
        optimizer.step()
        last = loss.item()
        first = last if step == 0 else first
        clipped = (dp_model.per_sample_norms > args.max_grad_norm).float().mean().item()
        tqdm.write(f"step {step + 1:3d}  loss {last:.3f} nats/byte  clipped {100 * clipped:3.0f} %")
    per_step = (time.perf_counter() - started) / args.steps
    print(
        f"loss {first:.2f} -> {last:.2f} in {args.steps} steps of {per_step:.2f} s on {len(text) // 1024} KiB of text "
        "(clipped gradients, no noise: not yet private)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The recipe that trains ImageNet privately: pretrain in public, freeze what is early, fine-tune in very large batches.

    python examples/imagenet.py
    python examples/imagenet.py --pretrain-epochs 0            # the same without public data
    python examples/imagenet.py --public-dir places365 --data-dir imagenet --batch-size 65536 --epochs 70 \\
        --delta 1e-6 --ema 0.99 --workers 8

After Kurakin et al. 2022 (arXiv:2201.12328), who reach 47.9 % on ImageNet at epsilon 10, delta 1e-6: ResNet-18 with
GroupNorm; weights from Places365, trained without privacy; the stem and early blocks frozen; R = 1; logical batches of
65536 from micro-batches, 70 epochs, noise multiplier 1.31; SGD with Nesterov momentum, learning rate
0.03 * batch / 256 after one epoch of warm-up, then down a cosine. The averaged weights are from De et al. 2022
(arXiv:2204.13650).

By default scikit-learn's digits stand in, enlarged to 32 x 32: 0 to 4 are public, 5 to 9 private, and a quarter of the
usual width does. That takes a minute and reaches 98.3 % at epsilon 10, delta 1e-4. Digits are too easy to show what
public data are worth: the second command, whose frozen half is random, reaches 97.2 %, two test images of 180 less.
Folders hold train/CLASS/*.jpg and val/CLASS/*.jpg; without --public-dir the first half of the classes is public.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import norm, residual_blocks
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from dpcompile import Private, dpcompile, make_private

BLOCKS = 8
NOISE_MULTIPLIER = 1.31
"""Of the paper's run: 0.058014 on each of 512 micro-batches."""

# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """Items are (image [C, H, W] from -1 to 1, label from 0)."""

    public: Dataset[Any]
    private: Dataset[Any]
    test: Dataset[Any]  # of the private classes
    public_classes: int
    private_classes: int


def digits(size: int) -> Data:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    y = torch.tensor(labels)
    public, ours = y < 5, (y >= 5).nonzero().flatten()
    train, test = train_test_split(ours, test_size=0.2, random_state=0, stratify=y[ours])
    parts = (
        TensorDataset(x[public], y[public]),
        TensorDataset(x[train], y[train] - 5),
        TensorDataset(x[test], y[test] - 5),
    )
    return Data(*parts, 5, 5)


class Folder(Dataset[Any]):
    """Images of root/CLASS/, the shorter side resized and the middle cut out. No augmentation."""

    def __init__(self, root: Path, classes: list[str], size: int) -> None:
        self.size = size
        self.items = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((root / name).iterdir())
            if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image  # late: only folders need it
        from PIL.ImageOps import fit

        file, label = self.items[index]
        with Image.open(file) as image:
            pixels = bytearray(fit(image.convert("RGB"), (self.size, self.size)).tobytes())
        x = torch.frombuffer(pixels, dtype=torch.uint8).view(self.size, self.size, 3).permute(2, 0, 1)
        return x / 127.5 - 1, label


def folders(data_dir: Path, public_dir: Path | None, size: int) -> Data:
    def classes(root: Path) -> list[str]:
        if not (root / "train").is_dir():
            sys.exit(f"{root}: expected the folders train/CLASS and val/CLASS in it.")
        return sorted(entry.name for entry in (root / "train").iterdir() if entry.is_dir())

    ours = classes(data_dir)
    if public_dir is None:
        public_dir, theirs, ours = data_dir, ours[: len(ours) // 2], ours[len(ours) // 2 :]
    else:
        theirs = classes(public_dir)
    return Data(
        Folder(public_dir / "train", theirs, size),
        Folder(data_dir / "train", ours, size),
        Folder(data_dir / "val", ours, size),
        len(theirs),
        len(ours),
    )


# ---------------------------------------------------------------- model


def resnet18(channels: int, size: int, width: int, classes: int) -> nn.Sequential:
    """Stem, 8 blocks, head: 10 parts. The stem of large images reduces them by 4, that of small ones by 2."""
    stem = [nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False), norm(width), nn.ReLU()]
    if size > 64:
        stem.append(nn.MaxPool2d(3, stride=2, padding=1))
    blocks, features = residual_blocks(width)
    return nn.Sequential(nn.Sequential(*stem), *blocks, head(features, classes))


def head(features: int, classes: int) -> nn.Module:
    """Starts at zero, so that the first steps are not spent on undoing chance."""
    linear = nn.Linear(features, classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


# ---------------------------------------------------------------- training


def warm_up_and_cosine(steps: int, warm_up: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up))))

    return factor


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset[Any], workers: int) -> float:
    model.eval()
    right = [(model(x).argmax(1) == y).float() for x, y in DataLoader(data, batch_size=128, num_workers=workers)]
    model.train()
    return torch.cat(right).mean().item()


def pretrain(model: nn.Module, data: Dataset[Any], epochs: int, lr: float, workers: int) -> None:
    """Plain training: the data are public."""
    loader = DataLoader(data, batch_size=64, shuffle=True, num_workers=workers)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    scheduler = LambdaLR(optimizer, warm_up_and_cosine(epochs * len(loader), len(loader)))
    with tqdm(total=epochs * len(loader), desc="pretraining, public", unit="batch") as progress:
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                scheduler.step()
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}")


@dataclass(frozen=True)
class Point:
    """After one private epoch."""

    epsilon: float
    lr: float
    accuracy: float
    averaged: float  # accuracy of the averaged weights


def fine_tune(
    private: Private, forward: Any, averaged: AveragedModel, epochs: int, test: Dataset[Any], workers: int, plot: bool
) -> list[Point]:
    """The private part. Averages and learning rates follow logical steps."""
    model, optimizer = private.dp_model.module, private.optimizer
    steps = private.loader.sampler.steps_per_epoch
    scheduler = LambdaLR(optimizer, warm_up_and_cosine(epochs * steps, steps))
    points: list[Point] = []
    with tqdm(total=epochs * len(private.loader), desc="fine-tuning, private", unit="batch") as progress:
        for _ in range(epochs):
            for x, y in private.loader:
                loss = F.cross_entropy(forward(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if optimizer.released:
                    averaged.update_parameters(model)
                    scheduler.step()
                progress.update()
                progress.set_postfix({"loss (not private)": f"{loss.item():.3f}"})
            if plot:
                reached = accuracy(private.dp_model, test, workers), accuracy(averaged, test, workers)
                points.append(Point(private.epsilon(accountant="rdp"), float(scheduler.get_last_lr()[0]), *reached))
    return points


def draw(file: str, points: list[Point]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    spent = [point.epsilon for point in points]
    left.plot(spent, [100 * point.accuracy for point in points], label="weights")
    left.plot(spent, [100 * point.averaged for point in points], label="averaged weights")
    left.set(xlabel="epsilon spent (RDP)", ylabel="test accuracy, %")
    left.legend()
    right.plot(range(1, len(points) + 1), [point.lr for point in points])
    right.set(xlabel="private epoch", ylabel="learning rate")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="private images: train/CLASS/* and val/CLASS/* (needs Pillow)")
    parser.add_argument("--public-dir", type=Path, help="images to pretrain on: train/CLASS/*")
    parser.add_argument("--image-size", type=int, help="default: 32 for digits, 224 for folders")
    parser.add_argument("--width", type=int, help="channels of the stem; default: 16 for digits, 64 for folders")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--pretrain-epochs", type=int, default=8)
    parser.add_argument("--pretrain-lr", type=float, default=0.05)
    parser.add_argument("--frozen-blocks", type=int, default=4, help="of 8; the stem is frozen if any block is")
    parser.add_argument("--epsilon", type=float, default=10.0)
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--noise-multiplier", type=float, help=f"instead of --epsilon; paper: {NOISE_MULTIPLIER}")
    parser.add_argument("--epochs", type=int, default=20, help="private ones")
    parser.add_argument("--batch-size", type=int, default=360, help="expected size of a logical batch")
    parser.add_argument("--max-physical-batch", type=int, default=128, help="most samples in one forward")
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--lr", type=float, help="peak; default: 1 for digits, 0.03 * batch size / 256 for folders")
    parser.add_argument("--ema", type=float, default=0.9, help="decay of the averaged weights at a logical step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="run the emitted graph through torch.compile")
    parser.add_argument("--plot", metavar="FILE", help="draw accuracy against epsilon, and the learning rate")
    args = parser.parse_args(argv)
    if args.public_dir and not args.data_dir:
        parser.error("--public-dir goes with --data-dir")
    if not 0 <= args.frozen_blocks <= BLOCKS or args.epochs < 1 or args.batch_size < 1:
        parser.error("--frozen-blocks must be from 0 to 8, --epochs and --batch-size at least 1")
    args.image_size = args.image_size or (224 if args.data_dir else 32)
    args.width = args.width or (64 if args.data_dir else 16)
    args.lr = args.lr or (0.03 * args.batch_size / 256 if args.data_dir else 1.0)
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.manual_seed(args.seed)
    data = folders(args.data_dir, args.public_dir, args.image_size) if args.data_dir else digits(args.image_size)
    channels = 3 if args.data_dir else 1

    model = resnet18(channels, args.image_size, args.width, data.public_classes)
    pretrain(model, data.public, args.pretrain_epochs, args.pretrain_lr, args.workers)
    model[-1] = head(8 * args.width, data.private_classes)
    if args.frozen_blocks:
        model[: 1 + args.frozen_blocks].requires_grad_(False)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trainable} of {sum(p.numel() for p in model.parameters())} parameters are fine-tuned")

    physical = min(args.max_physical_batch, args.batch_size)  # the plan is made for batches of this size
    sample = torch.zeros(physical, channels, args.image_size, args.image_size)
    dp_model = dpcompile(model, sample, max_grad_norm=args.max_grad_norm)
    private = make_private(
        dp_model,
        torch.optim.SGD(
            [p for p in dp_model.parameters() if p.requires_grad],
            lr=args.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
        ),
        data.private,
        target_epsilon=None if args.noise_multiplier else args.epsilon,
        target_delta=args.delta,
        noise_multiplier=args.noise_multiplier,
        epochs=args.epochs,
        batch_size=args.batch_size,
        max_physical_batch=args.max_physical_batch,
        pad=args.compile,  # one shape, so that the graph is compiled once
        num_workers=args.workers,
        seed=args.seed,
    )
    print(private)
    averaged = AveragedModel(copy.deepcopy(model), multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    forward = torch.compile(dp_model, fullgraph=True) if args.compile else dp_model
    points = fine_tune(private, forward, averaged, args.epochs, data.test, args.workers, bool(args.plot))

    last, reached = accuracy(dp_model, data.test, args.workers), accuracy(averaged, data.test, args.workers)
    print(
        f"test accuracy {100 * reached:.1f} % (last weights: {100 * last:.1f} %) with (epsilon, delta) = "
        f"({private.epsilon():.2f}, {args.delta:g}), noise multiplier {private.noise_multiplier:.2f}, "
        f"{private.released_steps} steps"
    )
    if args.plot:
        draw(args.plot, points)
        print(f"figure in {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The image examples, each with arguments so small that only the promised lines are looked at."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from selection import every

pytest.importorskip("sklearn")

TINY_STEP = ["--model", "mlp", "--logical", "24", "--physical", "1", "8"]
EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_cnn_trains_privately(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "cnn.png"
    arguments = ["--epochs", "1", "--width", "4", "--noise-multiplier", "2", "--norm-method", "paper"]
    assert example("cnn").main([*arguments, "--plot", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "plan (paper): norms of 12 uses of parameters:" in out
    assert re.search(
        r"test accuracy \d+\.\d % with \(epsilon, delta\) = \(\d\.\d\d, 0\.0001\), noise multiplier 2\.00, 3 ", out
    )
    assert figure.stat().st_size > 0


@pytest.mark.parametrize(("model", "size"), every(3, [("resnet18", 16), ("vgg19", 32), ("vit", 8)]))
def test_every_model_of_cnn_is_captured_and_gives_logits_of_every_image(model: str, size: int) -> None:
    import torch

    from dpcompile.api import prove

    made = example("cnn").MODELS[model](3, size, 4)
    images = torch.zeros(2, 3, size, size)
    assert made(images).shape == (2, 10)
    assert not prove(made, images).conclude().uses.unused


def test_cifar10_without_torchvision_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="pip install torchvision"):
        example("cnn").main(["--data", "cifar10"])


@pytest.mark.slow
def test_nanobatch_finds_the_same_sums(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "nanobatch.png"
    assert example("nanobatch").main([*TINY_STEP, "--plot", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "the clipped sums agree: they differ by at most" in out
    assert "per-layer" in out
    assert figure.stat().st_size > 0


@pytest.mark.slow
def test_nanobatch_notices_sums_that_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nanobatch = example("nanobatch")
    monkeypatch.setattr(nanobatch, "TOLERANCE", 0.0)
    assert nanobatch.main(TINY_STEP) == 1
    assert "the clipped sums DISAGREE" in capsys.readouterr().out


@pytest.mark.slow
def test_imagenet_pretrains_and_fine_tunes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "imagenet.png"
    arguments = ["--width", "2", "--image-size", "8", "--pretrain-epochs", "1", "--epochs", "2", "--frozen-blocks", "8"]
    assert example("imagenet").main([*arguments, "--noise-multiplier", "1.5", "--plot", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "parameters are fine-tuned" in out
    assert re.search(r"%\) with \(epsilon, delta\) = \(\d\.\d\d, 0\.0001\), noise multiplier 1\.50, 4 steps", out)
    assert figure.stat().st_size > 0


def test_imagenet_reads_folders_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for label, shade in (("cat", 255), ("dog", 0), ("fish", 255), ("newt", 0)):
            (tmp_path / part / label).mkdir(parents=True)
            image.new("L", (12, 9), shade).save(tmp_path / part / label / "0.png")
    data = example("imagenet").folders(tmp_path, None, 6)
    assert (data.public_classes, data.private_classes) == (2, 2)
    x, label = data.private[0]
    assert (x.shape, label, x.min().item()) == ((3, 6, 6), 0, 1.0)
    assert data.test[1][0].max().item() == -1.0
    with pytest.raises(SystemExit, match="expected the folders train/CLASS"):
        example("imagenet").folders(tmp_path / "train", None, 6)

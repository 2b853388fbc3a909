"""The examples on text, with tiny arguments: each prints the line that it promises."""

from __future__ import annotations

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import text_tasks

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--steps", "2", "--batch-size", "8", "--length", "8", "--train-samples", "80", "--test-samples", "20"]
PRIVACY = ["--epsilon", "8", "--delta", "1e-3", "--accountant", "rdp"]


def example(name: str) -> ModuleType:
    """The example as a module; it is no package."""
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, EXAMPLES / f"{name.removeprefix('example_')}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def few_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small part of each library, which is quick to read."""
    parts = {"graphs": ("networkx", "algorithms/centrality"), "algebra": ("sympy", "geometry")}
    monkeypatch.setattr(text_tasks, "LIBRARIES", parts)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lstm", "encoder"])
def test_a_small_model_prints_its_accuracy_and_what_it_spent(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "rows.png"

    assert example("example_text").main(["--model", model, *TINY, *PRIVACY, "--plot", str(plot)]) == 0

    printed = capsys.readouterr()
    assert "80 texts to train, 20 to test, 2 classes" in printed.out
    found = re.search(
        rf"best: {model}, test accuracy [\d.]+% with \(epsilon, delta\) = \(([\d.]+), 0.001\)", printed.out
    )
    assert found is not None
    assert 0 < float(found[1]) <= 8
    assert "loss (not private)" in printed.err
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("tune", "trainable"),
    [
        pytest.param("full", 13_693_826, marks=pytest.mark.slow),
        pytest.param("lora", 13_058, marks=pytest.mark.slow),
        pytest.param("bitfit", 5_378, marks=pytest.mark.slow),
    ],
)
def test_minilm_is_tuned_as_asked(tune: str, trainable: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert example("example_text").main(["--tune", tune, "--layers", "1", *TINY, *PRIVACY]) == 0

    printed = capsys.readouterr().out
    assert re.search(rf"minilm {tune} +{trainable:,d} +[\d.]+% +[\d.]+ ", printed)
    assert f"best: minilm {tune}, test accuracy" in printed


def test_a_tuning_of_a_small_model_is_refused() -> None:
    with pytest.raises(SystemExit):
        example("example_text").main(["--model", "lstm", "--tune", "lora"])


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], ["--fused"]], ids=["split", "fused"])
def test_gpt2_prints_its_loss_before_and_after_and_what_it_spent(
    form: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2 = example("example_gpt2")
    monkeypatch.setattr(gpt2, "PRIVATE_PART", "algorithms/centrality")
    size = ["--width", "32", "--layers", "1", "--held-out", "16"]
    run = ["--steps", "2", "--public-steps", "2", "--batch-size", "8", "--max-physical-batch", "4"]
    privacy = ["--epsilon", "8", "--delta", "1e-4", "--accountant", "rdp"]

    assert gpt2.main([*size, *run, *privacy, *form]) == 0

    printed = capsys.readouterr()
    assert re.search(
        r"held-out loss [\d.]+ -> [\d.]+ nats/byte \(perplexity [\d.]+ -> [\d.]+\) with "
        r"\(epsilon, delta\) = \([\d.]+, 0.0001\): 2 steps",
        printed.out,
    )
    assert "transformer.wte.weight" in printed.out
    assert "loss (not private)" in printed.err

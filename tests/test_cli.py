"""The command line: what it prints, and which exit code it leaves with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpcompile.cli import app, main

RUNNER = CliRunner()
GPT2 = ["hf:GPT2LMHeadModel", "--seq", "5"]
for setting in ("n_layer=2", "n_embd=8", "n_head=2", "vocab_size=11", "bos_token_id=0", "eos_token_id=0"):
    GPT2 += ["--set", setting]

MODELS = """
import torch
from torch import nn

class BasicBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))

def resnet():
    return nn.Sequential(nn.Conv2d(3, 4, 3), BasicBlock(4), BasicBlock(4), nn.Flatten(), nn.Linear(4 * 36, 2))

class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x * torch.arange(x.shape[1]))  # a constant that the forward makes

def with_sample():
    return Scaled(4, 3), torch.randn(6, 4)

def no_model():
    return 3

def lazy():
    return nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d()), torch.randn(2, 2)


def broken():
    raise RuntimeError("out of order")
"""


@pytest.fixture
def models(tmp_path: Path) -> str:
    file = tmp_path / "models_of_the_test.py"
    file.write_text(MODELS)
    return str(file)


def test_report_shows_every_use_and_the_totals() -> None:
    result = RUNNER.invoke(app, ["report", *GPT2])
    assert result.exit_code == 0, result.output
    assert "input_ids: int64[8, 5]" in result.output
    assert "h.{0-1}.mlp.c_fc.weight x2" in result.output
    assert "flops, forward and backward" in result.output
    assert max(map(len, result.output.splitlines())) <= 140


@pytest.mark.slow
def test_report_takes_batch_policy_device_and_json(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    options = ["--batch", "3", "--policy", "paper", "--device", "cuda", "--json", str(file), "--symbolic"]
    result = RUNNER.invoke(app, ["report", *GPT2, *options])
    assert result.exit_code == 0, result.output
    assert "B*G*T**2" in result.output
    plan = json.loads(file.read_text())
    assert (plan["policy"], plan["batch_size"], plan["device"]["name"]) == ("paper", 3, "cuda")


@pytest.mark.slow
def test_report_shows_for_which_lengths_choices_stay(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = RUNNER.invoke(app, ["report", *GPT2, "--dynamic", "input_ids:1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "T = 5 (free)" in result.output
    assert "best for T" in result.output
    plan = json.loads(file.read_text())
    assert plan["lengths"] == {"T": 5}
    (head,) = [row for row in plan["rows"] if row["module"] == "lm_head" and row["kind"] == "outer"]
    least, greatest = head["best_for_T"]
    assert least <= 5 <= (greatest or 5)


@pytest.mark.slow
def test_report_counts_the_products_of_attention(tmp_path: Path) -> None:
    backbone = []
    for seq in (4, 8):
        file = tmp_path / f"{seq}.json"
        extra = ["--seq", str(seq), "--json", str(file), "--set", "attn_pdrop=0.0"]
        assert RUNNER.invoke(app, ["report", *GPT2, *extra]).exit_code == 0
        backbone.append(json.loads(file.read_text())["totals"]["backbone_flops"])
    assert backbone[1] - 2 * backbone[0] == 8 * 2 * 7 * 2 * (8 * 8 - 2 * 4 * 4) * 8  # batch, layers, products, flops


def test_a_callable_may_bring_its_own_sample(models: str) -> None:
    result = RUNNER.invoke(app, ["report", f"{models}:with_sample"])
    assert result.exit_code == 0, result.output
    assert "batch size 6" in result.output


def test_check_says_what_a_supported_model_uses() -> None:
    result = RUNNER.invoke(app, ["check", *GPT2])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("supported: GPT2LMHeadModel, 29 sites in 28 groups")
    assert "contraction" in result.output


def test_check_names_every_batch_norm(models: str) -> None:
    result = RUNNER.invoke(app, ["check", f"{models}:resnet", "--input", "float32[2,3,8,8]"])
    assert result.exit_code == 1
    for name in ("1.bn1", "1.bn2", "2.bn1", "2.bn2"):
        assert f"`{name}` (BatchNorm2d)" in result.output
    assert "cure: Replace BatchNorm" in result.output
    assert "models_of_the_test.py:" in result.output


def test_report_of_an_unsupported_model_is_refused(models: str) -> None:
    result = RUNNER.invoke(app, ["report", f"{models}:resnet", "--input", "float32[2,3,8,8]"])
    assert result.exit_code == 1
    assert "BatchNorm" in result.stderr


def test_check_names_every_batch_norm_of_a_hugging_face_resnet() -> None:
    small = ["depths=[1]", "hidden_sizes=[8]", "embedding_size=4", "layer_type='basic'"]
    options = [word for setting in small for word in ("--set", setting)]
    options += ["--input", "pixel_values=float32[2,3,32,32]"]
    result = RUNNER.invoke(app, ["check", "hf:ResNetForImageClassification", *options])
    assert result.exit_code == 1, result.output
    assert result.output.count("(BatchNorm2d)") == 4


@pytest.mark.parametrize(("part", "expected"), [("forward", "aten.mul"), ("backward", "record_norms"), ("uses", "->")])
def test_graph_prints_code(part: str, expected: str, models: str) -> None:
    result = RUNNER.invoke(app, ["graph", f"{models}:with_sample", "--part", part])
    assert result.exit_code == 0, result.output
    assert expected in result.output


@pytest.mark.parametrize("part", ["backward", "uses"])
def test_graph_draws_svg(part: str, models: str, tmp_path: Path) -> None:
    file = tmp_path / "graph.svg"
    result = RUNNER.invoke(app, ["graph", f"{models}:with_sample", "--part", part, "--svg", str(file)])
    assert result.exit_code == 0, result.output
    assert "</svg>" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report"], "Missing argument"),
        (["frob"], "No such command"),
        (["report", "x"], "not of the form"),
        (["report", "no_such_module:f"], "there is no module 'no_such_module'"),
        (["report", "no_such_file.py:f"], "there is no file"),
        (["report", "MODELS:nothing"], "has no 'nothing'"),
        (["report", "MODELS:no_model"], "returned int"),
        (["report", "MODELS:lazy"], "1.weight, 1.bias, 1.running_mean, 1.running_var not initialised yet"),
        (["report", "MODELS:broken"], "raised RuntimeError: out of order"),
        (["report", "MODELS:resnet"], "give one with --input"),
        (["check", "MODELS:resnet", "--input", "float32[2,5,8,8]"], "does not take this sample"),
        (["report", "MODELS:with_sample", "--input", "float32[2"], "not of the form"),
        (["report", "MODELS:with_sample", "--input", "float33[2,4]"], "no dtype 'float33'"),
        (["report", "MODELS:with_sample", "--input", "y=float32[2,4]"], "does not fit Scaled.forward"),
        (["report", "MODELS:with_sample", "--input", "float32[2,4]", "--input", "x=int64[2]"], "name all"),
        (["report", "MODELS:with_sample", "--policy", "best"], "--policy"),
        (["report", "MODELS:with_sample", "--set", "a=1"], "--set is for hf"),
        (["report", "hf:GPT2LMHead"], "did you mean GPT2LMHeadModel"),
        (["report", "hf:GPT2LMHeadModel", "--set", "n_layers=2"], "did you mean n_layer"),
        (["report", "hf:GPT2LMHeadModel", "--set", "n_layer"], "not of the form"),
        (["report", "MODELS:with_sample", "--dynamic", "x"], "not of the form NAME:DIM"),
        (["check", "MODELS:with_sample", "--dynamic", "y:1"], "names ['y'], but the arguments are ['x']"),
    ],
)
def test_bad_arguments_end_with_one_line(
    arguments: list[str], said: str, models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([word.replace("MODELS", models) for word in arguments])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert said in err


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dpcompile", "report", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_report_of_seven_billion_parameters() -> None:
    result = RUNNER.invoke(app, ["report", "hf:LlamaForCausalLM", "--batch", "4", "--seq", "2048"])
    assert result.exit_code == 0, result.output
    assert ".{0-31}." in result.output

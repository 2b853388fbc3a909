"""`dpcompile check --explain`: the batch in every module, and the way by which samples reach what is refused."""

# ruff: noqa: E501 (tables as they are printed)
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from layers import Apply
from torch import Tensor, nn
from typer.testing import CliRunner

from dpcompile.api import Proof, prove
from dpcompile.cli import app
from dpcompile.errors import DPCompileError
from dpcompile.explain import chains_text, proof_text

NETS = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = norm

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Frames [B, T, d] to scores of every frame; a table of positions; the batch folded with T at the head."""

    def __init__(self, *norms):
        super().__init__()
        self.places = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(map(Block, norms))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = (x + self.places(torch.arange(5))).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.transpose(1, 2).flatten(0, 1))


def grouped():
    return Net(nn.GroupNorm(2, 4), nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)), torch.randn(3, 5, 4)


def batch_normed():
    return Net(nn.GroupNorm(2, 4), nn.BatchNorm1d(4)), torch.randn(3, 5, 4)
'''


def check(name: str, *options: str) -> tuple[int, str]:
    """Exit code and output of `check` on a model of NETS; the source is nets/nets.py wherever it is."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "nets", "nets.py")
        file.parent.mkdir()
        file.write_text(NETS)
        result = CliRunner().invoke(app, ["check", f"{file}:{name}", *options])
    return result.exit_code, result.output


class TestGolden(TestCase):
    maxDiff = None

    def test_a_supported_model(self) -> None:
        code, output = check("grouped", "--explain")
        assert code == 0
        self.assertExpectedInline(
            output,
            """\
Batch: the dimension in which sample i has slice i. (5 x B x 2): folded, 5 before it and 2 behind it in one dimension.

input                         gives      batch
x                             [B, 5, 4]  dim 0

module             class      gives      batch
(root)             Net        [5*B, 2]   dim 0 (1 x B x 5)
places             Embedding  [5, 4]     none: made from parameters alone
blocks.{0-2}       Block      [B, 4, 5]  dim 0
blocks.{0-2}.conv  Conv1d     [B, 4, 5]  dim 0
blocks.{0-2}.norm  GroupNorm  [B, 4, 5]  dim 0
head               Linear     [5*B, 2]   dim 0 (1 x B x 5)

supported: Net, 15 sites in 15 groups, rules broadcast, contraction, convolution, group-norm, 0 fallbacks
""",
        )

    def test_a_refused_model(self) -> None:
        code, output = check("batch_normed", "--explain")
        assert code == 1
        self.assertExpectedInline(
            output,
            """\
Batch: the dimension in which sample i has slice i. (5 x B x 2): folded, 5 before it and 2 behind it in one dimension.

input                           gives      batch
x                               [B, 5, 4]  dim 0

module             class        gives      batch
(root)             Net          [5*B, 2]   samples mixed
places             Embedding    [5, 4]     none: made from parameters alone
blocks.0           Block        [B, 4, 5]  dim 0
blocks.{0-1}.conv  Conv1d       [B, 4, 5]  dim 0
blocks.0.norm      GroupNorm    [B, 4, 5]  dim 0
blocks.1           Block        [B, 4, 5]  samples mixed
blocks.1.norm      BatchNorm1d  [B, 4, 5]  samples mixed
head               Linear       [5*B, 2]   samples mixed

not supported: Net
check-supported: the model is refused, samples influence each other here:
  1. `blocks.1.norm` (BatchNorm1d): batch_norm in training mode takes its statistics over the samples of the batch
      at nets/nets.py:13: return x + torch.relu(self.norm(self.conv(x)))
      cure: Replace BatchNorm by nn.GroupNorm, or put it in eval mode before compiling.

1. the way from input `x` to batch_norm in `blocks.1.norm`:
    op          module                       gives      batch          source
    input       x                            [B, 5, 4]  dim 0
    add         (root) (Net)                 [B, 5, 4]  dim 0          nets/nets.py:26: x = (x + self.places(torch.arange(5))).transpose(1, 2)
    transpose   (root) (Net)                 [B, 4, 5]  dim 0          nets/nets.py:26: x = (x + self.places(torch.arange(5))).transpose(1, 2)
    add         blocks.0 (Block)             [B, 4, 5]  dim 0          nets/nets.py:13: return x + torch.relu(self.norm(self.conv(x)))
    conv1d      blocks.1.conv (Conv1d)       [B, 4, 5]  dim 0          nets/nets.py:13: return x + torch.relu(self.norm(self.conv(x)))
->  batch_norm  blocks.1.norm (BatchNorm1d)  [B, 4, 5]  samples mixed  nets/nets.py:13: return x + torch.relu(self.norm(self.conv(x)))
""",
        )


def proven(function: Any, *inputs: Tensor, batched: Any = None, **more: Any) -> Proof:
    return prove(Apply(function, **more), inputs, batched=batched)


def refused(proof: Proof) -> str:
    with pytest.raises(DPCompileError) as caught:
        proof.conclude()
    return chains_text(proof.program, proof.tracked, caught.value.findings)


def steps(chain: str) -> list[str]:
    """The first words of the lines of a chain: its ops."""
    return [line.removeprefix("->").split()[0] for line in chain.splitlines()[2:]]


X = torch.randn(3, 5, 4)


def test_a_module_that_is_called_twice_shows_each_thing_that_it_gives() -> None:
    proof = proven(lambda m, x: m.f(x).sum(1) + m.f(x[:, 0]), X, modules={"f": nn.Linear(4, 4)})
    rows = [line.split() for line in proof_text(proof.program, proof.tracked).splitlines()]
    at = next(i for i, row in enumerate(rows) if row[:2] == ["f", "Linear"])
    assert rows[at][2:] == ["[B,", "5,", "4]", "dim", "0"]
    assert rows[at + 1] == ["[B,", "4]", "dim", "0"]


def test_what_is_used_inside_a_module_alone_is_not_shown() -> None:
    proof = proven(lambda m, x: m.f(x), X, modules={"f": nn.LSTM(4, 3)}, batched=[1])
    text = proof_text(proof.program, proof.tracked)
    rows = [line.split("LSTM")[-1].split() for line in text.splitlines()]
    assert rows[-2:] == [["[3,", "B,", "3]", "dim", "1"], ["[1,", "B,", "3]", "dim", "1"]]  # outputs and states
    assert "[B, 12]" not in text  # the gates


def test_constants_and_inputs_without_a_batch_are_named() -> None:
    proof = proven(
        lambda m, x, y: m.w * x + m.f(y), X, torch.randn(1, 5, 4), batched=[0, None], modules={"f": nn.ReLU()}, w=(4,)
    )
    text = proof_text(proof.program, proof.tracked)
    assert [line.split("  ")[-1].strip() for line in text.splitlines() if "[1, 5, 4]" in line] == ["none: constant"] * 2


def test_the_shortest_way_is_shown() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = x.tanh().sin().cos() @ m.w
        return (x + y) - (x + y).mean(0)

    assert steps(refused(proven(run, X, w=(4, 4)))) == ["input", "add", "mean", "sub"]


def test_every_offender_has_a_way_from_the_input() -> None:
    proof = proven(lambda m, x: (x @ m.w).softmax(0).tanh().cumsum(0), X, w=(4, 4))
    first, second = refused(proof).split("\n\n")
    assert steps(first) == ["input", "matmul", "softmax"]
    assert steps(second) == ["input", "matmul", "softmax", "tanh", "cumsum"]
    assert first.splitlines()[-1].startswith("->  softmax")
    assert second.splitlines()[-1].startswith("->  cumsum")


def test_two_offenders_on_one_line_are_told_apart() -> None:
    proof = proven(lambda m, x, y: x @ m.w - x.tanh().mean(0) - y.mean(0), X, X, w=(4, 4))
    first, second = refused(proof).split("\n\n")
    assert steps(first) == ["input", "tanh", "mean", "sub"]
    assert steps(second) == ["input", "mean", "sub"]
    assert "input `*1`" in second


def test_the_batch_size_as_a_number_is_reached_through_the_batch() -> None:
    assert steps(refused(proven(lambda m, x: x @ m.w * x.shape[0], X, w=(4, 4)))) == ["input", "matmul", "mul"]
    through_the_size = refused(proven(lambda m, x: (x @ m.w, m.w * x.shape[0]), X, w=(4, 4)))
    assert steps(through_the_size) == ["input", "sym_size", "mul"]


def test_an_output_without_samples_is_reached_from_its_parameter() -> None:
    chain = refused(proven(lambda m, x: (x @ m.w, m.w.exp()), X, w=(4, 4)))
    assert "from parameter `w` to exp" in chain
    assert steps(chain) == ["parameter", "exp"]


def test_a_use_without_a_site_rule_is_shown_too() -> None:
    proof = proven(lambda m, ids: F.embedding(ids, m.w, scale_grad_by_freq=True), torch.randint(4, (3, 2)), w=(4, 4))
    assert steps(refused(proof))[-1] == "embedding"
    assert "none: made from parameters alone" not in proof_text(proof.program, proof.tracked)


def test_repeated_layers_are_folded_only_where_they_agree() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for i, pair in enumerate(self.a):
                x = pair[1](pair[0](x).tanh())
                x = x.flatten(0, 1).unflatten(0, (-1, 5)) if i else x[:, :5]
            return x

    proof = prove(Layers(), torch.randn(3, 6, 4))
    rows = [line.split()[0] for line in proof_text(proof.program, proof.tracked).splitlines() if "Linear" in line]
    assert rows == ["a.0.{0-1}", "a.{1-2}.{0-1}"]

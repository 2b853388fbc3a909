"""Every model of the zoo, against one sample at a time in float64: norms, clipped gradients, any batch size."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest
import torch
from oracle import (
    RTOL,
    assert_close,
    assert_same_gradients,
    check_against_autograd,
    check_against_oracle,
    gradients,
    per_sample_gradients,
    splitting_norm,
)
from torch import nn
from zoo import CASES, SAMPLE_BATCH, Case, call

from dpcompile import dpcompile

BATCH_SIZES = (SAMPLE_BATCH, 1, SAMPLE_BATCH + 1, 0)
HAS_CPP_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))  # inductor needs one on a CPU


@dataclass(frozen=True)
class Setting:
    """One way to compile. Every norm method meets both types; the reductions and forms are spread over them."""

    norm_method: str
    dtype: torch.dtype
    loss_reduction: str
    fused: bool = False

    def __str__(self) -> str:
        form = "fused" if self.fused else "split"
        return f"{self.norm_method}-{str(self.dtype).removeprefix('torch.')}-{self.loss_reduction}-{form}"

    def compile(self, case: Case, max_grad_norm: float) -> nn.Module:
        loss = {"loss_fn": case.loss, "sample_targets": case.sample_targets} if self.fused else {}
        return dpcompile(
            case.model,
            case.sample_input,
            max_grad_norm=max_grad_norm,
            norm_method=self.norm_method,
            loss_reduction=self.loss_reduction,
            **loss,
        )


SETTINGS = (
    Setting("ghost", torch.float32, "mean"),
    Setting("explicit", torch.float32, "sum"),
    Setting("auto", torch.float32, "mean"),
    Setting("ghost", torch.float64, "sum"),
    Setting("explicit", torch.float64, "mean"),
    Setting("auto", torch.float64, "sum", fused=True),
)

every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_clipped_gradients_equal_one_sample_at_a_time(name: str, setting: Setting, subtests: pytest.Subtests) -> None:
    case = CASES[name]().to(setting.dtype)
    max_grad_norm = splitting_norm(case, SAMPLE_BATCH)
    dp_model = setting.compile(case, max_grad_norm)
    for batch_size in BATCH_SIZES:
        with subtests.test(batch_size=batch_size):
            check_against_oracle(
                case,
                dp_model,
                batch_size,
                max_grad_norm=max_grad_norm,
                loss_reduction=setting.loss_reduction,
                fused=setting.fused,
            )


@every_case
def test_without_clipping_equals_plain_autograd(name: str) -> None:
    case = CASES[name]()
    dp_model = Setting("auto", torch.float32, "mean").compile(case, float("inf"))
    check_against_autograd(case, dp_model, SAMPLE_BATCH + 1)


@pytest.mark.parametrize(
    ("name", "fused", "backend"),
    [
        ("gpt2", False, "aot_eager"),
        ("gpt2", True, "inductor"),
        ("resnet18", False, "inductor"),
        ("lstm", False, "inductor"),
    ],
)
def test_torch_compile_takes_the_whole_graph(name: str, fused: bool, backend: str) -> None:
    case = CASES[name]()
    max_grad_norm = splitting_norm(case, SAMPLE_BATCH)
    dp_model = Setting("auto", torch.float32, "mean", fused).compile(case, max_grad_norm)
    torch._dynamo.reset()
    compiled = torch.compile(dp_model, fullgraph=True, backend=backend if HAS_CPP_COMPILER else "aot_eager")
    check_against_oracle(case, compiled, SAMPLE_BATCH, max_grad_norm=max_grad_norm, fused=fused)


@every_case
def test_the_oracle_adds_up_to_plain_autograd(name: str) -> None:
    """The zoo is deterministic and keeps samples apart: the oracle's sum is the gradient of the summed loss."""
    case = CASES[name]()
    inputs, targets = case.batch(SAMPLE_BATCH)
    truth = per_sample_gradients(case.model, case.loss, inputs, targets)
    case.loss(call(case.model, inputs), targets).sum().backward()
    assert_same_gradients(gradients(case.model), truth.clipped_sum(float("inf")), RTOL[torch.float32])

    bound = truth.splitting_norm()
    assert truth.norms.min() < bound < truth.norms.max()


def test_the_oracle_clips_to_the_bound() -> None:
    case = CASES["lstm"]()
    inputs, targets = case.batch(1)
    truth = per_sample_gradients(case.model, case.loss, inputs, targets)
    bound = 0.5 * truth.norms.item()
    clipped = truth.clipped_sum(bound)
    assert_close(sum(g.square().sum() for g in clipped.values()).sqrt(), torch.tensor(bound), 1e-7, "norm")

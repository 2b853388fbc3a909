"""Every model of the zoo, against one sample at a time in float64: norms, clipped gradients, any batch size."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from oracle import (
    RTOL,
    arithmetic_of,
    assert_close,
    assert_same_gradients,
    check_against_autograd,
    check_against_oracle,
    gradients,
    per_sample_gradients,
    splitting_norm,
)
from zoo import CASES, SAMPLE_BATCH, Case, call

from dpcompile import DPModule, dpcompile
from dpcompile.api import prove

# Run by default; the rest with -m slow, as the likes of others; float64 is the stricter type.
LIKE_OTHERS = ("bart", "roberta", "albert", "vgg19", "lora_merged", "lora_peft", "t5", "beit", "llama")
LIKE_OTHERS += ("transformer_encoder", "resnet18", "vit")
IN_FLOAT64 = tuple(name for name in CASES if name not in LIKE_OTHERS)
IN_FLOAT32 = ("lstm",)
FUSED = ("gpt2",)
BATCH_SIZES = (SAMPLE_BATCH, 1, SAMPLE_BATCH + 1, 0)
HAS_CPP_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))  # inductor needs one on a CPU


METHODS = (("ghost", "mean"), ("explicit", "sum"), ("auto", "mean"))  # with the loss's reduction


every_case = pytest.mark.parametrize("name", CASES)


in_both_types = [
    pytest.param(name, dtype, marks=() if name in default else pytest.mark.slow)
    for dtype, default in ((torch.float64, IN_FLOAT64), (torch.float32, IN_FLOAT32))
    for name in CASES
]


@pytest.mark.parametrize(("name", "dtype"), in_both_types)
def test_clipped_gradients_equal_one_sample_at_a_time(name: str, dtype: torch.dtype, subtests: pytest.Subtests) -> None:
    """Every norm method on one analysis of the model, at every batch size; and without clipping, plain autograd."""
    case = CASES[name]().to(dtype)
    with arithmetic_of(dtype):
        bound = splitting_norm(case, SAMPLE_BATCH)
        analysis = prove(case.model, case.sample_input).conclude()
        for method, reduction in METHODS:
            emitted = analysis.emit(analysis.plan(method), mean=reduction == "mean")
            dp_model = DPModule(case.model, emitted)
            dp_model.max_grad_norm = bound
            for batch_size in BATCH_SIZES:
                with subtests.test(method=method, batch_size=batch_size):
                    check_against_oracle(case, dp_model, batch_size, max_grad_norm=bound, loss_reduction=reduction)
            with subtests.test(method=method, max_grad_norm="inf"):
                unbounded = DPModule(case.model, emitted)
                unbounded.max_grad_norm = math.inf
                check_against_autograd(case, unbounded, SAMPLE_BATCH + 1, loss_reduction=reduction)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FUSED else pytest.mark.slow) for name in CASES]
)
def test_the_fused_form_equals_one_sample_at_a_time(name: str, subtests: pytest.Subtests) -> None:
    case = CASES[name]().to(torch.float64)
    with arithmetic_of(torch.float64):
        bound = splitting_norm(case, SAMPLE_BATCH)
        dp_model = compiled_case(case, bound, fused=True, loss_reduction="sum")
        for batch_size in BATCH_SIZES:
            with subtests.test(batch_size=batch_size):
                check_against_oracle(case, dp_model, batch_size, max_grad_norm=bound, loss_reduction="sum", fused=True)


def compiled_case(case: Case, max_grad_norm: float, *, fused: bool, loss_reduction: str = "mean") -> DPModule:
    loss = {"loss_fn": case.loss, "sample_targets": case.sample_targets} if fused else {}
    return dpcompile(case.model, case.sample_input, max_grad_norm=max_grad_norm, loss_reduction=loss_reduction, **loss)


@pytest.mark.parametrize(
    ("name", "fused", "backend"),
    [
        pytest.param("gpt2", True, "aot_eager", marks=pytest.mark.slow),
        pytest.param("resnet18", False, "aot_eager", marks=pytest.mark.slow),
        pytest.param("lstm", False, "aot_eager", marks=pytest.mark.slow),
        pytest.param("lstm", False, "inductor", marks=pytest.mark.slow),
        pytest.param("resnet18", False, "inductor", marks=pytest.mark.slow),
        pytest.param("gpt2", True, "inductor", marks=pytest.mark.slow),
    ],
)
def test_torch_compile_takes_the_whole_graph(name: str, fused: bool, backend: str) -> None:
    case = CASES[name]()
    max_grad_norm = splitting_norm(case, SAMPLE_BATCH)
    dp_model = compiled_case(case, max_grad_norm, fused=fused)
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

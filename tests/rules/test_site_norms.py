"""Affine values of normalisation layers, with and without bias; batch norm in eval mode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from layers import EVERY, Apply, check_module, folded_loss, loss_at
from selection import every
from torch import nn


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    shape=st.lists(st.integers(2, 3), min_size=1, max_size=2),
    bias=st.booleans(),
)
def test_layer_norm_over_any_dimensions(lead: list[int], shape: list[int], bias: bool) -> None:
    found = check_module(nn.LayerNorm(shape, bias=bias), torch.randn(3, *lead, *shape))
    assert set(found.rules.values()) == {"layer-norm"}


LAYERS = {
    "group norm": (nn.GroupNorm(2, 4), (4, 3, 2)),
    "group norm of vectors": (nn.GroupNorm(2, 6), (6,)),
    "instance norm 1d": (nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "instance norm 2d": (nn.InstanceNorm2d(3, affine=True), (3, 4, 2)),
    "instance norm 3d": (nn.InstanceNorm3d(2, affine=True), (2, 3, 2, 2)),
    "rms norm": (nn.RMSNorm(4), (3, 4)),
    "rms norm over two dimensions": (nn.RMSNorm((2, 4), eps=1e-3), (3, 2, 4)),
    "local response norm behind a scale": (
        Apply(lambda m, x: nn.functional.local_response_norm(x * m.w, 2), w=(4, 1)),
        (4, 5),
    ),
}


@pytest.mark.parametrize("name", every(2, LAYERS))
def test_affine_normalisation(name: str) -> None:
    module, shape = LAYERS[name]
    found = check_module(module, torch.randn(3, *shape))
    assert "fallback" not in found.rules.values()


@pytest.mark.parametrize("affine", ["weight", "bias"])
def test_group_norm_with_one_of_both_trainable(affine: str) -> None:
    module = nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4))
    module[1].get_parameter(affine).requires_grad_(False)
    check_module(module, torch.randn(3, 2, 4))


@pytest.mark.parametrize("affine", ["weight", "bias"])
def test_layer_norm_with_one_of_both_trainable(affine: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module[1].get_parameter(affine).requires_grad_(False)
    check_module(module, torch.randn(3, 2, 3))


class EvalBatchNorm(nn.Module):
    """Batch norm that stays in eval mode when the model trains, as for fine-tuning."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        generator = torch.Generator().manual_seed(0)
        for name, buffer in norm.named_buffers():
            if name.startswith("running"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)

    def train(self, mode: bool = True) -> EvalBatchNorm:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), (3,)),
        (nn.BatchNorm1d(3), (3, 4)),
        (nn.BatchNorm2d(2), (2, 3, 3)),
        (nn.BatchNorm3d(2, affine=False), (2, 2, 2, 2)),
    ],
)
def test_batch_norm_in_eval_mode(norm: nn.Module, shape: tuple[int, ...]) -> None:
    front = nn.Conv1d(shape[0], shape[0], 1) if len(shape) == 2 else nn.Identity()
    module = nn.Sequential(front, EvalBatchNorm(norm).train(), Apply(lambda m, x: x * m.scale, scale=(1,)))
    check_module(module, torch.randn(3, *shape))


def test_layer_norm_of_folded_rows() -> None:
    module = Apply(lambda m, x: m.norm(x.flatten(0, 1)), modules={"norm": nn.LayerNorm(4)})
    check_module(module, torch.randn(3, 5, 4), loss=folded_loss(5))


def test_group_norm_of_folded_frames() -> None:
    module = Apply(lambda m, x: m.norm(x.flatten(0, 1)), modules={"norm": nn.GroupNorm(2, 4)})
    check_module(module, torch.randn(3, 2, 4, 3), loss=folded_loss(2))


def test_layer_norm_with_the_batch_at_dim_one() -> None:
    check_module(nn.LayerNorm(4), torch.randn(2, 3, 4), batched={"input": 1}, loss=loss_at(1))


def test_weight_shifted_by_one() -> None:
    """Gemma's RMSNorm multiplies by 1 + weight."""

    def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + m.w)

    check_module(Apply(run, w=(4,)), torch.randn(3, 2, 4))


few = settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])


@few
@given(
    groups=st.integers(1, 3),
    depth=st.integers(1, 3),
    space=st.lists(st.integers(1, 3), max_size=3),
    eps=st.sampled_from((1e-5, 0.5)),
    frozen=st.sampled_from(("", "weight", "bias")),
)
def test_group_norm_with_any_arguments(groups: int, depth: int, space: list[int], eps: float, frozen: str) -> None:
    module = nn.GroupNorm(groups, groups * depth, eps=eps)
    if frozen:
        module.get_parameter(frozen).requires_grad_(False)
    sample = torch.randn(3, groups * depth, *space)
    if depth * sample[0, 0].numel() == 1:
        sample = sample.unsqueeze(-1).expand(*sample.shape, 2).contiguous()
    check_module(module, sample, batch_sizes=(3, 0), methods=EVERY)


@few
@given(
    lead=st.lists(st.integers(1, 2), max_size=2),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    eps=st.sampled_from((1e-5, 0.5, None)),
    affine=st.sampled_from(("both", "weight", "bias frozen", "weight frozen", "rms")),
)
def test_layer_and_rms_norm_with_any_arguments(
    lead: list[int], shape: list[int], eps: float | None, affine: str
) -> None:
    if affine == "rms":
        module: nn.Module = nn.RMSNorm(shape, eps=eps)
    else:
        module = nn.LayerNorm(shape, eps=eps or 1e-3, bias=affine != "weight")
    if "frozen" in affine:
        module.get_parameter(affine.removesuffix(" frozen")).requires_grad_(False)
    check_module(module, torch.randn(3, *lead, *shape), batch_sizes=(3, 0), methods=EVERY)


@few
@given(
    channels=st.integers(1, 3),
    space=st.lists(st.integers(2, 3), min_size=1, max_size=3),
    eps=st.sampled_from((1e-5, 0.5)),
    frozen=st.sampled_from(("", "weight", "bias")),
)
def test_instance_norm_with_any_arguments(channels: int, space: list[int], eps: float, frozen: str) -> None:
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    module = kinds[len(space) - 1](channels, eps=eps, affine=True)
    if frozen:
        module.get_parameter(frozen).requires_grad_(False)
    check_module(module, torch.randn(3, channels, *space), batch_sizes=(3, 0), methods=EVERY)


@pytest.mark.parametrize("affine", ["weight", "bias", "both"])
def test_functional_batch_norm_by_statistics(affine: str) -> None:
    """Given statistics, with either affine value or both."""
    names = {"weight": "w", "bias": "b", "both": "wb"}[affine]

    def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (getattr(m, name) if name in names else None for name in "wb")
        return nn.functional.batch_norm(x, m.mean, m.var, weight, bias, False, eps=0.1)

    module = Apply(run, **dict.fromkeys(names, (3,)))
    module.register_buffer("mean", torch.tensor([0.1, -0.2, 0.3]))
    module.register_buffer("var", torch.tensor([0.5, 1.5, 1.0]))
    check_module(module, torch.randn(3, 3, 2), methods=EVERY)

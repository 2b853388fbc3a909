"""`fix`: layers in which samples meet are exchanged for those that dpcompile accepts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from oracle import check_against_autograd, check_against_oracle, splitting_norm
from torch import Tensor, nn
from torch.nn.utils import prune
from typer.testing import CliRunner
from zoo import Case, images, labels

from dpcompile import DPCompileError, dpcompile, fix
from dpcompile.api import prove
from dpcompile.cli import app

NORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (nn.BatchNorm1d, (3, 16, 5)),
    "BatchNorm2d": (nn.BatchNorm2d, (3, 16, 4, 4)),
    "BatchNorm3d": (nn.BatchNorm3d, (3, 16, 2, 3, 4)),
}


def samples_stay_apart(model: nn.Module) -> bool:
    return not prove(model, torch.randn(2, 3, 4, 4)).tracked.findings


def resnet_case() -> Case:
    """The ResNet of Hugging Face, its BatchNorm fixed."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16], depths=[1], layer_type="basic", num_labels=5
    )
    torch.manual_seed(0)
    model, changes = fix(transformers.ResNetForImageClassification(config).train())
    assert len(changes) == 4

    def loss(out: transformers.modeling_outputs.ImageClassifierOutputWithNoAttention, targets: Tensor) -> Tensor:
        return F.cross_entropy(out.logits, targets, reduction="none")

    return Case("resnet", model, images(16), labels, loss)


def test_a_resnet_of_hugging_face_is_fixed_and_then_exact() -> None:
    case = resnet_case()
    bound = splitting_norm(case, 4)
    dp_model = dpcompile(case.model, case.sample_input, max_grad_norm=bound)
    check_against_oracle(case, dp_model, 4, max_grad_norm=bound)
    dp_model.max_grad_norm = float("inf")
    check_against_autograd(case, dp_model, 4)


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_becomes_group_norm_with_the_same_parameters(name: str) -> None:
    make, shape = NORMS[name]
    norm = make(16, eps=1e-3, dtype=torch.float64).eval()
    norm.bias.requires_grad_(False)
    weight, bias = norm.weight, norm.bias
    nn.init.normal_(weight)
    fixed, changes = fix(norm)
    assert type(fixed) is nn.GroupNorm
    assert fixed.weight is weight
    assert fixed.bias is bias
    assert (fixed.weight.requires_grad, fixed.bias.requires_grad) == (True, False)
    assert (fixed.eps, fixed.affine, fixed.training) == (1e-3, True, False)
    assert not list(fixed.buffers())
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(fixed(x), F.group_norm(x, fixed.num_groups, weight, bias, 1e-3))
    (change,) = changes
    assert (change.path, change.after) == ("(root)", repr(fixed))
    assert str(change).startswith(f"(root): {name}(16, eps=0.001, ")


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_what_has_no_weight_or_bias_gets_none(options: dict[str, bool]) -> None:
    fixed, _ = fix(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, **options)))
    assert fixed[1].bias is None
    assert (fixed[1].weight is None) == ("affine" in options)
    assert samples_stay_apart(fixed)


@pytest.mark.parametrize(
    ("kind", "channels", "groups"),
    [
        (nn.BatchNorm2d, 64, 16),
        (nn.BatchNorm2d, 128, 32),
        (nn.BatchNorm2d, 2048, 32),
        (nn.BatchNorm2d, 1, 1),
        (nn.BatchNorm2d, 7, 1),
        (nn.BatchNorm2d, 37, 1),
        (nn.BatchNorm2d, 24, 6),
        (nn.BatchNorm2d, 130, 26),
        (nn.SyncBatchNorm, 16, 4),
        (nn.BatchNorm1d, 16, 2),
        (nn.BatchNorm1d, 6, 1),
    ],
)
def test_groups_divide_the_channels_and_are_no_smaller_than_they_should(
    kind: type[nn.Module], channels: int, groups: int
) -> None:
    fixed, _ = fix(kind(channels))
    assert (fixed.num_groups, fixed.num_channels) == (groups, channels)


def test_a_layer_of_features_without_positions_still_tells_samples_apart() -> None:
    fixed, _ = fix(nn.BatchNorm1d(32))
    out = fixed(torch.randn(5, 32))
    assert out.abs().unique().numel() > 32  # neither zero nor signs alone


def test_a_layer_at_two_places_stays_one_layer() -> None:
    norm = nn.BatchNorm2d(4)
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), norm)
    model = nn.ModuleDict({"a": norm, "b": inner, "c": inner})
    fixed, changes = fix(model)
    assert fixed is model
    assert fixed["a"] is fixed["b"][1]
    assert fixed["b"] is fixed["c"]
    assert isinstance(fixed["a"], nn.GroupNorm)
    assert [change.path for change in changes] == ["a"]


def test_parameters_shared_by_two_layers_stay_shared() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    fix(model)
    assert model[0] is not model[1]
    assert model[0].weight is model[1].weight


def test_an_optimizer_made_before_trains_the_fixed_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = [name for name, _ in model.named_parameters()]
    fixed, _ = fix(model)
    assert [name for name, _ in fixed.named_parameters()] == names
    before = fixed[1].weight.detach().clone()
    fixed(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(fixed[1].weight, before)


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_goes_on_without_running_statistics(affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=affine, track_running_stats=True))
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    fixed, changes = fix(model)
    torch.testing.assert_close(fixed(x), expected)
    torch.testing.assert_close(fixed.eval()(x), expected)
    assert not list(fixed.buffers())
    assert [change.path for change in changes] == ["1"]
    assert "track_running_stats=True" in changes[0].before
    assert "track_running_stats=False" in changes[0].after
    assert samples_stay_apart(fixed)


def test_a_model_without_such_layers_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4), nn.LayerNorm(4))
    before = list(model.modules())
    fixed, changes = fix(model)
    assert fixed is model
    assert changes == []
    assert all(a is b for a, b in zip(before, fixed.modules(), strict=True))


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_statistics_of_a_model_in_training_are_kept(affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=affine), nn.BatchNorm2d(4))
    model[1].eval()
    kept = model[1]
    fixed, changes = fix(model)
    assert [change.path for change in changes] == ["2"]
    assert fixed[1] is kept
    assert samples_stay_apart(fixed)
    assert [change.path for change in fix(model.eval())[1]] == ["1"]  # nothing trains: it was not singled out


def test_eval_mode_without_statistics_is_no_freezing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False).eval())
    assert not samples_stay_apart(model)
    assert [change.path for change in fix(model)[1]] == ["1"]
    assert samples_stay_apart(model)


def test_a_forward_of_its_own_is_not_replaced() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    class Named(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Activated(4), Named(4))
    assert [change.path for change in fix(model)[1]] == ["1"]
    assert type(model[0]) is Activated


def test_a_layer_of_two_features_is_not_replaced_by_their_signs() -> None:
    assert fix(nn.BatchNorm1d(2))[1] == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: m.append(nn.LazyBatchNorm1d()), r"`2` \(LazyBatchNorm1d\) is not initialised"),
        (lambda m: m.append(nn.LazyBatchNorm2d(affine=False)), "not initialised"),
        (lambda m: m.append(nn.LazyInstanceNorm2d()), "not initialised"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[1], dim=None), "parametrizations"),
        (lambda m: prune.identity(m[1], "weight"), "hooks"),
        (lambda m: m[1].register_forward_hook(lambda *_: None), "hooks"),
    ],
)
def test_a_refusal_changes_nothing(spoil: Callable[[nn.Sequential], object], said: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    spoil(model)
    before = list(model.modules())
    with pytest.raises(DPCompileError, match=said):
        fix(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_a_compiled_model_is_refused() -> None:
    dp_model = dpcompile(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(DPCompileError, match="Fix the model first"):
        fix(dp_model)


MODELS = """
import torch
from torch import nn

def normed():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 2))
    return net, torch.randn(2, 3, 4, 4)

class Centred(nn.Sequential):
    def forward(self, x):
        return super().forward(x - x.mean(0))

def centred():
    return Centred(*normed()[0]), torch.randn(2, 3, 4, 4)

def plain():
    return nn.Linear(4, 2), torch.randn(3, 4)
"""


@pytest.mark.parametrize(
    ("name", "code", "first", "last"),
    [
        ("normed", 0, "1: BatchNorm2d(8, ", "supported: Sequential, 6 sites"),
        ("centred", 1, "1: BatchNorm2d(8, ", "  cure: "),
        ("plain", 0, "nothing to fix", "supported: Linear"),
    ],
)
def test_check_prints_what_it_fixed_and_checks_that(
    name: str, code: int, first: str, last: str, tmp_path: Path
) -> None:
    (tmp_path / "models_to_fix.py").write_text(MODELS)
    result = CliRunner().invoke(app, ["check", f"{tmp_path}/models_to_fix.py:{name}", "--fix"])
    assert result.exit_code == code, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith(first)
    assert last in lines[-1]
    if name == "normed":
        assert lines[0].endswith("-> GroupNorm(2, 8, eps=1e-05, affine=True, bias=True)")
        assert len(lines) == 2

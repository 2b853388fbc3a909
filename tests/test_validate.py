"""The probe at compile time: it finds a wrong rule, passes right graphs, and leaves no trace."""

from __future__ import annotations

import copy
import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from selection import every
from torch import Tensor, nn

from dpcompile import DPCompileError, dpcompile, forms
from dpcompile.errors import InvalidGraphError
from dpcompile.forms import Outer
from dpcompile.rules.sites.contraction import Contraction

validate = importlib.import_module("dpcompile.validate")

X = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
COMPARED = validate.COMPARED


class Counting(nn.Module):
    """Draws random numbers, counts its calls, and has a part that stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
        self.norm = nn.BatchNorm1d(6).eval()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(self.norm(x))


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets, reduction="none").mean((1, 2))


@pytest.mark.parametrize(
    ("views", "reduction", "fused"), every(3, itertools.product((1, 2), ("mean", "sum"), (False, True)))
)
def test_a_right_graph_passes(views: int, reduction: str, fused: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    options = {"loss_fn": mean_loss, "sample_targets": torch.randn(4, 6, 3)} if fused else {"loss_reduction": reduction}
    assert dpcompile(model, X, views=views, **options).validated == COMPARED


def test_nothing_is_left_behind() -> None:
    model = Counting()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    dp_model = dpcompile(model, X)
    assert dp_model.validated == COMPARED
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.norm.training
    assert all(p.grad is None for p in model.parameters())
    assert dp_model.nonfinite_samples == 0
    with pytest.raises(DPCompileError, match="no backward yet"):
        _ = dp_model.per_sample_norms


def test_a_gradient_of_zero_is_no_mismatch() -> None:
    class Constant(nn.PReLU):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            y = super().forward(x)
            return y - y

    assert dpcompile(Constant(), X).validated == COMPARED


def test_a_gradient_that_is_rounding_alone_is_compared_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over a layer norm is zero: in float32 two ways of computing its gradient need not share a digit."""

    class Cancelling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return F.layer_norm(super().forward(x), (64,)).sum(-1)

    torch.manual_seed(0)
    model, honest = Cancelling(5, 64), validate._found
    monkeypatch.setattr(validate, "_found", lambda *given: 2 * honest(*given))
    assert dpcompile(model, X).validated == COMPARED
    with monkeypatch.context() as patch:
        patch.setattr(validate, "VANISHED", 0.0)
        with pytest.raises(InvalidGraphError, match="disagree"):
            dpcompile(model, X)
    with pytest.raises(InvalidGraphError, match="disagree"):
        dpcompile(nn.Linear(5, 64), X)


def test_norms_of_which_the_bound_on_rounding_is_most_are_compared_without_it() -> None:
    """Rows that cancel to a thousandth; ids leave no other data to try."""

    class Cancelling(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            rows = super().forward(ids.repeat_interleave(500, 1))
            signs = torch.ones(rows.shape[1]).index_fill(0, torch.arange(1, rows.shape[1], 2), -1.0)
            return torch.einsum("btd,t->b", rows, signs) + 1e-3 * rows.sum((1, 2))

    ids = torch.tensor([[0, 1], [1, 2]])
    dp_model = dpcompile(Cancelling(3, 4), ids, norm_method="ghost")
    assert dp_model.validated == COMPARED
    with pytest.raises(InvalidGraphError, match="disagree"):
        validate.check_step(dp_model, [ids], None)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_buffer_that_every_call_moves_is_the_same_for_both(dropout: float) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.dropout = nn.Linear(5, 3), nn.Dropout(dropout)
            self.register_buffer("scale", torch.ones(3))
            self.scale: Tensor

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.scale.mul_(2)
            return self.dropout(self.inner(x)) * self.scale.clone()

    assert dpcompile(Scaled(), X).validated == COMPARED


def test_a_model_in_eval_mode_stays_there() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    assert dpcompile(model, X).validated == COMPARED
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("size", [0, 1])
def test_small_samples(size: int) -> None:
    validated = dpcompile(nn.Linear(5, 2), X[:size]).validated
    assert validated == ("nothing: the sample is empty" if size == 0 else COMPARED)


def test_a_model_that_takes_no_single_sample_is_not_compared() -> None:
    class Picky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            if not torch.compiler.is_exporting() and x.shape[0] == 1:
                raise ValueError("more than one, please")
            return super().forward(x)

    assert dpcompile(Picky(5, 2), X).validated.startswith("nothing: the model fails on one sample alone (ValueError")


@pytest.mark.parametrize("factor", [0.9, pytest.param(1.2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fused", [False, True])
def test_a_wrong_rule_is_found(factor: float, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Contraction.form

    def wrong(self: Contraction, call: object, slot: str) -> object:
        form = right(self, call, slot)  # type: ignore[arg-type]

        def scaled(*tensors: Tensor) -> object:
            made = form(*tensors)
            return Outer(factor * made.rows_BGTp, *list(vars(made).values())[1:]) if isinstance(made, Outer) else made

        return scaled

    monkeypatch.setattr(Contraction, "form", wrong)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    options = {"loss_fn": mean_loss, "sample_targets": torch.randn(4, 6, 3)} if fused else {}
    with pytest.raises(InvalidGraphError, match=r"(?s)per-sample norms are.*report it.*float32\[4, 6, 5\].*0.weight: "):
        dpcompile(model, X, **options)
    assert dpcompile(model, X, validate="off", **options).validated == "nothing: it was not asked for"


@pytest.mark.parametrize("groups", ["flat", "per-layer"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_wrong_sum_of_right_norms_is_found(groups: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that get each other's weight."""
    right = forms._scaled
    monkeypatch.setattr(forms, "_scaled", lambda factor, weight: right(factor, weight.flip(0)))
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    options = {"loss_fn": mean_loss, "sample_targets": torch.randn(4, 6, 3)} if fused else {}
    options |= {"norm_method": "ghost", "clip_groups": groups, "max_grad_norm": 1e-3}
    with pytest.raises(InvalidGraphError, match=r"(?s)disagree: the clipped sum of 0.weight is not.*report it"):
        dpcompile(model, X, **options)


def test_an_unknown_validation_is_refused() -> None:
    with pytest.raises(ValueError, match="validate='twice'"):
        dpcompile(nn.Linear(5, 2), X, validate="twice")


# ---------------------------------------------------------------- samples that are not finite


@pytest.mark.parametrize(
    ("method", "compiled"), every(2, [("ghost", False), ("explicit", False), ("auto", True), ("auto", False)])
)
def test_a_sample_that_is_not_finite_adds_nothing(method: str, compiled: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))
    dp_model = dpcompile(model, X, norm_method=method, max_grad_norm=0.1)
    run = torch.compile(dp_model, backend="aot_eager", fullgraph=True) if compiled else dp_model
    for value in (float("nan"), float("inf")):
        bad = X.clone()
        bad[2, 1, 3] = value
        counted = dp_model.nonfinite_samples
        with_it = gradients(dp_model, run, bad)
        assert dp_model.nonfinite_samples == counted + 1
        without = gradients(dp_model, run, X[[0, 1, 3]])
        for a, b in zip(with_it, without, strict=True):
            torch.testing.assert_close(4 * a, 3 * b)


def gradients(dp_model: nn.Module, run: nn.Module, x: Tensor) -> list[Tensor]:
    dp_model.zero_grad()
    run(x).square().mean((1, 2)).mean().backward()
    return [p.grad.clone() for p in dp_model.parameters() if p.grad is not None]


def test_a_sample_that_is_not_finite_can_stop_the_backward() -> None:
    dp_model = dpcompile(nn.Linear(5, 2), X, nonfinite="raise")
    bad = X.clone()
    bad[1] = float("nan")
    with pytest.raises(DPCompileError, match="1 of 4 samples have a gradient that is NaN"):
        gradients(dp_model, dp_model, bad)
    with pytest.raises(DPCompileError, match="1 of 4 samples"):
        gradients(copy.deepcopy(dp_model), copy.deepcopy(dp_model), bad)
    with pytest.raises(ValueError, match="nonfinite='ignore'"):
        dpcompile(nn.Linear(5, 2), X, nonfinite="ignore")


def test_fused_a_sample_that_is_not_finite_adds_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    y = torch.randn(4, 6, 3)
    dp_model = dpcompile(model, X, loss_fn=mean_loss, sample_targets=y, max_grad_norm=0.1, norm_method="ghost")
    bad = X.clone()
    bad[2] = float("inf")
    found = []
    for x, targets in ((bad, y), (X[[0, 1, 3]], y[[0, 1, 3]])):
        dp_model.zero_grad()
        dp_model(x, targets=targets).backward()
        found.append([p.grad.clone() for p in dp_model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(4 * a, 3 * b)

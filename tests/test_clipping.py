"""Clip functions, clip groups, sample weights and views, against one sample at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import PerSampleGradients, assert_close, assert_same_gradients, gradients, per_sample_gradients
from selection import every
from torch import Tensor, nn
from zoo import CASES, SAMPLE_BATCH, Case, call

from dpcompile import CaptureError, DPModule, dpcompile
from dpcompile.api import Analysis, prove
from dpcompile.clipping import FUNCTIONS, STABILITY, clipping_of, total_bound
from dpcompile.live_memory import peak_of
from dpcompile.shapes import B

R = 0.5
RTOL = 1e-4
TRUE_FACTORS: dict[str, Callable[[float, float], float]] = {
    "abadi": lambda n, r: min(1.0, r / n),
    "auto-s": lambda n, r: r / (n + STABILITY),
    "auto-v": lambda n, r: r / n,
    "normalise": lambda n, r: r / n,
    "psac": lambda n, r: r / (n + STABILITY / (n + STABILITY)),
}


class Net(nn.Module):
    """A convolution, a tied pair, a derived weight and a class token: every space in which a norm is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.mix = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.head = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), self.mix(h)], 1)
        return self.head(self.head(h).tanh() * self.scale).mean(1)


def case() -> Case:
    torch.manual_seed(0)
    return Case(
        "net",
        Net(),
        lambda size, generator: torch.randn(size, 1, 5, 5, generator=generator),
        lambda size, generator: torch.randint(4, (size,), generator=generator),
        lambda out, y: F.cross_entropy(out, y, reduction="none"),
    )


def expected(truth: PerSampleGradients, dp_model: DPModule, function: str) -> dict[str, Tensor]:
    """Clipped sums of the oracle's gradients with the module's groups and bounds."""
    found: dict[str, Tensor] = {}
    for group in dp_model.clipping.groups:
        own = PerSampleGradients({name: truth.grads[name] for name in group.parameters})
        bound = dp_model.max_grad_norms[group.name]
        factors = torch.tensor([TRUE_FACTORS[function](n.item(), bound) for n in own.norms], dtype=torch.float64)
        found |= {name: torch.tensordot(factors, g, 1) for name, g in own.grads.items()}
    return {name: found[name] for name in truth.grads}


GROUPS: dict[str, object] = {
    "flat": "flat",
    "per-layer": "per-layer",
    "patterns": ["conv.*", "*bias", "*"],
    "bounds": {"head.*": 0.3, "*": None},
}


@pytest.fixture(scope="module")
def analysed() -> tuple[Case, Analysis]:
    net = case()
    return net, prove(net.model, net.sample_input).conclude()


COMBINATIONS = [(function, "flat", method) for function in FUNCTIONS for method in ("ghost", "explicit")] + [
    ("abadi", groups, method) for groups in GROUPS for method in ("ghost", "explicit", "auto")
]


@pytest.mark.parametrize(("function", "groups", "method"), every(4, COMBINATIONS))
def test_functions_and_groupings_match_the_oracle(
    analysed: tuple[Case, Analysis], function: str, groups: str, method: str
) -> None:
    net, analysis = analysed
    x, y = net.batch(4, seed=1)
    clipping = clipping_of(analysis.trainable, R, function, GROUPS[groups])  # type: ignore[arg-type]
    dp_model = DPModule(net.model, analysis.emit(analysis.plan(method), clipping))
    truth = per_sample_gradients(net.model, net.loss, x, y)

    net.model.zero_grad()
    net.loss(dp_model(x), y).mean().backward()

    wanted = {name: g / 4 for name, g in expected(truth, dp_model, function).items()}
    assert_same_gradients(gradients(net.model), wanted, RTOL)
    assert_close(dp_model.per_sample_norms, truth.norms, RTOL, "norms")
    for group in dp_model.clipping.groups:
        own = PerSampleGradients({name: truth.grads[name] for name in group.parameters})
        assert_close(dp_model.per_group_norms[group.name], own.norms, RTOL, group.name)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_per_layer_clipping_compiled_gives_the_eager_gradients(fused: bool) -> None:
    net = case()
    x, y = net.batch(4, seed=1)
    extra = {"loss_fn": net.loss, "sample_targets": net.sample_targets} if fused else {}
    dp_model = dpcompile(net.model, net.sample_input, max_grad_norm=R, clip_groups="per-layer", **extra)

    def step(module: nn.Module) -> dict[str, Tensor]:
        net.model.zero_grad()
        (module(x, targets=y) if fused else net.loss(module(x), y).mean()).backward()
        return {name: g.clone() for name, g in gradients(net.model).items()}

    eager, norms = step(dp_model), dp_model.per_group_norms
    compiled = step(torch.compile(dp_model, fullgraph=True, backend="aot_eager"))

    assert_same_gradients(compiled, eager, RTOL)
    for name, norm in dp_model.per_group_norms.items():
        assert_close(norm, norms[name], RTOL, name)


@pytest.mark.slow
def test_per_layer_clipping_keeps_no_more_than_plain_training() -> None:
    """Flat clipping books output gradients until the last norm; clipped inside the backward, nothing is booked."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)])
    x = torch.randn(16, 32, 64)

    def peak(module: nn.Module) -> int:
        def step() -> None:
            module(x).square().mean((1, 2)).mean().backward()

        step()
        model.zero_grad()
        return peak_of(step)

    plain = peak(model)
    flat = peak(dpcompile(model, x, norm_method="ghost"))
    per_layer = peak(dpcompile(model, x, norm_method="ghost", clip_groups="per-layer"))
    assert per_layer <= 1.02 * plain
    assert flat >= 1.3 * plain


@pytest.mark.slow
@pytest.mark.parametrize("groups", [pytest.param("flat", marks=pytest.mark.slow), "per-layer"])
def test_tied_weights_of_a_real_model_are_clipped_in_one_group(groups: str) -> None:
    gpt2 = CASES["gpt2"]()
    x, y = gpt2.batch(SAMPLE_BATCH)
    truth = per_sample_gradients(gpt2.model, gpt2.loss, x, y)
    dp_model = dpcompile(gpt2.model, gpt2.sample_input, max_grad_norm=R, clip_groups=groups)

    gpt2.model.zero_grad()
    gpt2.loss(call(dp_model, x), y).mean().backward()

    wanted = {name: g / SAMPLE_BATCH for name, g in expected(truth, dp_model, "abadi").items()}
    assert_same_gradients(gradients(gpt2.model), wanted, RTOL)


def test_infinite_bounds_in_every_layer_give_plain_gradients() -> None:
    net = case()
    x, y = net.batch(4)
    dp_model = dpcompile(net.model, net.sample_input, max_grad_norm=math.inf, clip_groups="per-layer")
    net.loss(net.model(x), y).mean().backward()
    plain = {name: g.clone() for name, g in gradients(net.model).items()}

    net.model.zero_grad()
    net.loss(dp_model(x), y).mean().backward()

    assert_same_gradients(gradients(net.model), plain, RTOL)


@pytest.mark.parametrize(("fused", "reduction"), every(3, itertools.product((False, True), ("mean", "sum"))))
def test_a_sample_of_weight_zero_leaves_no_trace_and_one_of_two_counts_twice(reduction: str, fused: bool) -> None:
    net = case()
    x, y = net.batch(4)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0])
    extra = {"loss_fn": net.loss, "sample_targets": net.sample_targets} if fused else {}
    dp_model = dpcompile(net.model, net.sample_input, max_grad_norm=R, loss_reduction=reduction, **extra)
    truth = per_sample_gradients(net.model, net.loss, x, y)
    factors = weight.double() * (R / truth.norms).clamp(max=1.0)
    wanted = {n: torch.tensordot(factors, g, 1) / (4 if reduction == "mean" else 1) for n, g in truth.grads.items()}

    if fused:
        dp_model(x, targets=y, sample_weight=weight).backward()
    else:
        losses = net.loss(dp_model(x, sample_weight=weight), y)
        (losses.mean() if reduction == "mean" else losses.sum()).backward()

    assert_same_gradients(gradients(net.model), wanted, RTOL)


def test_a_weight_of_the_wrong_length_is_refused() -> None:
    net = case()
    dp_model = dpcompile(net.model, net.sample_input)
    with pytest.raises(ValueError, match=r"sample_weight of shape \[3\], got \[2\]"):
        dp_model(net.batch(3)[0], sample_weight=torch.ones(2))


def views_case(views: int) -> Case:
    """The same network as a model of samples that are several views: loss and gradient are means over them."""
    net = case()

    class OfViews(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net.model

        def forward(self, x_BK: Tensor) -> Tensor:
            return self.net(x_BK.flatten(0, 1)).unflatten(0, (-1, views))

    return Case(
        "views",
        OfViews(),
        lambda size, generator: torch.randn(size, views, 1, 5, 5, generator=generator),
        lambda size, generator: torch.randint(4, (size, views), generator=generator),
        lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").unflatten(0, y.shape).mean(1),
    )


@pytest.mark.parametrize(
    ("reduction", "fused"),
    [
        pytest.param("mean", False, marks=pytest.mark.slow),
        ("sum", True),
        pytest.param("mean", True, marks=pytest.mark.slow),
        pytest.param("sum", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(views=st.integers(1, 3), size=st.integers(0, 4), method=st.sampled_from(["ghost", "explicit"]))
def test_views_of_a_sample_are_clipped_as_one(reduction: str, fused: bool, views: int, size: int, method: str) -> None:
    truth_case, net = views_case(views), case()
    x, y = truth_case.batch(size)
    truth = per_sample_gradients(truth_case.model, truth_case.loss, x, y)
    rows, targets = x.flatten(0, 1), y.flatten()  # type: ignore[union-attr]
    sample, sample_targets = (t.flatten(0, 1) for t in truth_case.batch(2))  # type: ignore[union-attr]
    extra = {"loss_fn": net.loss, "sample_targets": sample_targets} if fused else {}
    dp_model = dpcompile(
        net.model, sample, max_grad_norm=R, norm_method=method, loss_reduction=reduction, views=views, **extra
    )

    if fused:
        dp_model(rows, targets=targets).backward()
    else:
        losses = net.loss(dp_model(rows), targets)
        (losses.mean() if reduction == "mean" else losses.sum()).backward()

    divisor = max(size, 1) if reduction == "mean" else 1
    wanted = {name.removeprefix("net."): g / divisor for name, g in truth.clipped_sum(R).items()}
    assert_close(dp_model.per_sample_norms, truth.norms, RTOL, "norms")
    assert_same_gradients(gradients(net.model), wanted, RTOL)


@pytest.mark.slow
def test_views_of_a_transformer_are_clipped_as_one() -> None:
    vit = CASES["vit"]()
    x, y = vit.batch(6)
    one_view = per_sample_gradients(vit.model, vit.loss, x, y)
    truth = PerSampleGradients({n: g.unflatten(0, (3, 2)).mean(1) for n, g in one_view.grads.items()})
    sample = vit.batch(4)[0]
    dp_model = dpcompile(vit.model, sample, max_grad_norm=R, views=2)

    vit.model.zero_grad()
    vit.loss(call(dp_model, x), y).mean().backward()

    wanted = {name: g / 3 for name, g in truth.clipped_sum(R).items()}
    assert_close(dp_model.per_sample_norms, truth.norms, RTOL, "norms")
    assert_same_gradients(gradients(vit.model), wanted, RTOL)


def test_views_cost_the_forward_and_backward_of_their_rows() -> None:
    """Of the products alone, which are what grows: 4 views of 16 samples against plain training on 64 rows."""
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 10))
    plan = dpcompile(model, torch.randn(8, 1, 8, 8), views=4).plan
    assert plan.flops().subs(B, 16) <= 1.05 * plan.plain_flops().subs(B, 16)


@pytest.mark.slow
def test_a_user_with_few_records_is_clipped_as_one_of_many() -> None:
    """User-level units: three users with one, three and two records, padded to K = 3 rows and masked in the loss."""
    net, views = case(), 3
    x, y = net.batch(9)
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    rows = per_sample_gradients(net.model, net.loss, x, y)
    shares = (mask / mask.sum(1, keepdim=True)).double()
    truth = PerSampleGradients(
        {n: torch.einsum("uk,uk...->u...", shares, g.unflatten(0, (3, views))) for n, g in rows.grads.items()}
    )
    dp_model = dpcompile(net.model, x, max_grad_norm=R, views=views)

    losses = net.loss(dp_model(x), y).unflatten(0, (-1, views))
    ((losses * mask).sum(1) / mask.sum(1)).mean().backward()

    wanted = {name: g / 3 for name, g in truth.clipped_sum(R).items()}
    assert_close(dp_model.per_sample_norms, truth.norms, RTOL, "norms")
    assert_same_gradients(gradients(net.model), wanted, RTOL)


def test_rows_that_are_no_multiple_of_the_views_are_refused() -> None:
    net = case()
    dp_model = dpcompile(net.model, torch.randn(4, 1, 5, 5), views=2)
    with pytest.raises(CaptureError, match="3 rows; compiled for views=2"):
        dp_model(torch.randn(3, 1, 5, 5))


@given(norm=st.floats(1e-30, 1e30), bound=st.floats(1e-6, 1e6), function=st.sampled_from(sorted(FUNCTIONS)))
def test_no_contribution_exceeds_the_bound(norm: float, bound: float, function: str) -> None:
    factor = FUNCTIONS[function](torch.tensor([norm], dtype=torch.float64), torch.tensor(bound, dtype=torch.float64))
    assert factor.item() * norm <= bound * (1 + 1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_gradient_of_zero_gives_a_finite_factor(function: str) -> None:
    assert FUNCTIONS[function](torch.zeros(1), torch.tensor(1.0)).isfinite().all()


def test_bounds_of_groups_add_up_to_the_total() -> None:
    names = ["a.weight", "a.bias", "b.weight", "c"]
    made = clipping_of(names, 2.0, groups="per-layer")
    assert [g.name for g in made.groups] == ["a", "b", "c"]
    assert total_bound([g.bound for g in made.groups]) == pytest.approx(2.0)
    assert [g.bound for g in clipping_of(names, 2.0, groups={"a.*": 0.1, "*": None}).groups] == [0.1, 2.0 / 2**0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": "clip"}, "clipping='clip'"),
        ({"groups": "layers"}, "clip_groups='layers'"),
        ({"groups": ["a.*"]}, "no pattern matches b.weight"),
        ({"groups": ["a.*", "z*", "*"]}, "no trainable parameter matches 'z"),
        ({"groups": {"*": -1.0}}, "Expected the bound -1.0 of clip group"),
        ({"max_grad_norm": math.inf, "function": "auto-s"}, "finite max_grad_norm"),
    ],
)
def test_wrong_clipping_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipping_of(["a.weight", "b.weight"], **{"max_grad_norm": 1.0, **arguments})  # type: ignore[arg-type]


@pytest.mark.slow
def test_bounds_can_be_changed_between_steps_without_compiling_again() -> None:
    net = case()
    x, y = net.batch(4)
    truth = per_sample_gradients(net.model, net.loss, x, y)
    dp_model = dpcompile(net.model, net.sample_input, max_grad_norm=R, clip_groups="per-layer")
    compiled = torch.compile(dp_model, fullgraph=True, backend="aot_eager")
    for bound in (R, 0.05, 3.0):
        dp_model.max_grad_norm = bound
        assert dp_model.max_grad_norm == pytest.approx(bound)
        net.model.zero_grad()
        with torch.compiler.set_stance("default" if bound == R else "fail_on_recompile"):
            out = compiled(x)
        net.loss(out, y).mean().backward()
        wanted = {name: g / 4 for name, g in expected(truth, dp_model, "abadi").items()}
        assert_same_gradients(gradients(net.model), wanted, RTOL)
    dp_model.max_grad_norms = dict.fromkeys(dp_model.max_grad_norms, 0.1)
    assert dp_model.max_grad_norm == pytest.approx(0.1 * len(dp_model.clipping.groups) ** 0.5)
    with pytest.raises(ValueError, match="a bound > 0 for each"):
        dp_model.max_grad_norms = {"conv": 1.0}

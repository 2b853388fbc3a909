"""What kernels compute, tile by tile: those for a CPU, and in a process that test_kernels.py starts Triton's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layers import Apply, TiedLanguageModel, check_module, draw, loss_at, step
from oracle import PerSampleGradients, assert_close, per_sample_gradients
from selection import every
from test_certified import ALLOWED, TRICKS, Sequences, contribution, norm_of, on_the_brink
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dpcompile import dpcompile, kernels
from dpcompile.certified import dropped_norm, ghost_norm
from dpcompile.forms import Form, OneHot, Outer, doubled, explicit, in_float64
from dpcompile.patches import Window, by_kernel, kernel_gradients, patches
from dpcompile.plan import Method
from dpcompile.rounding import gamma
from dpcompile.shapes import B

WAYS: dict[str, Callable[[list[Form]], Tensor]] = {
    "flash": lambda forms: ghost_norm(forms, flash=True),  # type: ignore[arg-type]
    "tiled": lambda forms: dropped_norm(forms, tiled=True),
}
CPU = torch.device("cpu")
FORCED = ("forced-flash", "forced-tiled")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

pytestmark = [  # numpy's, of numbers that are infinite on a device as well
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
search = settings(
    max_examples=6 if INTERPRETED else 40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


as_on_a_device = mock.patch.multiple(kernels, SIDE=kernels.SIDE, DEPTH=kernels.DEPTH, SPAN=64)


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Several of Triton's tiles, steps and spans of a few numbers."""
    with mock.patch.multiple(kernels, SIDE=16, DEPTH=4, SPAN=8):
        yield


def test_they_are_there() -> None:
    assert kernels.available(CPU), "g++, or triton where it interprets, is not installed: development needs both"


# ------------------------------------------------------------------ the two ops


def laid_out(shape: tuple[int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """Random numbers with these strides: as they are written, transposed, every other one, or one for all samples."""
    samples, length, width = shape
    if layout == "transposed":
        return torch.randn(samples, width, length).to(dtype).transpose(1, 2)
    if layout == "strided":
        return torch.randn(samples, 2 * length, 3 * width).to(dtype)[:, ::2, ::3]
    if layout == "expanded":
        return torch.randn(1, length, width).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


LONG = () if INTERPRETED else (50, 131, 200)  # several registers, strips and spans of a CPU's
WIDE = () if INTERPRETED else (*LONG, 300)
layouts = st.sampled_from(["plain", "transposed", "strided", "expanded"])


@search
@given(
    samples=st.sampled_from([0, 1, 2]),
    length=st.sampled_from([0, 1, 2, 7, 16, 40, *LONG]),
    p=st.sampled_from([1, 3, 16, 35, *WIDE]),
    d=st.sampled_from([1, 2, 8, 33, *WIDE]),
    row_layout=layouts,
    col_layout=layouts,
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
)
def test_sums_are_as_near_to_the_truth_as_is_stated(
    samples: int, length: int, p: int, d: int, row_layout: str, col_layout: str, dtype: torch.dtype, wide: bool
) -> None:
    torch.manual_seed(0)
    rows, cols = laid_out((samples, length, p), row_layout, dtype), laid_out((samples, length, d), col_layout, dtype)
    r, c = (x.double().norm(dim=2) for x in (rows, cols))
    K, A = (x.double() @ x.double().mT for x in (rows, cols))
    rr, cc = (x[:, :, None].double() * x[:, None].double() for x in (r, c))
    total = kernels.sum_type(dtype, wide=wide)
    of_K, of_A, of_G = (gamma(kernels.terms(n, total if wide else dtype, CPU), total) for n in (p, d, length))
    adding = 2 * gamma(kernels.pair_terms(length, total, CPU) + 4, total)
    of_norms = 4 * gamma(p + d + 16, dtype if dtype is torch.float64 else torch.float32)

    found = kernels.PAIRED(rows, cols, wide)
    sums = [(K * A), K.abs() * cc, A.abs() * rr]
    off = [of_K * rr * A.abs() + of_A * K.abs() * cc + (of_K * of_A + adding) * rr * cc]
    off += [(of_K + adding + of_norms) * rr * cc, (of_A + adding + of_norms) * rr * cc]
    for got, exact, most in zip(found[:3], sums, off, strict=True):
        assert ((got - exact.sum((1, 2))).abs() <= 1e-15 + 1.01 * most.sum((1, 2))).all()

    grad, sizes = rows.double().mT @ cols.double(), rows.double().abs().mT @ cols.double().abs()
    squares, lengths = kernels.SQUARED(rows, cols, wide)
    for length_N in (found[3], lengths):
        assert (length_N >= (r * c).sum(1)).all()
        assert (length_N <= 1e-15 + (r * c).sum(1) * (1 + of_norms)).all()
    adding = 2 * gamma(kernels.block_terms(p, d, total, CPU) + 4, total)
    most = 2 * of_G * (grad.abs() * sizes).sum((1, 2)) + (of_G**2 + adding) * sizes.square().sum((1, 2))
    assert ((squares - grad.square().sum((1, 2))).abs() <= 1e-30 + 1.01 * most).all()


@pytest.mark.skipif(INTERPRETED, reason="of the kernels for a CPU")
@pytest.mark.parametrize("count", [1, 2, 16, 33, 128, 4800])
def test_sums_of_bfloat16_are_not_counted_as_longer(count: int) -> None:
    assert kernels.terms(count, torch.bfloat16, CPU) == kernels.terms(count, torch.float32, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_that_share_factors_are_those_of_each_pair(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    factors = [torch.randn(2, 37, width).to(dtype) for width in (5, 0, 16, 33)]
    pairs = [0, 2, 2, 0, 3, 0, 1, 3, 2, 2]
    found = kernels.SHARED(factors, pairs, False)
    for sums, row, col in zip(found, pairs[::2], pairs[1::2], strict=True):
        torch.testing.assert_close(sums, kernels.PAIRED(factors[row], factors[col], False), rtol=0, atol=0)


def test_factors_of_other_positions_are_refused() -> None:
    with pytest.raises(RuntimeError, match="are not factors of one norm"):
        kernels.SHARED([torch.randn(2, 5, 3), torch.randn(2, 6, 3)], [0, 1], False)


def test_nothing_is_differentiated_through_them() -> None:
    x = torch.randn(2, 5, 3, requires_grad=True)
    for found in (kernels.PAIRED(x, x, False), kernels.SHARED([x, x], [0, 1], False), kernels.SQUARED(x, x, False)):
        with pytest.raises(RuntimeError, match="has no derivative"):
            found.sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="of the kernels for a CPU")
def test_grams_that_there_is_no_room_for_are_formed_in_turn() -> None:
    torch.manual_seed(0)
    rows, cols = torch.randn(1, 2100, 7), torch.randn(1, 2100, 300)  # 8.4 MB is the limit for both
    found = kernels.PAIRED(rows, cols, False)
    K, A = (factor.double() @ factor.double().mT for factor in (rows, cols))
    torch.testing.assert_close(found[0], (K * A).sum((1, 2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("wide", [False, True])
def test_compilers_are_told_the_truth_about_them(wide: bool) -> None:
    x = torch.randn(2, 5, 3)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.PAIRED, (x, x, wide), test_utils=checks)
    torch.library.opcheck(kernels.SHARED, ([x, x + 1, x], [0, 1, 2, 1], wide), test_utils=checks)
    torch.library.opcheck(kernels.SQUARED, (x, x, wide), test_utils=checks)
    if not INTERPRETED:
        image, window = torch.randn(2, 4, 6), ([2], [1], [1])
        torch.library.opcheck(kernels.PAIRED_PATCHES, (x.mT, image, *window, wide), test_utils=checks)
        torch.library.opcheck(kernels.SQUARED_PATCHES, (x.mT, image, *window, wide), test_utils=checks)


@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels read no patches")
@search
@given(
    samples=st.sampled_from([0, 1, 2, 3]),
    channels=st.sampled_from([1, 3, 8]),
    p=st.sampled_from([1, 3, 17]),
    sizes=st.lists(st.sampled_from([1, 4, 7, 18]), min_size=1, max_size=3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
)
def test_patches_are_found_in_the_image(
    samples: int,
    channels: int,
    p: int,
    sizes: list[int],
    kernel: int,
    stride: int,
    dilation: int,
    dtype: torch.dtype,
    wide: bool,
) -> None:
    """The numbers of the other two ops, of the patches written out."""
    torch.manual_seed(0)
    n = len(sizes)
    window = Window((kernel,) * n, (stride,) * n, ((0, 0),) * n, (dilation,) * n, 1)
    image = torch.randn(samples, channels, *window.extent(tuple(sizes))).to(dtype)
    rows = torch.randn(samples, p, *sizes).to(dtype)
    cols_NTd = patches(image, window, tuple(sizes)).squeeze(1).transpose(1, 2)
    given = (rows, image, list(window.kernel), list(window.stride), list(window.dilation), wide)
    rows_NTp = rows.flatten(2).transpose(1, 2)
    torch.testing.assert_close(kernels.PAIRED_PATCHES(*given), kernels.PAIRED(rows_NTp, cols_NTd, wide), rtol=0, atol=0)
    torch.testing.assert_close(
        kernels.SQUARED_PATCHES(*given), kernels.SQUARED(rows_NTp, cols_NTd, wide), rtol=0, atol=0
    )
    if dtype not in kernels.NARROW:
        shape = (p, channels, *window.kernel)
        assert by_kernel(CPU, dtype)
        found = kernel_gradients(rows, image, window, shape)
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(found, (rows_NTp.mT @ cols_NTd).reshape(samples, *shape), **close)


@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels read no patches")
def test_patches_of_another_image_are_refused() -> None:
    with pytest.raises(RuntimeError, match="are not the positions of"):
        kernels.PAIRED_PATCHES(torch.randn(2, 3, 5), torch.randn(2, 3, 5), [2], [1], [1], False)


@as_on_a_device
def test_tiles_of_the_size_that_a_device_gets() -> None:
    torch.manual_seed(0)
    rows, cols = torch.randn(2, 150, 70, dtype=torch.float64), torch.randn(2, 150, 130, dtype=torch.float64)
    found = kernels.PAIRED(rows, cols, False)[0]
    squares = kernels.SQUARED(rows, cols, False)[0]
    truth = (rows.mT @ cols).square().sum((1, 2))
    torch.testing.assert_close(found, truth, rtol=1e-13, atol=0)
    torch.testing.assert_close(squares, truth, rtol=1e-13, atol=0)


# ------------------------------------------------------------------ the certified norms


@search
@given(
    way=st.sampled_from(sorted(WAYS)),
    shape=st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from([1, 2]), st.integers(1, 40)),
    p=st.integers(1, 40),
    d=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 10**6),
)
def test_a_square_is_at_least_the_truth_and_hardly_more(
    way: str, shape: tuple[int, int, int], p: int, d: int, dtype: torch.dtype, mean: float, seed: int
) -> None:
    torch.manual_seed(seed)
    rows, cols = torch.randn(*shape, p).to(dtype), (torch.randn(*shape, d) + mean).to(dtype)
    form = Outer(rows, cols, (shape[1], p, d), (1,), (2,), (0,))
    square, error = WAYS[way]([form])
    truth = explicit(in_float64(form)).square().flatten(1).sum(1)
    assert (square >= truth).all()
    sizes = (rows.double().norm(dim=3) * cols.double().norm(dim=3)).sum(2).square().sum(1)
    assert (square <= truth + 1e-3 * sizes).all()  # of positions that cancel, what they cancel to is uncertain
    ordinary = truth >= 0.1 * sizes
    assert (square <= truth * (1 + 1e-3))[ordinary].all()
    assert (error <= 1e-4 * sizes).all() or dtype in kernels.NARROW  # there it is that of writing the sum down


@pytest.mark.parametrize("way", WAYS)
def test_two_uses_are_one_and_uses_that_share_no_factor_are_not_taken_for_one(way: str) -> None:
    torch.manual_seed(0)
    rows, cols = torch.randn(2, 1, 6, 4), torch.randn(2, 1, 6, 5)
    first = Outer(rows, cols, (4, 5), (0,), (1,))
    again = Outer(cols.flip(2), rows, (4, 5), (1,), (0,))  # of the transposed weight
    truth = (explicit(in_float64(first)) + explicit(in_float64(again)).reshape(2, 4, 5)).flatten(1).norm(dim=1)
    assert_close(norm_of(WAYS[way]([first, again])), truth, 1e-4, way)

    square, other = torch.randn(2, 1, 6, 2), torch.randn(2, 1, 6, 4)
    left, right = Outer(square, other, (2, 2, 2), (0,), (1, 2)), Outer(other, square, (2, 2, 2), (0, 1), (2,))
    truth = (explicit(in_float64(left)) + explicit(in_float64(right))).flatten(1).norm(dim=1)
    assert_close(norm_of(WAYS[way]([left, right])), truth, 1e-4, way)


@search
@given(
    looked_up=st.integers(1, 20),
    length=st.integers(2, 40),
    p=st.integers(1, 40),
    d=st.integers(1, 40),
    opposed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_a_look_up_and_a_head_on_one_table_are_at_least_the_truth(
    looked_up: int, length: int, p: int, d: int, opposed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    index, cols = torch.randint(p, (2, looked_up)), torch.randn(2, looked_up, d)
    rows, others = torch.randn(2, 1, length, p), torch.randn(2, 1, length, d)
    if opposed and looked_up <= length:  # the head takes back what the look-up gives
        rows[:, 0, :looked_up] = nn.functional.one_hot(index, p).float()
        rows[:, 0, looked_up:] *= 1e-3
        others[:, 0, :looked_up] = -cols
    forms = [OneHot(index, cols, (p, d)), Outer(rows, others, (p, d), (0,), (1,))]
    square, _ = ghost_norm(forms, flash=True)
    truth = sum(explicit(in_float64(form)) for form in forms).square().flatten(1).sum(1)
    sizes = sum(explicit(in_float64(form)).square().flatten(1).sum(1) for form in forms)
    assert (square >= truth).all()
    assert (square <= truth + 1e-3 * sizes).all()


@search
@given(
    way=st.sampled_from(sorted(WAYS)),
    trick=st.sampled_from(TRICKS),
    again=st.sampled_from(TRICKS),
    length=st.sampled_from([1, 2, 3, 17, 40]),
    d=st.sampled_from([1, 2, 7, 40]),
    p=st.sampled_from([1, 3, 32]),
    seed=st.integers(0, 10**6),
    bound=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)
def test_no_sequence_contributes_more_than_its_share(
    way: str,
    trick: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    again: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    length: int,
    d: int,
    p: int,
    seed: int,
    bound: float,
    dtype: torch.dtype,
) -> None:
    """As of other norms: tests/test_certified.py."""
    torch.manual_seed(seed)
    rows, cols = again(*trick(torch.randn(length, p), torch.randn(length, d)))
    form = Outer(rows.to(dtype)[None, None], cols.to(dtype)[None, None], (p, d), (0,), (1,))
    allowed = ALLOWED if dtype is torch.float32 else 1 + 2 * torch.finfo(dtype).eps
    assert contribution(form, norm_of(WAYS[way]([form])), bound=bound) <= allowed


@pytest.mark.parametrize("way", WAYS)
def test_a_product_that_overflows_below_zero_is_no_norm_of_zero(way: str) -> None:
    for form in (form for seed in range(3) for form in on_the_brink(seed)):
        assert contribution(form, norm_of(WAYS[way]([form])), bound=1.0) <= ALLOWED


# ------------------------------------------------------------------ compiled models


def shared(m: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(nn.functional.linear(x, m.w).tanh(), m.w.t())


def projected(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    return (q @ k.mT).softmax(-1) @ v


MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "sequences": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(3, 18, 4)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 2, stride=2)),
        torch.randn(3, 2, 5, 5),
    ),
    "a weight and its transpose": (lambda: Apply(shared, w=(5, 4)), torch.randn(3, 6, 4)),
    "query, key and value": (
        lambda: Apply(projected, modules={name: nn.Linear(4, 4) for name in "qkv"}),
        torch.randn(3, 6, 4),
    ),
    "a recurrent layer": (
        lambda: Apply(lambda m, x: m.lstm(x)[0], modules={"lstm": nn.LSTM(3, 4, batch_first=True)}),
        torch.randn(3, 5, 3),
    ),
    "a look-up and a head": (TiedLanguageModel, torch.tensor([[0, 1, 2], [5, 3, 4], [4, 4, 1]])),
}


@pytest.mark.parametrize("name", every(2, MODULES))
def test_compiled_models_agree_with_one_sample_at_a_time_and_cost_what_is_counted(name: str) -> None:
    build, sample = MODULES[name]
    module = build()
    found = check_module(module, sample, batch_sizes=(2, 0), methods=FORCED)
    inputs = draw(found.analysis, sample.double() if sample.is_floating_point() else sample, 2)
    for way, method in zip(FORCED, (Method.FLASH, Method.TILED), strict=True):
        emitted = found.emitted[way]
        assert method in {choice.method for choice in emitted.plan.choices.values()}
        with FlopCounterMode(display=False) as counter:
            step(module, emitted, inputs, loss_at(0))
        assert int(emitted.plan.flops().subs(B, 2)) == counter.get_total_flops()


def test_compilers_pass_them_by() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    check_module(module, torch.randn(3, 6, 4), batch_sizes=(3,), methods=("forced-flash",), backend="aot_eager")


def methods_of(dp_model: nn.Module) -> set[Method]:
    return {choice.method for choice in dp_model.plan.choices.values()}


def test_one_graph_serves_every_length_and_the_plan_has_a_column() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    sample = torch.randn(2, 6, 4, dtype=torch.double)
    dp_model = dpcompile(model, sample, norm_method="ghost", dynamic=[{1: "length"}], loss_reduction="sum")
    assert Method.FLASH in methods_of(dp_model)
    assert "flash  tiled" in str(dp_model.plan)
    for length in (6, 19, 2):
        x = torch.randn(3, length, 4, dtype=torch.double)
        truth: PerSampleGradients = per_sample_gradients(
            model, lambda out, _: out.square().sum((1, 2)), x, torch.zeros(3)
        )
        dp_model(x).square().sum().backward()
        assert_close(dp_model.per_sample_norms, truth.norms, 1e-8, f"length {length}")


@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels share nothing")
def test_a_factor_of_several_norms_is_read_once_also_where_an_output_is_left_out() -> None:
    model = Apply(lambda m, x: (m.q(x).tanh(), m.k(x), m.v(x)), modules={name: nn.Linear(4, 4) for name in "qkv"})
    x = torch.randn(3, 6, 4)
    dp_model = dpcompile(model, x, norm_method="ghost", max_grad_norm=1e6, validate="off")
    gram = 3 * 6 * 7 * 4
    for used in ((0, 1, 2), (0, 2), (1,)):
        with FlopCounterMode(display=False) as counter:
            outputs = dp_model(x)
            sum(outputs[i].square().sum((1, 2)) for i in used).mean().backward()
        biases = 2 * 3 * 4 * len(used)
        flops = 2 * 3 * 6 * 16 * (3 + len(used)) + gram * (1 + len(used)) + biases
        assert counter.get_total_flops() == flops
        truth = per_sample_gradients(
            model, lambda out, _, used=used: sum(out[i].square().sum((1, 2)) for i in used), x, torch.zeros(3)
        )
        assert_close(dp_model.per_sample_norms, truth.norms, 1e-4, str(used))


def test_each_clip_group_waits_for_its_own_norm_alone() -> None:
    model = Apply(projected, modules={name: nn.Linear(4, 4) for name in "qkv"})
    x = torch.randn(3, 6, 4)
    groups = dpcompile(model, x, norm_method="ghost", clip_groups="per-layer", validate="off")
    assert groups.plan.shared_flops() == 0
    with FlopCounterMode(display=False) as counter:
        groups(x).square().sum((1, 2)).mean().backward()
    assert counter.get_total_flops() == int(groups.plan.flops().subs(B, 3))


def test_an_output_left_out_of_the_loss_costs_nothing() -> None:
    heads = {"used": nn.Linear(4, 3), "unused": nn.Linear(4, 2)}
    model = Apply(lambda m, x: (m.used(x), m.unused(x)), modules=heads)
    x = torch.randn(3, 6, 4)
    dp_model = dpcompile(model, x, norm_method="ghost", max_grad_norm=1e6, validate="off")
    with FlopCounterMode(display=False) as counter:
        dp_model(x)[0].square().sum((1, 2)).mean().backward()
    assert Method.FLASH in methods_of(dp_model)
    assert counter.get_total_flops() < int(dp_model.plan.flops().subs(B, 3)) - 2 * 3 * 6 * 4 * 2
    assert model.unused.weight.grad is None or not model.unused.weight.grad.any()


@as_on_a_device
@pytest.mark.parametrize("trick", TRICKS)
def test_what_a_compiled_model_adds_for_one_sample_is_at_most_the_bound(
    trick: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """A crowd of positions in float32, whose Gram matrices are added up in float64."""
    torch.manual_seed(0)
    made = [trick(torch.randn(32, 4), torch.randn(32, 24)) for _ in range(2)]
    g_BTp, x_BTd = torch.stack([rows for rows, _ in made]), torch.stack([cols for _, cols in made])
    dp_model = compiled(x_BTd)
    for i in range(2):
        dp_model.zero_grad()
        (dp_model(x_BTd, sample_weight=torch.eye(2)[i]) * g_BTp).sum().backward()
        grads = [p.grad.double().flatten() for p in dp_model.parameters() if p.grad is not None]
        assert torch.cat(grads).norm().item() <= 1e-3 * ALLOWED


COMPILED: dict[int, nn.Module] = {}


def compiled(x: Tensor) -> nn.Module:
    length = x.shape[1]
    if length not in COMPILED:
        dp_model = dpcompile(Sequences(24, 4), x, norm_method="ghost", max_grad_norm=1e-3, loss_reduction="sum")
        assert Method.FLASH in methods_of(dp_model)
        assert doubled(Outer(torch.ones(1, 1, length, 4), torch.ones(1, 1, length, 24), (4, 24), (0,), (1,))) == (
            length > 32
        )
        COMPILED[length] = dp_model
    return COMPILED[length]

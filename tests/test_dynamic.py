"""Lengths that a call may choose (dynamic=): one compile, and the truth one sample at a time for each of them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import arithmetic_of, check_against_autograd, check_against_oracle, splitting_norm
from torch import Generator, Tensor, nn
from torch.export import Dim
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from zoo import CASES, CLASSES, SAMPLE_BATCH, VOCAB, Case, class_loss, logits_of, token_ids

from dpcompile import CaptureError, DPModule, dpcompile, make_private
from dpcompile.api import prove
from dpcompile.errors import NoRuleError
from dpcompile.rules.batching.base import product, quotient, total

LENGTHS = (6, 11, 3)  # the first is the sample's
Spec = dict[str, Any] | list[Any]


class Positions(nn.Module):
    """Tied table, learned positions and a learned mixture of them, batch and length folded into one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 8)
        self.places = nn.Parameter(torch.randn(16, 8))
        self.mix = nn.Parameter(torch.randn(16, 16))
        self.inner = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 8))

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        hidden = self.table(ids) + self.places[:length]
        hidden = hidden + self.inner(hidden.reshape(batch * length, 8)).reshape(batch, length, 8)
        hidden = torch.einsum("btd,ts->bsd", hidden, self.mix[:length, :length])
        return hidden @ self.table.weight.T


class Signals(nn.Module):
    """Windows over a signal of any length, and a mean over what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv1d(6, 6, 3, padding=1, groups=2)
        )
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(2))


def token_loss(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(outputs).transpose(1, 2), targets, reduction="none").mean(1)


def ids(length: int) -> Callable[[int, Generator], Tensor]:
    return lambda batch_size, generator: token_ids(batch_size, generator, length)


def masked(length: int) -> Callable[[int, Generator], dict[str, Tensor]]:
    def make(batch_size: int, generator: Generator) -> dict[str, Tensor]:
        own = torch.randint(2, length + 1, (batch_size, 1), generator=generator)
        return {
            "input_ids": token_ids(batch_size, generator, length),
            "attention_mask": (torch.arange(length) < own).long(),
        }

    return make


def pairs(length: int) -> Callable[[int, Generator], dict[str, Tensor]]:
    def make(batch_size: int, generator: Generator) -> dict[str, Tensor]:
        return {
            "input_ids": token_ids(batch_size, generator, length + 2),
            "decoder_input_ids": token_ids(batch_size, generator, length),
        }

    return make


def signals(length: int) -> Callable[[int, Generator], Tensor]:
    return lambda batch_size, generator: torch.randn(batch_size, 2, length, generator=generator)


def labels(length: int) -> Callable[[int, Generator], Tensor]:
    return lambda batch_size, generator: torch.randint(0, VOCAB, (batch_size, length), generator=generator)


def at(case: Case, inputs: Callable[[int], Any], length: int) -> Case:
    """The same model with samples of another length."""
    targets = {} if case.loss is class_loss else {"make_targets": labels(length), "loss": token_loss}
    return replace(case, make_batch=inputs(length), **targets)


def own_case(build: Callable[[], nn.Module], loss: Callable[..., Tensor]) -> Case:
    torch.manual_seed(0)
    make_targets = CASES["bert"]().make_targets
    return Case(build.__name__, build(), ids(LENGTHS[0]), make_targets, loss)


MODELS: dict[str, tuple[Callable[[], Case], Callable[[int], Any], Spec]] = {
    "positions": (lambda: own_case(Positions, token_loss), ids, [[1]]),
    "signals": (lambda: own_case(Signals, class_loss), signals, [[0, 2]]),
    "gpt2": (CASES["gpt2"], ids, {"input_ids": [0, 1]}),
    "bert": (CASES["bert"], masked, {"input_ids": [0, 1], "attention_mask": [0, 1]}),
    "llama": (CASES["llama"], ids, {"input_ids": {1: Dim("T", min=2, max=64)}}),
    "t5": (CASES["t5"], pairs, {"input_ids": [1], "decoder_input_ids": {1: "target length"}}),
}


def named(case: Case, spec: Spec) -> Spec:
    """For a sample that is one tensor, the dimensions by position."""
    return [*spec.values()] if isinstance(spec, dict) and isinstance(case.sample_input, Tensor) else spec


SLOW = ("gpt2", "bert", "llama", "t5", "signals")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
def test_every_length_of_one_compile_equals_one_sample_at_a_time(name: str, subtests: pytest.Subtests) -> None:
    build, inputs, spec = MODELS[name]
    case = build().to(torch.float64)
    sample = at(case, inputs, LENGTHS[0])
    with arithmetic_of(torch.float64):
        bound = splitting_norm(sample, SAMPLE_BATCH)
        analysis = prove(case.model, sample.sample_input, dynamic=named(sample, spec)).conclude()
        for method in ("ghost", "explicit", "auto"):
            emitted = analysis.emit(analysis.plan(method), mean=True)
            dp_model = DPModule(case.model, emitted)
            dp_model.max_grad_norm = bound
            for length in LENGTHS:
                for batch_size in (SAMPLE_BATCH, 1, 0):
                    with subtests.test(method=method, length=length, batch_size=batch_size):
                        own = at(case, inputs, length)
                        check_against_oracle(own, dp_model, batch_size, max_grad_norm=bound, seed=length)
            with subtests.test(method=method, max_grad_norm="inf"):
                unbounded = DPModule(case.model, emitted)
                unbounded.max_grad_norm = float("inf")
                check_against_autograd(at(case, inputs, LENGTHS[1]), unbounded, 2)


def compiled_gpt2(**more: Any) -> tuple[Case, float, DPModule]:
    case = CASES["gpt2"]()
    sample = at(case, ids, LENGTHS[0])
    bound = splitting_norm(sample, SAMPLE_BATCH)
    spec = {"input_ids": [1], "targets": [1]} if "loss_fn" in more else {"input_ids": [1]}
    if "loss_fn" in more:
        more["sample_targets"] = sample.sample_targets
    inputs = {"input_ids": sample.sample_input}
    return case, bound, dpcompile(case.model, inputs, max_grad_norm=bound, dynamic=spec, **more)


def by_name(length: int) -> Callable[[int, Generator], dict[str, Tensor]]:
    return lambda batch_size, generator: {"input_ids": token_ids(batch_size, generator, length)}


@pytest.mark.slow
def test_the_fused_form_at_any_length() -> None:
    case, bound, dp_model = compiled_gpt2(loss_fn=token_loss)
    for length in LENGTHS:
        own = at(case, by_name, length)
        check_against_oracle(own, dp_model, 2, max_grad_norm=bound, fused=True, seed=length)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_compile_makes_one_graph_for_all_lengths(fused: bool) -> None:
    case, bound, dp_model = compiled_gpt2(**({"loss_fn": token_loss} if fused else {}))
    graphs: list[Any] = []

    def backend(module: Any, _inputs: Any) -> Any:
        graphs.append(module)
        return module

    torch._dynamo.reset()
    run: Any = torch.compile(dp_model, fullgraph=True, dynamic=True, backend=backend)
    for length in LENGTHS:
        own = at(case, by_name, length)
        check_against_oracle(own, run, SAMPLE_BATCH, max_grad_norm=bound, fused=fused, seed=length)
    assert len(graphs) == 1


@pytest.mark.slow
def test_inductor_at_any_length_and_for_an_empty_batch() -> None:
    case, bound, dp_model = compiled_gpt2()
    torch._dynamo.reset()
    run: Any = torch.compile(dp_model, fullgraph=True)
    for length in LENGTHS:
        for batch_size in (SAMPLE_BATCH, 0):
            own = at(case, by_name, length)
            check_against_oracle(own, run, batch_size, max_grad_norm=bound, seed=length)
            assert len(dp_model.per_sample_norms) == batch_size


@pytest.mark.slow
def test_copies_and_stored_modules_take_any_length() -> None:
    case, bound, dp_model = compiled_gpt2()
    stored = io.BytesIO()
    torch.save(dp_model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(dp_model), torch.load(stored, weights_only=False)):
        own = replace(at(case, by_name, LENGTHS[1]), model=other.module)
        check_against_oracle(own, other, 2, max_grad_norm=bound)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"clip_groups": "per-layer"}, {"views": 3}, {"loss_reduction": "sum"}])
def test_other_options(options: dict[str, Any]) -> None:
    """The norms of a module that was compiled at this length alone."""
    torch.manual_seed(0)
    model = Positions().double()
    free = dpcompile(model, torch.randint(VOCAB, (3, LENGTHS[0])), dynamic=[1], **options)
    data = torch.randint(VOCAB, (6, LENGTHS[1]))
    found = []
    for dp_model in (free, dpcompile(model, data, **options)):
        model.zero_grad()
        dp_model(data).square().sum().backward()
        found.append((dp_model.per_sample_norms, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=0)


def test_a_private_run_on_batches_of_many_lengths() -> None:
    """Every physical batch is as long as its longest text."""
    texts = [torch.arange(1, 3 + i % 7) for i in range(40)]

    def longest(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        padded = nn.utils.rnn.pad_sequence([text for text, _ in rows], batch_first=True)
        return padded, torch.tensor([label for _, label in rows])

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(VOCAB, 8, padding_idx=0), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).tanh().mean(1))

    torch.manual_seed(0)
    dp_model = dpcompile(Classifier(), torch.randint(1, VOCAB, (4, 6)), dynamic={"ids": [1]})
    data = [(text, i % 3) for i, text in enumerate(texts)]
    loader = DataLoader(data, batch_size=8, collate_fn=longest)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.SGD(dp_model.parameters(), 0.1)
    options = {"noise_multiplier": 1.0, "target_delta": 1e-3, "batch_size": 12, "max_physical_batch": 3}
    private = make_private(dp_model, optimizer, loader, seed=0, **options)
    lengths = set()
    for ids, classes in private.loader:
        F.cross_entropy(dp_model(ids), classes).backward()
        private.optimizer.step()
        private.optimizer.zero_grad()
        lengths.add(ids.shape[1])
    assert len(lengths) > 2
    assert 0 < private.epsilon() < float("inf")


def test_flops_at_the_samples_length_are_those_of_the_plan() -> None:
    torch.manual_seed(0)
    model, data = Positions(), torch.randint(VOCAB, (SAMPLE_BATCH, LENGTHS[0]))
    dp_model = dpcompile(model, data, dynamic=[1], validate="off")
    with FlopCounterMode(display=False) as counter:
        dp_model(data).sum().backward()
    assert counter.get_total_flops() == dp_model.plan.to_dict()["totals"]["flops"]


def test_the_plan_shows_for_which_lengths_a_choice_is_the_best() -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, 8).requires_grad_(False), nn.Linear(8, 64))
    data = torch.randint(VOCAB, (16, 12))
    plan = dpcompile(model, data, dynamic={"input": [1]}, validate="off").plan
    assert "batch size 16, T = 12 (free), device" in str(plan)
    assert "best for T" in str(plan)
    assert "best for T" not in str(dpcompile(model, data, validate="off").plan)
    choice = plan.choices["1.weight"]
    assert choice.span is not None
    least, greatest = choice.span.of(12)
    assert least <= 12
    assert greatest is not None
    for length, same in ((least, True), (greatest, True), (greatest + 1, False)):
        other = dpcompile(model, torch.randint(VOCAB, (16, length)), validate="off").plan
        assert (other.choices["1.weight"].method is choice.method) == same


class Uses(nn.Module):
    """A module and what is done with it, for a sample [B, T, 4]."""

    def __init__(self, inner: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.inner, x)


def folded_and_joined(layer: nn.Module, x: Tensor) -> Tensor:
    first, second = layer(x).chunk(2, -1)
    joined = torch.cat([first, second], 1).flatten(0, 1).unflatten(0, (x.shape[0], -1))
    return joined.cumsum(1).flip(1) + joined.roll(1, 1) + F.pad(joined, (0, 0, 1, 0))[:, :-1]


def causal(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return layer(x, x, x, attn_mask=mask, need_weights=False)[0]


def down_and_up(layers: nn.ModuleList, x: Tensor) -> Tensor:
    down, up = layers
    inner = down(x.transpose(1, 2)).relu()
    return up(inner) + F.interpolate(F.avg_pool1d(inner, 2), scale_factor=4)


def time_first(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.transpose(0, 1)).transpose(0, 1)


QUICK_PARTS = ("folds", "convolutions", "gru")
PARTS: dict[str, Callable[[], Uses]] = {
    "weight_norm": lambda: Uses(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), lambda m, x: m(x).tanh()),
    "bilinear": lambda: Uses(nn.Bilinear(4, 4, 3), lambda m, x: m(x, x)),
    "prelu": lambda: Uses(nn.PReLU(4), lambda m, x: m(x.transpose(1, 2))),
    "folds": lambda: Uses(nn.Linear(4, 6), folded_and_joined),
    "attention": lambda: Uses(nn.MultiheadAttention(4, 2, batch_first=True), causal),
    "convolutions": lambda: Uses(
        nn.ModuleList([nn.Conv1d(4, 4, 4, stride=2, padding=1), nn.ConvTranspose1d(4, 4, 4, stride=2, padding=1)]),
        down_and_up,
    ),
    "lstm": lambda: Uses(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), lambda m, x: m(x)[0]),
    "gru": lambda: Uses(nn.GRU(4, 3, batch_first=True), lambda m, x: m(x)[1][0]),
    "rnn": lambda: Uses(nn.RNN(4, 3, batch_first=True, nonlinearity="relu"), lambda m, x: m(x)[0]),
    "time_first": lambda: Uses(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), time_first),
}


@pytest.mark.parametrize("norm_method", ["ghost", pytest.param("explicit", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK_PARTS else pytest.mark.slow) for name in PARTS]
)
def test_parts_of_models_at_other_lengths(name: str, norm_method: str) -> None:
    torch.manual_seed(0)
    model = PARTS[name]().double()
    dp_model = dpcompile(model, torch.randn(3, 12, 4).double(), dynamic=[1], norm_method=norm_method)
    for batch_size, length in ((3, 12), (2, 8), (5, 32)):
        data = torch.randn(batch_size, length, 4).double()
        truth = []
        for sample in data.split(1):
            model.zero_grad()
            model(sample).square().sum().backward()
            truth.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
        (dp_model(data).square().flatten(1).sum(1).mean()).backward()
        assert torch.allclose(dp_model.per_sample_norms, torch.stack(truth), rtol=1e-8)


def test_a_value_that_only_vmap_can_carry_back_has_a_fixed_length() -> None:
    def nearest(places: nn.Embedding, x: Tensor) -> Tensor:
        return x @ places.weight[: x.shape[1]].softmax(-1).T

    with pytest.raises(NoRuleError, match=r"lengths are free \(dynamic=\).*inner.weight"):
        dpcompile(Uses(nn.Embedding(32, 4), nearest), torch.randn(3, 12, 4), dynamic=[1])


# ---------------------------------------------------------------- what is refused


def linear(x: Tensor) -> Tensor:
    return x


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor] = linear) -> None:
        super().__init__()
        self.weight = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.weight(x))


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"y": [1]}, r"names \['y'\], but the arguments are \['x'\]"),
        ({"x": [3]}, "names dimension 3 of `x`, whose shape is"),
        ({"x": ["T"]}, "must give dimensions as whole numbers"),
        ("x", "must be a dict of argument name to dimensions"),
        ([[1], [1]], "must be a dict of argument name to dimensions"),
        ({"x": [2]}, r"plain number of dimension 2 of `x`"),
    ],
)
def test_a_wrong_dynamic_is_refused(dynamic: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        dpcompile(Apply(), torch.randn(3, 6, 4), dynamic=dynamic)


@pytest.mark.parametrize(
    "dynamic", [{"x": [0]}, {"x": None}, {"x": {1: None}}, {"x": {1: Dim.STATIC}}, {"x": {2: Dim.AUTO}}, [], None]
)
def test_what_frees_nothing(dynamic: Any) -> None:
    dp_model = dpcompile(Apply(), torch.randn(3, 6, 4), dynamic=dynamic)
    with pytest.raises(CaptureError, match=r"compiled for \[B, 6, 4\]"):
        dp_model(torch.randn(3, 5, 4))


def test_a_sample_of_one_position_is_refused() -> None:
    with pytest.raises(CaptureError, match="has size 1 in the sample"):
        dpcompile(Apply(), torch.randn(3, 1, 4), dynamic=[1])


def test_recurrent_layers_with_a_projection_have_a_fixed_length() -> None:
    class Last(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(x)[0][:, -1]

    with pytest.raises(CaptureError, match=r"dimension 1 of `x`, which dynamic= frees.*\n.*LSTM with proj_size"):
        dpcompile(Last(4, 4, proj_size=2, batch_first=True), torch.randn(3, 6, 4), dynamic=[1])


def test_a_length_outside_of_what_the_model_decides_by_is_refused() -> None:
    dp_model = dpcompile(
        Apply(lambda x: x.tanh() if x.shape[1] > 5 else x), torch.randn(3, 8, 4), dynamic={"x": {1: "T"}}
    )
    dp_model(torch.randn(3, 6, 4)).sum().backward()
    with pytest.raises(CaptureError, match="`x` has length 5; compiled for 6 or more"):
        dp_model(torch.randn(3, 5, 4))


def test_a_decision_that_repeats_leaves_lengths_in_steps() -> None:
    dp_model = dpcompile(Apply(lambda x: x.tanh() if x.shape[1] % 3 == 0 else x), torch.randn(3, 6, 4), dynamic=[1])
    with pytest.raises(CaptureError, match="`x` has length 7; compiled for 3 to 262143 in steps of 3"):
        dp_model(torch.randn(3, 7, 4))


def test_a_dim_that_asks_for_more_than_the_graph_is_right_for_is_refused() -> None:
    function = Apply(lambda x: x.tanh() if x.shape[1] > 5 else x)
    with pytest.raises(CaptureError):
        dpcompile(function, torch.randn(3, 8, 4), dynamic={"x": {1: Dim("T", min=2, max=64)}})


def test_the_range_of_a_dim_is_kept() -> None:
    dp_model = dpcompile(Apply(), torch.randn(3, 8, 4), dynamic={"x": {1: Dim("T", min=4, max=9)}})
    for length in (4, 9):
        dp_model(torch.randn(3, length, 4)).sum().backward()
    for length in (3, 10):
        with pytest.raises(CaptureError, match=f"has length {length}; compiled for 4 to 9"):
            dp_model(torch.randn(3, length, 4))


def test_inputs_of_one_length_must_agree() -> None:
    class Both(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(x) * mask.unsqueeze(-1)

    dp_model = dpcompile(Both(4, 4), (torch.randn(3, 6, 4), torch.ones(3, 6)), dynamic=[[1], [1]])
    with pytest.raises(CaptureError, match=r"lengths of `x` \(5\) and `mask` \(4\) differ"):
        dp_model(torch.randn(3, 5, 4), torch.ones(3, 4))


# ---------------------------------------------------------------- sizes as expressions


def test_a_quotient_is_whole_for_every_length() -> None:
    import sympy

    t, s = sympy.symbols("t s", integer=True, positive=True)
    assert quotient(12, 4) == 3
    assert quotient(12, 5) is None
    assert quotient(6 * t * s, 3 * t) == 2 * s
    assert quotient(t * (t + 1), t) == t + 1
    assert quotient(t * (t + 1), 2) is None  # whole, but not as a polynomial
    assert quotient(t, s) is None
    assert quotient(t, 2) is None
    assert product((t, t + 1)) == total((t**2, t))
    assert product((2, 3)) == 6

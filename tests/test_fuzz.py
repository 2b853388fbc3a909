"""Two hundred small random models, thirty of them by default; `make fuzz` goes on from there."""

from __future__ import annotations

import collections
from collections.abc import Callable

import fuzz
import pytest
import torch
from fuzz import Outcome, Recipe, check, shrink
from fuzz_layers import STEPS
from fuzz_models import model_of, steps_of

from dpcompile.forms import Form
from dpcompile.rules.sites.base import Call
from dpcompile.rules.sites.contraction import Contraction

TOGETHER = 10  # models compiled as one: it is compilation that takes the time


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(TOGETHER, 200, TOGETHER))]
)
def test_random_models_match_one_sample_at_a_time(first: int) -> None:
    recipe = Recipe(first, longest=2, together=TOGETHER)
    outcome = check(recipe)
    assert outcome.kind == "ok", f"{recipe.command()}\n{outcome.kind}: {outcome.what}\n{outcome.detail}"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, TOGETHER))
def test_random_models_under_inductor(first: int) -> None:
    recipe = Recipe(first, longest=2, together=TOGETHER, changed=(("backend", "inductor"), ("size", 3)))
    outcome = check(recipe)
    if first == 20 and "InductorError: IndexError" in outcome.what:
        pytest.xfail(
            "torch 2.13: inductor finds a range to be 1 after it made a sum over it, which has no loop then "
            "(CppKernel.reduction); the same models compile in two halves"
        )
    assert outcome.kind == "ok", f"{recipe.command()}\n{outcome.kind}: {outcome.what}\n{outcome.detail}"


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:Using padding='same'")
def test_every_step_is_drawn_and_its_models_run() -> None:
    seen: collections.Counter[str] = collections.Counter()
    for seed in range(300):
        model = model_of(seed)
        inputs, targets = model.batch(2, torch.float32)
        assert model.loss(model.module()(**inputs), targets).isfinite().all()
    for seed in range(800):
        seen.update(steps_of(seed))
    assert set(seen) == set(STEPS)


def test_a_seed_gives_the_same_model_again() -> None:
    assert model_of(7).source == model_of(7).source


@pytest.mark.slow
def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Contraction.form

    def wrong(self: Contraction, call: Call, slot: str) -> Callable[..., Form]:
        form = right(self, call, slot)
        return lambda *tensors: form(*tensors[:-1], 1.001 * tensors[-1])

    recipe = Recipe(next(seed for seed in range(1000) if set(steps_of(seed)) == {"linear"}))
    assert check(recipe).kind == "ok"
    monkeypatch.setattr(Contraction, "form", wrong)
    assert check(recipe).kind == "failed"


def test_a_failing_model_shrinks_to_the_step_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(seed for seed in range(100) if "prelu" in steps_of(seed) and len(steps_of(seed)) > 4)
    at = steps_of(seed).index("prelu")
    monkeypatch.setattr(
        fuzz,
        "check",
        lambda recipe: Outcome("failed" if recipe.keep is None or at in recipe.keep else "ok", "prelu"),
    )

    smallest = shrink(Recipe(seed), Outcome("failed", "prelu"))

    assert smallest.keep == (at,)
    assert smallest.command().startswith(f"python tests/fuzz.py --seed {seed} --keep {at}")

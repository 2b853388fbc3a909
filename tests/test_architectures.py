"""Hugging Face architectures, each against one sample at a time, or refused with a reason that says what to do."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from architecture_page import HEAD, PAGE, refused_row, row_of
from architectures import ARCHITECTURES, REFUSED
from oracle import arithmetic_of, check_against_oracle, splitting_norm
from zoo import SAMPLE_BATCH, Case

from dpcompile import DPModule
from dpcompile.api import Analysis, prove
from dpcompile.errors import DPCompileError

VERSIONS = re.compile(r"\(torch \S+, transformers\s\S+\)")

# Run by default: the cheapest of every kind that the zoo has not. All others with -m slow.
QUICK = ("bloom",)
QUICKLY_REFUSED = ("resnet", "clip", "bart_layerdrop")
METHODS = {"auto": (SAMPLE_BATCH, 1), "ghost": (SAMPLE_BATCH, SAMPLE_BATCH + 1), "explicit": (SAMPLE_BATCH, 1)}

# Their code is in float64 as it is; that casts to float32 are made to float64, export takes for an error of its own.
WITHOUT_CASTS = ("opt", "biogpt", "deberta_v2", "videomae")

EXACT = [name for name in ARCHITECTURES if name not in REFUSED]


def check(case: Case, analysis: Analysis, method: str, *batch_sizes: int) -> None:
    bound = splitting_norm(case, SAMPLE_BATCH)
    dp_model = DPModule(case.model, analysis.emit(analysis.plan(method), mean=True))
    dp_model.max_grad_norm = bound
    for batch_size in batch_sizes:
        check_against_oracle(case, dp_model, batch_size, max_grad_norm=bound)


@pytest.mark.parametrize("name", QUICK)
def test_some_architectures_equal_one_sample_at_a_time(name: str) -> None:
    case = ARCHITECTURES[name]()
    check(case, prove(case.model, case.sample_input).conclude(), "auto", SAMPLE_BATCH + 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_every_architecture_equals_one_sample_at_a_time(name: str, subtests: pytest.Subtests) -> None:
    """In every norm method, at the sample's batch size and another one, in float64; and the page says what is so."""
    case = ARCHITECTURES[name]()
    with subtests.test(PAGE.name):
        assert row_of(case, prove(case.model, case.sample_input).conclude()) in PAGE.read_text().splitlines()
    double = case.to(torch.float64)
    with nullcontext() if name in WITHOUT_CASTS else arithmetic_of(torch.float64):
        analysis = prove(double.model, double.sample_input).conclude()
        for method, batch_sizes in METHODS.items():
            with subtests.test(method=method):
                check(double, analysis, method, *batch_sizes)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICKLY_REFUSED else pytest.mark.slow) for name in REFUSED]
)
def test_a_refusal_says_why_and_what_to_do(name: str) -> None:
    case = ARCHITECTURES[name]()
    with pytest.raises(DPCompileError) as caught:
        prove(case.model, case.sample_input).conclude()
    for text in REFUSED[name]:
        assert text in str(caught.value)
    assert refused_row(case, caught.value) in PAGE.read_text().splitlines()


def test_the_page_has_a_line_for_each_architecture() -> None:
    page, head = (VERSIONS.sub("", text) for text in (PAGE.read_text(), HEAD))  # it was made with other versions
    assert page.startswith(head)
    assert [line.split(" ")[1] for line in page.removeprefix(head).splitlines()] == EXACT + [
        name for name in ARCHITECTURES if name in REFUSED
    ]

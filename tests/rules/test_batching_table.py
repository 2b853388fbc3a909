"""Every line of the batching table against its op: what it accepts keeps samples apart, what mixes them it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import batching_cases as cases
import pytest
import torch
from batching_calls import Impossible, OpCall, Verdict, assert_true, call, read, track
from selection import every

from dpcompile.ir import Kind
from dpcompile.rules import batching
from dpcompile.rules.batching import pointwise, table

CLASSES = (
    *("COPIES", "VIEWS", "POINTWISE", "REDUCTIONS", "CONTRACTIONS", "ATTENTION", "RECURRENCE"),
    *("LOCAL", "NORMS", "INDEXING", "LOSSES", "CONSTRUCTORS"),
)

# Lines whose op cannot bring samples together, wherever the batch lies.
CANNOT_MIX = """
    clone _to_copy to alias detach lift_fresh lift_fresh_copy contiguous type_as resolve_conj resolve_neg copy
    flatten permute permute_copy transpose swapaxes swapdims transpose_copy t mT mH adjoint t_copy movedim moveaxis
    unsqueeze unsqueeze_copy squeeze squeeze_copy expand_as view_as_real view_as_complex one_hot
    bernoulli poisson normal_functional exponential rrelu uniform cauchy geometric log_normal random gelu dropout
    native_dropout alpha_dropout log_sigmoid_forward frexp rrelu_with_noise_functional hardswish real imag conj _conj
    log_sigmoid absolute negative fix isreal isfinite arcsin arccos arctan arcsinh arccosh arctanh special_digamma
    special_erf special_erfc special_erfinv special_exp2 special_expit special_expm1 special_gammaln special_log1p
    special_logit special_psi special_ndtr special_round special_sinc special_i0
    zeros_like ones_like empty_like rand_like randn_like zero
"""
# Lines whose op, where it would bring samples together, fixes the batch size: one dimension has to equal another.
FIXES_THE_BATCH = """
    unbind unbind_copy max_pool1d _fused_rms_norm randint_like affine_grid_generator
    linalg_inv linalg_inv_ex inverse linalg_cholesky linalg_cholesky_ex
    linalg_eigh linalg_eigvalsh linalg_matrix_power linalg_det det linalg_slogdet slogdet logdet matrix_exp linalg_eig
    linalg_eigvals linalg_matrix_exp linalg_ldl_factor linalg_ldl_factor_ex cholesky_inverse _fft_r2c _fft_c2c _fft_c2r
"""
# Lines that are there to say why not.
CANNOT_KEEP_APART = "dot vdot nonzero masked_select masked_scatter unique_dim _unique2 bincount histc"
# Kernels of single devices; those for the CPU have the same rule.
OTHER_DEVICES = """
    _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
"""


@dataclass
class Seen:
    """The lines of the table that were seen to keep samples apart, and to refuse (or to name a sum over samples)."""

    apart: set[Any] = field(default_factory=set)
    mixing: set[Any] = field(default_factory=set)

    def note(self, made: OpCall, verdict: Verdict) -> None:
        summed = verdict.values[0].kind is Kind.REDUCED
        (self.apart if verdict.accepts and not summed else self.mixing).add(made.line)


def _elsewhere(made: OpCall, seen: Seen, rules: set[Any], every: bool) -> Iterator[OpCall]:
    """The call with its batch elsewhere: all ways for the first call of a rule, for others until one is refused."""
    rule = batching.rule_for(made.op)
    if every or rule not in rules:
        rules.add(rule)
        yield from itertools.chain(made.folded(), made.moved() if every else itertools.islice(made.moved(), 30))
        return
    for other in itertools.islice(made.moved(), 20):
        if made.line in seen.mixing:
            return
        yield other


def _hold(apart: Iterable[OpCall], mixing: Iterable[OpCall], every: bool) -> Seen:
    seen, rules = Seen(), set()
    for made in mixing:
        verdict = track(made)
        seen.note(made, verdict)
        assert not verdict.accepts, f"{made} is said to be {verdict.values}"
    for made in apart:
        verdict = track(made)
        seen.note(made, verdict)
        assert verdict.accepts, f"{made} is refused: it {verdict.problem}"
        assert_true(made, verdict)
        for other in _elsewhere(made, seen, rules, every):
            try:
                verdict = track(other)
            except Impossible:
                continue
            seen.note(other, verdict)
            if verdict.accepts:
                assert_true(other, verdict)
    return seen


def _lines(names: str, table: dict[Any, Any]) -> set[Any]:
    return {getattr(torch.ops.aten, name) for name in names.split()} & set(table)


@pytest.mark.parametrize("name", every(3, CLASSES))
@pytest.mark.parametrize("every_case", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_line_of_the_table_is_true(name: str, every_case: bool) -> None:
    seen = _hold(getattr(cases, name), getattr(cases, f"{name}_MIXING"), every_case)
    lines = getattr(batching, name)
    elsewhere = _lines(OTHER_DEVICES, lines)
    not_apart, not_mixing = set(lines) - seen.apart - elsewhere, set(lines) - seen.mixing - elsewhere
    assert not_apart == _lines(CANNOT_KEEP_APART, lines), "lines that no case showed to keep samples apart"
    assert not_mixing == _lines(CANNOT_MIX + FIXES_THE_BATCH, lines), "lines that no case showed to refuse"


def test_the_classes_are_the_whole_table() -> None:
    assert {key for name in CLASSES for key in getattr(batching, name)} == set(batching.TABLE)


def _pointwise() -> list[torch._ops.OpOverload]:
    """Every functional op that torch tags as pointwise."""
    packets = [getattr(torch.ops.aten, name) for name in dir(torch.ops.aten)]
    ops = [getattr(p, name) for p in packets if isinstance(p, torch._ops.OpOverloadPacket) for name in p.overloads()]
    return [op for op in ops if torch.Tag.pointwise in op.tags and not op._schema.is_mutable]


def _calls(op: torch._ops.OpOverload) -> Iterator[OpCall]:
    """The op with a batched tensor for each tensor argument: floats where it takes them, else integers or flags."""
    for kind in "pib":
        args: list[Any] = []
        for argument in op._schema.arguments:
            if argument.has_default_value() or argument.kwarg_only:
                break
            kinds = {"Tensor": f"{kind}:B34" if len(args) < 2 else f"{kind}:34", "bool": True, "int": 1}
            args.append(kinds.get(str(argument.type), 0.5 if kind == "p" else 1))
        yield read(OpCall(op, tuple(args), {}))


def test_what_torch_tags_as_pointwise_is_so() -> None:
    held = 0
    for op in _pointwise():
        for made in _calls(op):
            try:
                verdict = track(made)
            except Impossible:
                continue
            assert verdict.accepts, f"{made} is refused: it {verdict.problem}"
            assert_true(made, verdict)
            held += 1
            break
    assert held > 200


@pytest.mark.parametrize("name", ["softmax", "cumsum", "index", "gather"])
def test_a_rule_that_says_too_much_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batching.TABLE, getattr(torch.ops.aten, name), lambda call: pointwise.unary(call))
    made = {
        "softmax": call("softmax.int", "f:B3", 0),
        "cumsum": call("cumsum", "f:B3", 0),
        "index": call("index.Tensor", "f:B3", ["i:B"]),
        "gather": call("gather", "f:B3", 0, "i:B3"),
    }[name]
    with pytest.raises(AssertionError, match="is not batched"):
        assert_true(made, track(made))


def test_the_page_of_the_rules_is_what_they_say() -> None:
    page = Path(__file__).parents[2] / "docs" / "batching.md"
    assert page.read_text() == table.markdown(), "run: python -m dpcompile.rules.batching.table > docs/batching.md"

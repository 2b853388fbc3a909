"""Defects that libraries for private training have had, each ruled out here. The table is docs/defects.md."""

from __future__ import annotations

import ast
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import Apply, check_module
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpcompile import BatchMixingError, DPModule, PrivacyError, Private, dpcompile, make_private
from dpcompile.rules.sites.contraction import Contraction

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "defects.md"
N, WIDTH, R = 60, 4, 0.5
X = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (N,), generator=torch.Generator().manual_seed(1))
FEW = ("ghost", "explicit")


def contribution(model: nn.Module, dp_model: DPModule, x: Tensor, slope: Tensor) -> float:
    """The norm of what a batch of one sample leaves in the gradients, summed in float64."""
    model.zero_grad()
    (dp_model(x) * slope).sum().backward()
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None))


# ---------------------------------------------------------------- norms and gradients


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_that_cancel_do_not_escape_the_clip(method: str, dtype: torch.dtype) -> None:
    """Defect 3: gradients of positions that nearly cancel leave a Gram sum of rounding errors, below zero or not."""
    torch.manual_seed(0)
    model, positions, width, bound = nn.Linear(64, 64, bias=False).to(dtype), 4, 64, 1e-3
    dp_model = dpcompile(
        model,
        torch.zeros(2, 2 * positions, width, dtype=dtype),
        max_grad_norm=bound,
        norm_method=method,
        loss_reduction="sum",
    )
    slack = 1e-4 if dtype is torch.float32 else 2**-8  # p.grad itself is rounded to this type
    for exponent in (10, 12, 14):
        for seed in (9, 14, 18, 28):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(1, positions, width, generator=generator)
            slope = torch.randn(1, positions, width, generator=generator)
            x = torch.cat([x, x * (1 + 2**-exponent)], 1).to(dtype)
            slope = torch.cat([slope, -slope], 1).to(dtype)
            assert contribution(model, dp_model, x, slope) <= bound * (1 + slack)


def test_layers_that_run_in_another_order_than_they_were_registered() -> None:
    """Defect 4: clip factors that are taken when the layer that was registered first has its gradient."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x).tanh()).tanh())

    check_module(Backwards(), X[:3], batch_sizes=(3, 4), methods=FEW)  # several steps, all of them exact


def test_a_step_without_a_gradient_drops_no_parameter() -> None:
    """Defect 6: a parameter whose gradient was missing in one step is never trained again."""
    model = Apply(
        lambda m, x: m.a(x) * (x[:, :1] > 0) + m.b(x), modules={"a": nn.Linear(WIDTH, 2), "b": nn.Linear(WIDTH, 2)}
    )
    dp_model = dpcompile(model, X[:3], max_grad_norm=R)
    for x in (X[:0], -X[:3].abs(), X[:3].abs()):  # an empty batch; one that does not use `a`; one that does
        model.zero_grad()
        dp_model(x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_an_error_in_a_rule_is_not_taken_for_another_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect 8: whatever goes wrong on one path silently chooses the other."""

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("in the rule")

    monkeypatch.setattr(Contraction, "form", broken)
    with pytest.raises(ZeroDivisionError, match="in the rule"):
        dpcompile(nn.Linear(WIDTH, 2), X[:3])


def test_the_forward_is_that_of_the_model() -> None:
    """Defect 21: a forward of the library's own that leaves out dilation and groups: another model, without a word."""
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, dilation=2, stride=2, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(6, 4, 2, groups=2, dilation=2, output_padding=1),
        nn.Flatten(),
    )
    x = torch.randn(3, 4, 9, 8)
    torch.testing.assert_close(dpcompile(model, x)(x), model(x))


def test_a_penalty_on_the_weights_reaches_them() -> None:
    """Defect 28: a term of the loss that depends on parameters alone is dropped, since no layer saw it."""
    model = nn.Linear(WIDTH, 3)
    dp_model = dpcompile(model, X[:3], max_grad_norm=R)
    F.cross_entropy(dp_model(X[:3]), Y[:3]).backward()
    without = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    penalty = sum(p.square().sum() for p in model.parameters())
    (F.cross_entropy(dp_model(X[:3]), Y[:3]) + 0.1 * penalty).backward()
    for p, own in zip(model.parameters(), without, strict=True):
        torch.testing.assert_close(p.grad, own + 0.2 * p.detach())


# ---------------------------------------------------------------- coupling of samples


def test_samples_that_a_model_couples_are_refused() -> None:
    """Defect 23: similarities within the batch, and losses that balance experts over the batch."""

    def contrastive(m: Any, x: Tensor) -> Tensor:
        y = m.f(x)
        return (y @ y.T).log_softmax(1)

    def balanced(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        share = m.f(x).softmax(1)
        return share, share.mean(0).square().sum()

    for forward in (contrastive, balanced):
        with pytest.raises(BatchMixingError):
            dpcompile(Apply(forward, modules={"f": nn.Linear(WIDTH, 3)}), X[:3])


def test_a_loss_that_is_scaled_is_clipped_after_scaling() -> None:
    """Defect 24: a scale of the loss, as for half precision, must not raise the bound of a contribution."""
    model = nn.Linear(WIDTH, 3)
    dp_model = dpcompile(model, X[:3], max_grad_norm=R, loss_reduction="sum")
    for scale in (1.0, 2.0**16):
        assert contribution(model, dp_model, X[:1], torch.full((1, 3), 4 * scale)) <= R * (1 + 1e-5)


# ---------------------------------------------------------------- private training


@cache
def compiled() -> DPModule:
    torch.manual_seed(0)
    return dpcompile(nn.Linear(WIDTH, 3), X[:3], max_grad_norm=R)


def private(**options: Any) -> Private:
    torch.manual_seed(0)
    dp_model = DPModule(nn.Linear(WIDTH, 3), compiled()._emitted)
    optimizer = torch.optim.SGD(dp_model.parameters(), lr=0.1)
    given = {"sample_rate": 0.31, "target_delta": 1e-3, "noise_multiplier": 1.0, "seed": 0, **options}
    return make_private(dp_model, optimizer, TensorDataset(X, Y), **given)


def test_the_expected_batch_size_is_not_rounded() -> None:
    """Defect 16: the divisor int(N q) jumps where N crosses a whole number, and with it the released mean."""
    assert private().optimizer._divisor == pytest.approx(0.31 * N, rel=1e-12)
    assert private(sample_rate=None, batch_size=19).optimizer._divisor == 19


def test_the_criterion_is_left_as_it_is() -> None:
    """Defect 19: a wrapper that sets criterion.reduction = "none" on the user's own object."""
    criterion = nn.CrossEntropyLoss()
    before = {**vars(criterion)}
    made = private(criterion=criterion)
    x, y = next(iter(made.loader))
    criterion(made.dp_model(x), y).backward()
    made.optimizer.step()
    assert vars(criterion) == before
    assert criterion.reduction == "mean"


def test_a_term_that_reads_a_parameter_beside_the_compiled_module_is_refused() -> None:
    """A term of the same loss that computes from data and parameters outside the compiled module is not clipped."""
    made = private()
    x, y = next(iter(made.loader))

    def release() -> None:
        beside = (x @ made.dp_model.module.weight.T).square().sum()
        (F.cross_entropy(made.dp_model(x), y) + beside).backward()
        made.optimizer.step()

    with pytest.raises(PrivacyError):
        release()


# ---------------------------------------------------------------- the table


def rows() -> list[tuple[int, str, str, str]]:
    """Number, defect, how it is ruled out, tests: of every row of the table."""
    found = []
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0].isdecimal():
            number, defect, how, tests = cells
            found.append((int(number), defect, how, tests))
    return found


def named_tests(cell: str) -> list[tuple[str, str]]:
    """File and test of every `path::name` in a cell; a name alone is of this file."""
    found = []
    for name in re.findall(r"`([^`]*test_[^`]*)`", cell):
        path, _, test = name.rpartition("::")
        found.append((path or "tests/test_defects.py", test))
    return found


def defined_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_defect_has_a_row_with_a_reason_or_a_test() -> None:
    found = rows()
    assert [number for number, *_ in found] == list(range(1, 30))
    for number, defect, how, tests in found:
        assert defect, number
        assert how, number
        assert named_tests(tests) or tests == "-", number
    assert [number for number, _, _, tests in found if tests == "-"] == [29]


def test_every_test_of_the_table_exists() -> None:
    for number, _, _, cell in rows():
        for path, test in named_tests(cell):
            assert test in defined_in(path), f"row {number}: {path} has no {test}"


def test_every_test_here_is_in_the_table() -> None:
    named = {test for *_, cell in rows() for path, test in named_tests(cell) if path == "tests/test_defects.py"}
    about_the_table = {name for name in defined_in("tests/test_defects.py") if name.startswith("test_every_")}
    open_ones = {"test_a_term_that_reads_a_parameter_beside_the_compiled_module_is_refused"}
    own = {name for name in defined_in("tests/test_defects.py") if name.startswith("test_")}
    assert own - about_the_table - open_ones == named
    assert all(name in TABLE.read_text() for name in open_ones)

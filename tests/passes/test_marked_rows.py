"""Rows that a mask selects, equally many in each sample: exact where they are given back to their samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from batching_oracle import Lines, assert_samples_apart
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import arithmetic_of, check_against_oracle, splitting_norm
from selection import every
from torch import Generator, Tensor, nn
from zoo import CLASSES, Case, class_loss, labels

from dpcompile import dpcompile
from dpcompile.errors import BatchMixingError
from dpcompile.rules.places import OP

T, D, MARK = 6, 4, 0


class Marked(nn.Module):
    """Reads the states at the marks of each text; `read` makes [B, CLASSES] of the texts' states and the mask."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], features: int = D) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, D), nn.Linear(D, D), nn.Linear(features, CLASSES)
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.read(self.mix(self.embed(ids)).cumsum(1).tanh(), ids == MARK))


def texts(marks: int) -> Callable[[int, Generator], Tensor]:
    """Ids of which `marks` in each text are marks, anywhere."""

    def draw(batch_size: int, generator: Generator) -> Tensor:
        ids = torch.randint(1, 9, (batch_size, T), generator=generator)
        places = torch.rand(batch_size, T, generator=generator).argsort(1)[:, :marks]
        return ids.scatter(1, places, MARK)

    return draw


READS = {
    "the last": (2, D, lambda h, mask: h[mask, :].view(h.shape[0], -1, D)[:, -1, :]),
    "the first": (3, D, lambda h, mask: h[mask].view(h.shape[0], -1, D)[:, 0]),
    "the first and the last": (3, D, lambda h, m: (r := h[m].view(h.shape[0], -1, D))[:, 1] * r[:, -2]),
    "the only one": (1, D, lambda h, mask: h[mask].reshape(h.shape[0], D)),
    "two": (2, 2 * D, lambda h, mask: h[mask].view(h.shape[0], 2, D).flatten(1)),
}


@pytest.mark.parametrize("name", every(2, READS))
def test_marked_states_equal_one_sample_at_a_time(name: str, subtests: pytest.Subtests) -> None:
    marks, features, read = READS[name]
    torch.manual_seed(0)
    case = Case(name, Marked(read, features).double(), texts(marks), labels, class_loss)
    with arithmetic_of(torch.float64):
        bound = splitting_norm(case, 3)
        dp_model = dpcompile(case.model, case.sample_input, max_grad_norm=bound)
        for batch_size in (3, 1, 5, 0):
            with subtests.test(batch_size=batch_size):
                check_against_oracle(case, dp_model, batch_size, max_grad_norm=bound)


@pytest.mark.parametrize("name", ["the last", "the only one"])
def test_texts_with_different_numbers_of_marks_stop_the_run(name: str) -> None:
    """The view would give one text the mark of another: two and one become a list of three, and so on."""
    marks, features, read = READS[name]
    draw = texts(marks)
    dp_model = dpcompile(Marked(read, features), draw(2, torch.Generator()))
    more, fewer = (texts(n)(1, torch.Generator()) for n in (marks + 1, marks - 1))
    with pytest.raises(RuntimeError, match="samples differ in how many they have"):
        dp_model(torch.cat([more, fewer]))
    assert dp_model(draw(4, torch.Generator())).isfinite().all()


@pytest.mark.parametrize(("name", "found"), every(3, [("the last", 0), ("the only one", 0), ("the only one", 2)]))
def test_a_single_text_of_another_number_gives_nan_and_not_another_state(name: str, found: int) -> None:
    marks, features, read = READS[name]
    dp_model = dpcompile(Marked(read, features), texts(marks)(2, torch.Generator()))
    assert dp_model(texts(found)(1, torch.Generator())).isnan().all()


@pytest.mark.parametrize(
    "read",
    [
        lambda h, mask: h[mask].mean(0).expand(h.shape[0], D),
        lambda h, mask: h[mask].view(h.shape[0], -1, D).mean(1),
        lambda h, mask: h[mask].view(-1, h.shape[0], D)[0],
    ],
)
def test_other_reads_of_marked_states_are_refused(read: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(BatchMixingError, match="number of elements that depends on the data of all samples"):
        dpcompile(Marked(read), texts(2)(2, torch.Generator()))


@settings(max_examples=30, deadline=None)
@given(B=st.integers(0, 4), T=st.integers(1, 6), marks=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_marked_places_are_those_of_nonzero(B: int, T: int, marks: int, seed: int) -> None:
    marks = min(marks, T)
    torch.manual_seed(seed)
    mask = torch.zeros(B, T, dtype=torch.bool).scatter(1, torch.rand(B, T).argsort(1)[:, :marks], True)
    order = list(range(-marks, marks))
    expected = [[row.nonzero().flatten()[n].item() for n in order] for row in mask]
    assert OP(mask, order, -1).tolist() == expected == OP(mask, order, marks).tolist()


def test_marked_places_keep_samples_apart() -> None:
    def peaks(self: Lines, x: Tensor) -> Tensor:
        places = OP(x[:, :, 0] == x[:, :, 0].amax(1, keepdim=True), [0, -1], 1)
        return F.linear(x.gather(1, places[..., None].expand(-1, -1, 6)), self.weight)

    assert_samples_apart(Lines(peaks), torch.randn(4, 5, 6))

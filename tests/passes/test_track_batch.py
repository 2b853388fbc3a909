"""track-batch on whole models: what passes, what is refused and how it is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._higher_order_ops as higher_order
import torch.nn.functional as F
import transformers
from batching_oracle import Lines, assert_refuses_the_marked_lines, assert_samples_apart, tracked
from selection import every
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpcompile.errors import BatchMixingError, NoRuleError
from dpcompile.ir import Axis, Kind, Value
from dpcompile.passes.check_supported import check_supported

B, T, D = 4, 3, 6
IDS = torch.randint(3, 23, (B, 5))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
PIXELS = torch.randn(B, 3, 16, 16)
TEXT = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=23, n_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2ForSequenceClassification(config), {"input_ids": IDS, "attention_mask": MASK}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(num_key_value_heads=1, **TEXT)
    return transformers.LlamaForCausalLM(config), {"input_ids": IDS, "attention_mask": MASK}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(
        vocab_size=23, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, use_cache=False
    )
    inputs = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS}
    return transformers.T5ForConditionalGeneration(config), inputs


def swin() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4, num_labels=3
    )
    return transformers.SwinForImageClassification(config), {"pixel_values": PIXELS}


def recurrent() -> tuple[nn.Module, Tensor]:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(D, 4, bidirectional=True)  # sequence first

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x.transpose(0, 1))[0][-1]

    return Recurrent(), torch.randn(B, T, D)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "build", [gpt2, recurrent, *(pytest.param(build, marks=pytest.mark.slow) for build in (llama, t5, swin))]
)
def test_every_node_of_a_model_is_what_tracking_says(build: Any) -> None:
    model, inputs = build()
    assert_samples_apart(model.eval(), inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", every(2, [gpt2, swin]))
def test_a_model_with_its_dropout_keeps_samples_apart(build: Any) -> None:
    model, inputs = build()
    assert_samples_apart(model.train(), inputs, position_free=False)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0)
        return x - mean


class Averaged(nn.Module):
    """Keeps a running mean of its input."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.mean(0).detach(), alpha=0.1)
        return x * 2


class Cached(nn.Module):
    """Keeps the first row of its last input."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        self.last.copy_(x.detach().amax(0))
        return x * 2


class Warmed(nn.Module):
    """Counts the samples that it has seen."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[0]
        return x * 2


class Counted(nn.Module):
    """Counts its calls in buffers, which depend on no data."""

    calls: Tensor
    decay: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("decay", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.decay.mul_(0.9)
        return x * self.calls * self.decay.sum()


def test_every_offender_is_in_one_message_with_module_line_and_cure() -> None:
    model = nn.Sequential(nn.Linear(D, D), Centred(), nn.BatchNorm1d(D), nn.Linear(D, D))
    program, found = tracked(model, torch.randn(B, D))
    with pytest.raises(BatchMixingError) as refused:
        check_supported(program, found)
    message = str(refused.value)
    assert message.startswith("check-supported: the model is refused")
    assert "1. `1` (Centred): sub is not linear in a sum over the samples of the batch" in message
    assert "(taken at passes/test_track_batch.py:" in message
    assert "return x - mean" in message
    assert "2. `2` (BatchNorm1d): batch_norm in training mode" in message
    assert "cure: Replace BatchNorm by nn.GroupNorm" in message
    assert len(refused.value.findings) == 2


def test_what_only_has_no_rule_is_another_error() -> None:
    class Reflected(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.householder_product(x, x[:, 0])

    program, found = tracked(nn.Sequential(Reflected()), torch.randn(B, D, D))
    with pytest.raises(NoRuleError, match=r"`0` \(Reflected\): linalg_householder_product has no batching rule"):
        check_supported(program, found)


@pytest.mark.parametrize(
    ("writer", "problem", "cure"),
    [
        (Averaged, "writes data of the batch to the buffer `1.mean`", "Remove the buffer update"),
        (Cached, "goes over the samples of the batch", "for each sample by itself"),
        (Warmed, "depends on the number of samples in the batch", "Use a constant"),
    ],
)
def test_what_a_buffer_keeps_of_the_batch_is_a_leak(writer: type[nn.Module], problem: str, cure: str) -> None:
    _, found = tracked(nn.Sequential(nn.Linear(D, D), writer()), torch.randn(B, D))
    assert [(f.module, f.module_type) for f in found.findings] == [("1", writer.__name__)]
    assert problem in found.findings[0].problem
    assert cure in found.findings[0].cure
    assert "test_track_batch.py" in found.findings[0].line


def test_a_buffer_that_keeps_the_rows_of_the_batch_is_a_leak() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.zeros(2, D))

        def forward(self, x: Tensor) -> Tensor:
            self.rows[0] = x[0].detach()
            return x * 2

    _, found = tracked(nn.Sequential(Rows()), torch.randn(B, D))
    assert ["picks one sample of the batch" in f.problem for f in found.findings] == [True]


def chosen(self: Any, x: Tensor) -> Any:
    return torch.cond(self.weight.sum() > 0, torch.sin, torch.cos, (x,))


def mapped(self: Any, x: Tensor) -> Any:
    return higher_order.map(torch.sin, x)


@pytest.mark.parametrize(("fn", "op", "cure"), [(chosen, "cond", "torch.where"), (mapped, "map_impl", "torch.vmap")])
def test_regions_of_their_own_are_refused_with_what_to_write_instead(fn: Any, op: str, cure: str) -> None:
    program, found = tracked(Lines(fn), torch.randn(B, D))
    with pytest.raises(NoRuleError, match=rf"{op} runs a part of the model by itself(.|\n)*{cure}"):
        check_supported(program, found)


def test_regions_that_torch_writes_out_are_followed() -> None:
    def fn(self: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            cast = (x @ self.weight).relu()
        with torch.no_grad():
            fixed = (x @ self.weight).softmax(-1)
        again = checkpoint(lambda y: (y @ self.weight).tanh(), x, use_reentrant=False)
        return cast.float(), fixed * x, again, torch.func.vmap(torch.sin)(x)

    assert_samples_apart(Lines(fn), torch.randn(B, D))


def test_samples_that_meet_in_a_region_are_named_by_the_line_there() -> None:
    def fn(self: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = (x @ self.weight).softmax(0)  # refused: over the samples
        return y, checkpoint(lambda z: z - z.amax(0), x, use_reentrant=False)  # refused: over the samples

    assert_refuses_the_marked_lines(fn, torch.randn(B, D))


def test_composed_ops_without_a_rule_are_written_out() -> None:
    def fn(self: Any, x: Tensor) -> Any:
        return (
            torch.hstack([x, x]) + torch.dstack([x, x]).flatten(1),
            torch.quantile(x, 0.3, dim=1) + torch.trapezoid(x, dim=1),
            torch.addr(self.weight[:1], x[:, 0], self.weight[0]) + torch.renorm(x, 2, 0, 1.0),
            torch.fft.hfft(x, dim=1) + torch.fft.ihfft(x, dim=1).abs().sum(1, True),
            x.fliplr() + F.multi_margin_loss(x, x[:, 0].long() * 0, reduction="none")[:, None],
        )

    assert_samples_apart(Lines(fn), torch.randn(B, D))


def test_a_composed_op_that_mixes_is_refused_under_its_own_line() -> None:
    def fn(self: Any, x: Tensor) -> Any:
        return (
            torch.msort(x),  # refused: over the samples
            x.flipud(),  # refused: order of the samples
            torch.vstack([x, self.weight]),  # refused: appends rows
        )

    assert_refuses_the_marked_lines(fn, torch.randn(B, D))


def test_an_op_that_cannot_be_written_out_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("needs numbers for its sizes")

    monkeypatch.setattr("dpcompile.passes.capture.made_of", lambda op: fails)
    with pytest.raises(NoRuleError, match=r"hstack has no batching rule\n      at passes/test_track_batch.py"):
        tracked(Lines(lambda self, x: torch.hstack([x, x])), torch.randn(B, D))


def test_a_buffer_that_depends_on_no_data_may_be_written() -> None:
    assert_samples_apart(nn.Sequential(nn.Linear(D, D), Counted()), torch.randn(B, D))


def test_values_that_reach_no_output_are_not_reported() -> None:
    def fn(self: Any, x: Tensor) -> Any:
        unused = x.softmax(0) + torch.arange(x.shape[0])[:, None]
        return x * 2, torch.zeros_like(unused), unused.shape[1], x.argmax(0)

    assert not tracked(Lines(fn), torch.randn(B, D))[1].findings


@pytest.mark.parametrize(
    ("fn", "problem"),
    [
        (lambda self, x: x.sum(0), "a sum over samples"),
        (lambda self, x: x.mean(), "a mean over samples"),
        (lambda self, x: self.weight * 2, "parameters alone"),
        (lambda self, x: x @ x.t(), "every other sample"),
    ],
)
def test_outputs_that_are_not_per_sample_are_refused(fn: Any, problem: str) -> None:
    _, found = tracked(Lines(lambda self, x: (x @ self.weight, fn(self, x))), torch.randn(B, D))
    assert [problem in finding.problem for finding in found.findings] == [True]


def test_an_output_that_is_constant_is_no_concern() -> None:
    assert not tracked(Lines(lambda self, x: (x, torch.ones(3))), torch.randn(B, D))[1].findings


def test_only_what_a_gradient_can_reach_trains() -> None:
    def fn(self: Any, x: Tensor) -> Any:
        y = x @ self.weight
        return (
            y,
            y.detach(),
            y.argmax(-1),
            x * 2,
            x @ self.weight.detach(),
            x + self.frozen.weight,
            x[:, self.weight[0].argmax()],
        )

    model = Lines(fn, frozen=nn.Linear(D, 1).requires_grad_(False))
    program, found = tracked(model, torch.randn(B, D))
    values = [found.value(program.node(output.node or "")) for output in program.outputs]
    assert [value.trains for value in values] == [True, *[False] * 6]
    assert {value.kind for value in values} == {Kind.BATCHED}


def test_derived_parameters_are_told_from_constants() -> None:
    def fn(self: Any, x: Tensor) -> Any:
        low_rank = self.weight[:, :2] @ self.weight[:2]
        position = torch.arange(6)
        return x @ low_rank, x + position, x @ low_rank.detach()

    program, found = tracked(Lines(fn), torch.randn(B, D))
    kinds = [found.value(node).kind for node in program.graph.nodes if node.op == "call_function"]
    assert kinds.count(Kind.PARAMETER) >= 3
    assert found.value(program.node("arange")) == Value(Kind.CONSTANT)
    assert found.value(program.node("detach")).kind is Kind.CONSTANT


def test_the_batch_may_lie_in_another_dimension() -> None:
    program, found = tracked(nn.Linear(D, 2), torch.randn(T, B, D), batched=[1])
    assert found.value(program.node("linear")) == Value(Kind.BATCHED, Axis(1), trains=True)

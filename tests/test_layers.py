"""Layers and layouts made of several sites: shared weights, recurrent cells, attention, frozen and unused parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import FORCED, Apply, TiedLanguageModel, check_module, folded_loss, loss_at, randomised
from torch import Tensor, nn

from dpcompile import dpcompile

T, D, P, V = 3, 4, 5, 6
FEW = ("auto", "forced-explicit")  # for what takes long to compile
IDS = torch.tensor([[0, 1, 2], [5, 3, 4], [4, 4, 1]])

# ------------------------------------------------------------ weights used more than once


@pytest.mark.parametrize("padding", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_tied_embedding_and_head(padding: int | None) -> None:
    found = check_module(TiedLanguageModel(padding=padding), IDS, reduction="mean", methods=FORCED)
    assert found.emitted["ghost"].plan.method("embed.weight").value == "ghost"
    assert found.emitted["explicit"].plan.method("embed.weight").value != "ghost"


def test_one_table_looked_up_twice() -> None:
    check_module(
        Apply(lambda m, ids: m.e(ids) * m.e(ids.flip(1)), modules={"e": nn.Embedding(V, D)}), IDS, methods=FORCED
    )


def test_layer_called_three_times() -> None:
    module = Apply(lambda m, x: m.f(m.f(m.f(x).tanh()).sin()), modules={"f": nn.Linear(D, D)})
    found = check_module(module, torch.randn(3, T, D), methods=FORCED)
    assert len(found.analysis.uses.groups) == 2


def test_convolution_called_twice() -> None:
    module = Apply(lambda m, x: m.f(m.f(x).tanh()), modules={"f": nn.Conv1d(D, D, 2, groups=2)})
    check_module(module, torch.randn(3, D, T + 1), methods=FORCED)


def test_group_of_blocks_shared_as_in_albert() -> None:
    block = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, P), nn.GELU(), nn.Linear(P, D))
    check_module(Apply(lambda m, x: x + m.f(x + m.f(x)), modules={"f": block}), torch.randn(3, T, D))


def test_weight_used_forwards_and_transposed() -> None:
    """A tied autoencoder: encode by W, decode by W.T."""
    module = Apply(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()), w=(P, D))
    found = check_module(module, torch.randn(3, T, D), methods=FORCED)
    assert found.emitted["ghost"].plan.method("w").value == "ghost"


def test_weight_used_in_two_layouts_that_share_no_factor() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 3))  # [B, T, H, D]
        first = torch.einsum("bthd,hdp->btp", heads, m.w)
        return torch.einsum("btp,hdp->btd", first.tanh(), m.w)

    check_module(Apply(run, w=(2, 3, 3)), torch.randn(3, T, 6), methods=FORCED)


def test_grouped_and_plain_convolution_share_a_kernel() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.conv1d(x, m.w, groups=2).sum(1, keepdim=True) * F.conv1d(x[:, :2], m.w)

    check_module(Apply(run, w=(4, 2, 2)), torch.randn(3, 4, 4), methods=FORCED)


def test_weight_as_kernel_and_as_scale() -> None:
    check_module(Apply(lambda m, x: F.linear(x, m.w) + x * m.w, w=(D, D)), torch.randn(3, D, D), methods=FORCED)


def test_one_bias_of_two_layers() -> None:
    module = Apply(lambda m, x: F.linear(F.linear(x, m.u, m.b).tanh(), m.v, m.b), u=(D, D), v=(D, D), b=(D,))
    check_module(module, torch.randn(3, T, D))


def test_parameter_under_two_names() -> None:
    first, second = nn.Linear(D, D), nn.Linear(D, D)
    second.weight = first.weight
    check_module(nn.Sequential(first, nn.Tanh(), second), torch.randn(3, T, D))


# ------------------------------------------------------------ recurrent cells


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in (nn.RNNCell, nn.GRUCell)), nn.LSTMCell]
)
def test_cell_called_in_a_loop(kind: type[nn.RNNCellBase]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        zeros = x.new_zeros(x.shape[0], 3)
        state: Any = (zeros, zeros) if kind is nn.LSTMCell else zeros
        for t in range(2):
            state = m.cell(x[:, t], state)
        return state[0] if kind is nn.LSTMCell else state

    check_module(Apply(run, modules={"cell": kind(D, 3)}), torch.randn(3, T, D), methods=FEW)


# ------------------------------------------------------------ attention


SLOW_OPTIONS = [pytest.param(options, marks=pytest.mark.slow) for options in ({}, {"kdim": 3, "vdim": 2})]


@pytest.mark.parametrize("options", [{"bias": False, "add_bias_kv": True}, *SLOW_OPTIONS], ids=str)
def test_multihead_attention(options: dict[str, Any]) -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(D, 2, batch_first=True, **options)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(q, k, v, need_weights=False)[0]

    sizes = (D, options.get("kdim", D), options.get("vdim", D))
    check_module(Attend(), tuple(torch.randn(3, T, size) for size in sizes), methods=FEW)


@pytest.mark.slow
def test_multihead_attention_of_a_sequence_with_weights() -> None:
    """Self attention with the sequence first: one packed projection."""
    module = Apply(lambda m, x: m.f(x, x, x)[0], modules={"f": nn.MultiheadAttention(D, 2)})
    check_module(module, (torch.randn(T, 3, D),), batched=[1], loss=loss_at(1), methods=FEW)


@pytest.mark.slow
def test_sequence_first_inside_a_batch_first_model() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.f(x.transpose(0, 1)).transpose(0, 1)

    layer = nn.TransformerEncoderLayer(D, 2, dim_feedforward=P, dropout=0.0)
    check_module(Apply(run, modules={"f": layer}), torch.randn(3, T, D), batch_sizes=(3, 1), methods=FEW)


def test_causal_attention_with_grouped_queries() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q = m.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (2, 2)).transpose(1, 2) for f in (m.k, m.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)

    modules = {"q": nn.Linear(D, 8), "k": nn.Linear(D, 4), "v": nn.Linear(D, 4)}
    check_module(Apply(run, modules=modules), torch.randn(3, T, D))


# ------------------------------------------------------------ layouts of the batch


def test_batch_folded_and_unfolded_around_windows() -> None:
    """As in Swin: windows of the picture become rows beside the batch."""

    def run(m: Any, x: Tensor) -> Tensor:
        windows = x.view(-1, 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, D)  # [B * 4, 4, D]
        scores = (m.q(windows) @ windows.transpose(1, 2) + m.bias).softmax(-1)
        return (scores @ windows * m.scale).view(-1, 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, D)

    module = Apply(run, modules={"q": nn.Linear(D, D)}, bias=(4, 4), scale=(D,))
    check_module(module, torch.randn(3, 4, 4, D))


def test_an_op_whose_backward_writes_in_place_behind_a_transposed_layer() -> None:
    """Its gradient has other strides than the layer's result, so what could be viewed has to be copied."""

    def run(m: Any, x: Tensor) -> Tensor:
        return torch.maximum(m.f(x).transpose(0, 1), m.least).transpose(0, 1)

    check_module(Apply(run, modules={"f": nn.Linear(D, P)}, least=(P,)), torch.randn(3, T, D))


def test_two_inputs_with_their_batches_at_different_dimensions() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Linear(D, P), nn.Linear(D, P)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.u(x) * self.v(y).transpose(0, 1)

    check_module(Two(), {"x": torch.randn(3, T, D), "y": torch.randn(T, 3, D)}, batched={"x": 0, "y": 1})


def test_an_input_without_a_batch() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(D, P)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.f(x * mask)

    sample = {"x": torch.randn(3, T, D), "mask": (torch.rand(T, 1) > 0.5).double()}
    check_module(Masked(), sample, batched={"mask": None})


def test_output_with_folded_batch() -> None:
    check_module(nn.Sequential(nn.Flatten(0, 1), nn.Linear(D, P)), torch.randn(3, T, D), loss=folded_loss(T))


# ------------------------------------------------------------ frozen, unused, without gradient


def test_frozen_parameters_have_no_site_and_no_gradient() -> None:
    module = nn.Sequential(nn.Linear(D, P), nn.Tanh(), nn.Linear(P, 2))
    module[0].requires_grad_(False)
    module[2].bias.requires_grad_(False)
    found = check_module(module, torch.randn(3, T, D))
    assert [group.name for group in found.analysis.uses.groups] == ["2.weight"]
    assert module[0].weight.grad is None


def test_unused_parameter_is_reported() -> None:
    found = check_module(Apply(lambda m, x: x * m.used, used=(D,), spare=(D,)), torch.randn(3, T, D))
    assert found.plan.unused == ("spare",)


def test_parameter_behind_a_detach_is_reported_as_unused() -> None:
    found = check_module(Apply(lambda m, x: (x * m.a).detach() + x * m.b, a=(D,), b=(D,)), torch.randn(3, T, D))
    assert found.plan.unused == ("a",)


def test_detach_stops_the_gradient_where_autograd_stops_it() -> None:
    module = Apply(lambda m, x: m.v(m.u(x).detach()) + m.u(x), modules={"u": nn.Linear(D, P), "v": nn.Linear(P, P)})
    check_module(module, torch.randn(3, T, D))


def test_no_grad_region_has_no_gradient() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = m.u(x).sigmoid()
        return gate * m.v(x) + m.u(x.flip(1))

    check_module(Apply(run, modules={"u": nn.Linear(D, P), "v": nn.Linear(D, P)}), torch.randn(3, T, D))


def test_parameter_detached_before_its_use() -> None:
    check_module(Apply(lambda m, x: x * m.w.detach() + x * m.w.exp(), w=(D,)), torch.randn(3, T, D))


def test_straight_through_estimator() -> None:
    """Rounded in the forward, passed through in the backward."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        return h + (h.round() - h).detach()

    check_module(Apply(run, modules={"f": nn.Linear(D, P)}), torch.randn(3, T, D))


def test_checkpointed_region() -> None:
    from torch.utils.checkpoint import checkpoint

    def run(m: Any, x: Tensor) -> Tensor:
        return m.v(checkpoint(lambda h: m.u(h).tanh(), x, use_reentrant=False))

    check_module(Apply(run, modules={"u": nn.Linear(D, P), "v": nn.Linear(P, 2)}), torch.randn(3, T, D))


def test_dropout_shows_norms_and_gradients_one_mask() -> None:
    """With clipping to the norm of a batch of one, the gradient has exactly the norm that was reported."""
    module = randomised(nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)))
    dp_model = dpcompile(module, torch.randn(3, D, dtype=torch.double), max_grad_norm=float("inf"))
    for seed in range(3):
        torch.manual_seed(seed)
        module.zero_grad()
        dp_model(torch.randn(1, D, dtype=torch.double)).square().sum(1).mean().backward()
        norm = sum(p.grad.square().sum() for p in module.parameters()).sqrt()
        torch.testing.assert_close(dp_model.per_sample_norms, norm.reshape(1), rtol=1e-10, atol=0)

"""Products and attention: the batch must survive, on one side or on both as the same dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from batching_oracle import Lines, assert_refuses_the_marked_lines, assert_samples_apart, tracked
from torch import Tensor

B, T, D = 4, 3, 6


def products(self: Any, x: Tensor) -> Any:  # x: [B, T, D]
    w, rows = self.weight, x.reshape(-1, D)
    heads = x.view(x.shape[0], T, 2, 3).transpose(1, 2).reshape(-1, T, 3)  # B x 2
    return (
        rows.mm(w),
        w.mm(rows.t()),
        torch.addmm(w[0], rows, w),
        torch.bmm(heads, heads.mT),
        torch.baddbmm(heads[:, :, :1], heads, heads.mT),
        x @ w + x.matmul(w[0])[..., None],
        w @ x.mT,
        F.linear(x, w, w[0]),
        x[:, 0].mv(w[0]) + torch.addmv(x[:, 0, 0], x[:, 0], w[0]),
        torch.outer(w[0], x[:, 0, 0]),
        torch.einsum("btd,de->bte", x, w),
        torch.einsum("bid,bjd->bij", x, x),
        torch.einsum("...d,...d->...", x, x),
        torch.einsum("tbd,de", x.transpose(0, 1), w),
        torch.tensordot(x, w, 1),
        torch.tensordot(w, x, ([0], [2])),
        self.bilinear(x, x),
        torch.cdist(x, x),
        F.cosine_similarity(x, x.flip(1), dim=-1) + F.pairwise_distance(x, w[:T]),
    )


def attention(self: Any, x: Tensor, m: Tensor) -> Any:  # x: [B, T, D], m: [B, T] bool
    q = x.view(x.shape[0], T, 2, 3).transpose(1, 2)
    learned = self.weight[:T, :D].view(1, T, 2, 3).transpose(1, 2)
    return (
        F.scaled_dot_product_attention(q, q, q, is_causal=True),
        F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], enable_gqa=True),
        F.scaled_dot_product_attention(q, q, q, attn_mask=m[:, None, None, :]),
        F.scaled_dot_product_attention(learned.expand(x.shape[0], -1, -1, -1), q, q),
        F.scaled_dot_product_attention(q.flatten(0, 1), q.flatten(0, 1), q.flatten(0, 1)),
        self.mha(x, x, x, key_padding_mask=m),
    )


def test_products_keep_samples_apart() -> None:
    assert_samples_apart(Lines(products, bilinear=torch.nn.Bilinear(D, D, 2)), torch.randn(B, T, D))


def test_attention_keeps_samples_apart() -> None:
    model = Lines(attention, mha=torch.nn.MultiheadAttention(D, 2, batch_first=True))
    assert_samples_apart(model, (torch.randn(B, T, D), torch.zeros(B, T, dtype=torch.bool)))


def test_sequence_first_attention_keeps_samples_apart() -> None:
    model = Lines(lambda self, x: self.mha(x, x, x), mha=torch.nn.MultiheadAttention(D, 2))
    assert_samples_apart(model, torch.randn(T, B, D), [1])


def test_products_across_samples_are_refused() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        first, s = x[:, 0], x.view(x.shape[0], T, 2, 3).transpose(0, 2)
        return (
            first @ first.t(),  # refused: multiplies every sample with every other
            first.t() @ first,  # refused: sums a product
            torch.einsum("id,jd->ij", first, first),  # refused: multiplies every sample
            torch.cdist(first, first),  # refused: multiplies every sample
            first[:, 0].dot(first[:, 1]),  # refused: sums a product
            F.linear(x, first.detach()),  # refused: multiplies every sample
            F.scaled_dot_product_attention(s, s, s),  # refused: multiplies every sample
        )

    assert_refuses_the_marked_lines(forward, torch.randn(B, T, D))


def test_attention_that_takes_the_batch_for_the_sequence_is_refused() -> None:
    model = Lines(lambda self, x: self.mha(x, x, x)[0], mha=torch.nn.MultiheadAttention(D, 2))
    _, found = tracked(model, torch.randn(B, T, D))
    assert {finding.module for finding in found.findings} == {"mha"}
    assert all(finding.mixes for finding in found.findings)

"""Which rule tells where the batch goes in which op. The table is the whole list: an op without a rule is refused.

A rule is a function from a `Call` to a `Value` (or one for each result); it raises `Mixes` where samples meet. It is
asked only where the batch takes part: the tracker itself answers for ops whose inputs are all constants or parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dpcompile.recurrent import OPS
from dpcompile.rules import places
from dpcompile.rules.batching import (
    attention,
    constructors,
    contractions,
    folds,
    indexing,
    local,
    losses,
    norms,
    pointwise,
    recurrent,
    reductions,
    views,
)
from dpcompile.rules.batching.base import Call, Mixes, Result

aten = torch.ops.aten

Rule = Callable[[Call], Result]


def _aten(rule: Rule, names: str) -> dict[Any, Rule]:
    """Table lines for every named op that this torch has."""
    return {getattr(aten, name): rule for name in names.split() if hasattr(aten, name)}


COPIES = {
    **_aten(pointwise.unary, "clone _to_copy to alias detach lift_fresh lift_fresh_copy contiguous type_as"),
    **_aten(pointwise.unary, "resolve_conj resolve_neg"),
}
VIEWS = {
    **_aten(folds.reshape, "view reshape _unsafe_view _reshape_alias view_as reshape_as flatten unflatten view_copy"),
    **_aten(views.permute, "permute permute_copy"),
    **_aten(views.transpose, "transpose swapaxes swapdims transpose_copy"),
    **_aten(views.transpose_last, "t mT mH adjoint t_copy"),
    **_aten(views.movedim, "movedim moveaxis"),
    **_aten(views.unsqueeze, "unsqueeze unsqueeze_copy"),
    **_aten(views.squeeze, "squeeze squeeze_copy"),
    **_aten(folds.expand, "expand broadcast_to expand_as expand_copy"),
    **_aten(folds.broadcast_tensors, "broadcast_tensors"),
    **_aten(folds.cat, "cat concat concatenate"),
    **_aten(views.stack, "stack"),
    **_aten(folds.repeat, "repeat tile"),
    **_aten(folds.repeat_interleave, "repeat_interleave"),
    **_aten(views.select, "select select_copy"),
    **_aten(folds.slice_, "slice slice_copy narrow"),
    **_aten(folds.split, "split split_with_sizes split_copy split_with_sizes_copy chunk tensor_split unsafe_chunk"),
    **_aten(folds.split, "unsafe_split unsafe_split_with_sizes"),
    **_aten(views.unbind, "unbind unbind_copy"),
    **_aten(views.unfold, "unfold unfold_copy"),
    **_aten(views.diagonal, "diagonal diagonal_copy"),
    **_aten(views.diag_embed, "diag_embed"),
    **_aten(views.as_strided, "as_strided as_strided_copy"),
    **_aten(views.as_real, "view_as_real view_as_complex"),
}
POINTWISE = {
    **_aten(pointwise.pointwise, "where masked_fill lerp addcmul addcdiv clamp clamp_min clamp_max"),
    **_aten(pointwise.among, "isin bucketize"),
    **_aten(pointwise.pointwise, "rsub bernoulli poisson normal_functional exponential rrelu"),
    **_aten(pointwise.pointwise, "uniform normal cauchy geometric log_normal random gelu"),
    **_aten(pointwise.several, "native_dropout log_sigmoid_forward frexp rrelu_with_noise_functional"),
    **_aten(pointwise.pointwise, "dropout alpha_dropout isclose float_power"),
    **_aten(pointwise.pointwise, "__and__ __or__ __xor__ __lshift__ __rshift__ floor_divide hardswish"),
    **_aten(pointwise.pointwise, "real imag conj _conj complex polar _prelu_kernel"),
    **_aten(pointwise.pointwise, "log_sigmoid absolute divide multiply subtract true_divide negative fix isreal"),
    **_aten(pointwise.pointwise, "greater greater_equal less less_equal not_equal arcsin arccos arctan arctan2"),
    **_aten(pointwise.pointwise, "arcsinh arccosh arctanh special_digamma special_erf special_erfc special_erfinv"),
    **_aten(
        pointwise.pointwise, "special_exp2 special_expit special_expm1 special_gammaln special_log1p special_logit"
    ),
    **_aten(
        pointwise.pointwise, "special_psi special_ndtr special_round special_sinc special_xlogy special_i0 isfinite"
    ),
    **_aten(pointwise.copy, "copy"),
    aten.max.other: pointwise.pointwise,
    aten.min.other: pointwise.pointwise,
}
REDUCTIONS = {
    **_aten(reductions.reduce_sum, "sum"),
    **_aten(reductions.reduce_mean, "mean"),
    **_aten(reductions.reduce, "amax amin aminmax argmax argmin max min median nanmedian mode kthvalue prod nansum"),
    **_aten(reductions.reduce, "nanmean var std var_mean std_mean logsumexp norm linalg_vector_norm all any"),
    **_aten(reductions.reduce, "count_nonzero special_logsumexp linalg_norm linalg_matrix_norm"),
    **_aten(reductions.along, "softmax _softmax log_softmax _log_softmax cumsum cumprod cummax cummin logcumsumexp"),
    **_aten(reductions.along, "sort argsort topk diff glu special_softmax special_log_softmax _safe_softmax"),
    **_aten(reductions.along, "fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn"),
    **_aten(reductions.along, "fft_ifftn fft_rfftn fft_irfftn _fft_r2c _fft_c2c _fft_c2r fft_fftshift fft_ifftshift"),
    **_aten(reductions.flip, "flip rot90"),
    **_aten(reductions.roll, "roll"),
    **_aten(reductions.aligned_along, "linalg_cross cross"),
    **_aten(reductions.last_two, "tril triu linalg_inv linalg_inv_ex inverse linalg_cholesky linalg_cholesky_ex"),
    **_aten(reductions.last_two, "linalg_qr linalg_svd linalg_svdvals linalg_eigh linalg_eigvalsh linalg_matrix_power"),
    **_aten(reductions.last_two, "linalg_det det linalg_slogdet slogdet logdet matrix_exp linalg_pinv"),
    **_aten(reductions.last_two, "linalg_eig linalg_eigvals linalg_matrix_exp linalg_lu linalg_lu_factor"),
    **_aten(reductions.last_two, "linalg_lu_factor_ex linalg_ldl_factor linalg_ldl_factor_ex cholesky_inverse"),
}
CONTRACTIONS = {
    **_aten(contractions.mm, "mm"),
    **_aten(contractions.bmm, "bmm"),
    **_aten(contractions.addmm, "addmm"),
    **_aten(contractions.baddbmm, "baddbmm"),
    **_aten(contractions.addbmm, "addbmm"),
    **_aten(contractions.mv, "mv"),
    **_aten(contractions.addmv, "addmv"),
    **_aten(contractions.dot, "dot vdot"),
    **_aten(contractions.outer, "outer ger"),
    **_aten(contractions.inner, "inner"),
    **_aten(contractions.linear, "linear"),
    **_aten(contractions.matmul, "matmul linalg_matmul"),
    **_aten(contractions.einsum, "einsum"),
    **_aten(contractions.tensordot, "tensordot"),
    **_aten(contractions.bilinear, "bilinear"),
    **_aten(contractions.solve, "linalg_solve linalg_solve_triangular cholesky_solve linalg_lu_solve"),
    **_aten(contractions.cdist, "cdist _cdist_forward"),
    **_aten(contractions.similarity, "cosine_similarity pairwise_distance linalg_vecdot"),
}
ATTENTION = {
    **_aten(attention.attention, "scaled_dot_product_attention"),
    **_aten(attention.fused, "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu"),
    **_aten(attention.fused, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
}
RECURRENCE: dict[Any, Rule] = dict.fromkeys(OPS, recurrent.recurrence)
LOCAL = {
    **_aten(local.conv, "conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d"),
    **_aten(local.conv, "conv_transpose3d"),
    **_aten(partial(local.leading, worked_on=1), "avg_pool1d max_pool1d max_pool1d_with_indices adaptive_avg_pool1d"),
    **_aten(partial(local.leading, worked_on=1), "adaptive_max_pool1d upsample_nearest1d upsample_linear1d"),
    **_aten(partial(local.leading, worked_on=1), "_upsample_nearest_exact1d multinomial stft"),
    **_aten(local.searchsorted, "searchsorted"),
    **_aten(partial(local.leading, worked_on=2), "avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d"),
    **_aten(partial(local.leading, worked_on=2), "adaptive_max_pool2d _adaptive_avg_pool2d upsample_nearest2d"),
    **_aten(partial(local.leading, worked_on=2), "upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d"),
    **_aten(partial(local.leading, worked_on=2), "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
    **_aten(partial(local.leading, worked_on=3), "avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d"),
    **_aten(partial(local.leading, worked_on=3), "adaptive_max_pool3d _adaptive_avg_pool3d upsample_nearest3d"),
    **_aten(partial(local.leading, worked_on=3), "upsample_trilinear3d _upsample_nearest_exact3d pixel_shuffle"),
    **_aten(partial(local.leading, worked_on=3), "pixel_unshuffle"),
    **_aten(local.first, "grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator"),
    **_aten(partial(local.leading, worked_on=2), "istft"),
    **_aten(local.first, "fractional_max_pool2d"),
    **_aten(local.unpool, "max_unpool2d max_unpool3d"),
    **_aten(local.windows, "im2col col2im"),
    **_aten(local.pad, "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d"),
    **_aten(local.pad, "replication_pad1d replication_pad2d replication_pad3d"),
    **_aten(local.channels, "channel_shuffle prelu"),
    **_aten(local.embedding, "embedding"),
}
NORMS = {
    **_aten(norms.layer_norm, "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    **_aten(norms.group_norm, "group_norm native_group_norm"),
    **_aten(norms.instance_norm, "instance_norm"),
    **_aten(norms.batch_norm, "batch_norm native_batch_norm _native_batch_norm_legit"),
    **_aten(norms.batch_norm, "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training"),
    **_aten(norms.batch_norm, "_batch_norm_with_update _batch_norm_with_update_functional _batch_norm_no_update"),
}
INDEXING = {
    **_aten(indexing.gather, "gather"),
    **_aten(indexing.scatter, "scatter scatter_add scatter_reduce"),
    **_aten(indexing.index_select, "index_select"),
    **_aten(indexing.index_write, "index_add index_copy index_fill index_reduce"),
    **_aten(indexing.index, "index _unsafe_index"),
    **_aten(indexing.index_put, "index_put _unsafe_index_put"),
    **_aten(indexing.one_hot, "one_hot"),
    **_aten(indexing.slice_scatter, "slice_scatter"),
    **_aten(indexing.select_scatter, "select_scatter"),
    **_aten(indexing.take, "take"),
    **_aten(indexing.diagonal_scatter, "diagonal_scatter"),
    **_aten(indexing.compacts, "nonzero masked_select masked_scatter unique_dim _unique2"),
    **_aten(indexing.counts, "bincount histc"),
    **_aten(indexing.embedding_bag, "embedding_bag _embedding_bag"),
    places.OP: indexing.marked_places,
}
LOSSES = {
    **_aten(losses.elementwise, "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div"),
    **_aten(losses.elementwise, "binary_cross_entropy_with_logits soft_margin_loss poisson_nll_loss"),
    **_aten(losses.elementwise, "hinge_embedding_loss margin_ranking_loss"),
    **_aten(losses.cross_entropy, "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d"),
    **_aten(losses.nll_forward, "nll_loss_forward nll_loss2d_forward"),
    **_aten(losses.margin, "triplet_margin_loss cosine_embedding_loss"),
}
CONSTRUCTORS = {
    **_aten(constructors.sized, "zeros ones full rand randn randint empty empty_strided scalar_tensor new_zeros"),
    **_aten(constructors.sized, "new_ones new_full new_empty new_empty_strided zeros_like ones_like full_like"),
    **_aten(constructors.sized, "empty_like rand_like randn_like randint_like zero"),
    **_aten(constructors.filled, "fill"),
    **_aten(constructors.arange, "arange"),
    **_aten(constructors.permutation, "randperm eye"),
}

TABLE: dict[Any, Rule] = {
    **COPIES,
    **VIEWS,
    **POINTWISE,
    **REDUCTIONS,
    **CONTRACTIONS,
    **ATTENTION,
    **RECURRENCE,
    **LOCAL,
    **NORMS,
    **INDEXING,
    **LOSSES,
    **CONSTRUCTORS,
}

# What is known of the inputs' data does not matter to these: they look at shapes only.
SHAPE_ONLY = frozenset(CONSTRUCTORS) - {aten.fill}
# These know what to do with the numbers of the samples, arange(B).
TAKES_ROWS = frozenset(
    {**COPIES, **VIEWS, **_aten(indexing.index, "gather index_select index _unsafe_index index_put _unsafe_index_put")}
)
# These may be given numbers computed from the batch size: they are sizes, and the result's shape is checked.
TAKES_SIZES = frozenset(
    {**VIEWS, **CONSTRUCTORS, **_aten(local.first, "affine_grid_generator native_group_norm slice_scatter")}
)
# Arguments about which the rule asks the graph itself.
READS_GRAPH = dict.fromkeys(_aten(indexing.embedding_bag, "embedding_bag _embedding_bag"), ("offsets",))

__all__ = ["READS_GRAPH", "SHAPE_ONLY", "TABLE", "TAKES_ROWS", "TAKES_SIZES", "Call", "Mixes", "Rule", "rule_for"]


def rule_for(op: torch._ops.OpOverload) -> Rule | None:
    """The rule of an op: by overload, by name, or because torch itself tags it as pointwise."""
    rule = TABLE.get(op) or TABLE.get(op.overloadpacket)
    if rule is None and torch.Tag.pointwise in op.tags:
        return pointwise.pointwise
    return rule

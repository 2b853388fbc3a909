"""Convolution, pooling, resizing, padding and normalisation: within each sample, or refused by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from batching_oracle import Lines, assert_refuses_the_marked_lines, assert_samples_apart, tracked
from torch import Tensor, nn

B, C, S = 4, 4, 6


def images(self: Any, x: Tensor) -> Any:  # x: [B, C, S, S]
    w = self.weight[:4, :4, None, None]
    folded = x.reshape(-1, 1, S, S)  # B x C
    return (
        F.conv2d(x, w, padding="same"),
        F.conv2d(folded, w[:, :1], stride=2).view(x.shape[0], -1),
        F.conv1d(x.flatten(2), w.flatten(2)),
        F.conv3d(x[:, None], w[:, :1, None]),
        F.conv_transpose2d(x, w, stride=2) + F.conv_transpose2d(x, w, stride=2),
        F.conv_transpose1d(x.flatten(2), w.flatten(2)),
        F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) + F.lp_pool2d(x, 2, 2),
        F.adaptive_avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 2),
        F.adaptive_avg_pool1d(x.flatten(2), 3) + F.max_pool1d(x.flatten(2), 12),
        F.max_pool3d(x[:, None], 2) + F.avg_pool3d(x[:, None], 2) + F.adaptive_avg_pool3d(x[:, None], (2, 3, 3)),
        F.interpolate(x, scale_factor=2) + F.interpolate(x, scale_factor=2, mode="bilinear"),
        F.interpolate(x, size=(3, 3), mode="bicubic") + F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True),
        F.pad(x, (1, 1, 1, 1)) + F.pad(x, (1, 1, 1, 1), mode="reflect") + F.pad(x, (1, 1, 1, 1), mode="circular"),
        F.pixel_shuffle(x, 2) + F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2).mean(1, True).repeat(1, 1, 2, 2),
        F.fold(F.unfold(x, 3, padding=1), (S, S), 3, padding=1),
        F.grid_sample(x, F.affine_grid(x[:, :2, 0, :3], [x.shape[0], C, S, S], False), align_corners=False),
        F.channel_shuffle(x, 2),
    )


def normalised(self: Any, x: Tensor) -> Any:
    return (
        F.layer_norm(x, (S, S)),
        F.rms_norm(x.mT, (S,), self.weight[0]),
        F.group_norm(x, 2, self.weight[0, :C]),
        F.group_norm(x.reshape(-1, 2, S, S), 1),
        F.instance_norm(x, weight=self.weight[0, :C]),
        F.batch_norm(x.reshape(1, -1, S, S), None, None, training=True),
        self.frozen(x),
        F.normalize(x) + F.local_response_norm(x, 2),
        torch.var_mean(x, (1, 2, 3), keepdim=True)[0],
    )


def test_ops_on_images_keep_samples_apart() -> None:
    assert_samples_apart(Lines(images), torch.randn(B, C, S, S))


def test_norms_within_a_sample_keep_samples_apart() -> None:
    model = Lines(normalised, frozen=nn.BatchNorm2d(C).eval())
    model.frozen.train(False)
    assert_samples_apart(model, torch.randn(B, C, S, S))


def test_ops_across_samples_are_refused() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        w = self.weight[:, :, None, None]
        return (
            F.layer_norm(x.movedim(0, 2), (x.shape[0], S)),  # refused: number of samples
            F.group_norm(x.movedim(0, 2), 1),  # refused: over the samples
            F.conv2d(x.movedim(0, 2), w),  # refused: for a channel
            F.avg_pool2d(x.permute(1, 2, 3, 0), (1, 2)),  # refused: for a channel
            F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1)),  # refused: adds rows
            F.batch_norm(x, None, None, training=True),  # refused: training mode
        )

    assert_refuses_the_marked_lines(forward, torch.randn(B, C, S, S))


def test_each_batch_norm_in_training_mode_is_named_with_its_cure() -> None:
    model = nn.Sequential(
        nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(), nn.BatchNorm2d(C, track_running_stats=False), nn.Flatten()
    )
    _, found = tracked(model, torch.randn(B, C, S, S))
    assert [(f.module, f.module_type, f.op) for f in found.findings] == [
        ("1", "BatchNorm2d", "batch_norm"),
        ("3", "BatchNorm2d", "batch_norm"),
    ]
    assert all("nn.GroupNorm" in f.cure and f.mixes for f in found.findings)
    assert not tracked(model.eval(), torch.randn(B, C, S, S))[1].findings[1:]


def test_instance_norm_with_running_statistics_is_a_leak() -> None:
    _, found = tracked(nn.Sequential(nn.InstanceNorm2d(C, track_running_stats=True)), torch.randn(B, C, S, S))
    assert ["leak un-noised data" in f.problem for f in found.findings] == [True]

"""The siamese metric loss of Siamese PCL (Mo, Sun and Li, BMVC 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class SiameseResult(NamedTuple):
    """loss: [N] float32 (float64 for float64 features), differentiable in features, weight and bias; correct: [N] bool,
    whether the logit is on the right side of 0.
    """

    loss: torch.Tensor
    correct: torch.Tensor


def siamese(
    a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, same: torch.Tensor
) -> SiameseResult:
    """Binary cross-entropy of whether two images are alike, told from how far their features are apart,

        logit_i = w . |a_i - b_i| + bias
        loss_i = -log sigmoid(logit_i) if they are, -log(1 - sigmoid(logit_i)) if they are not.

    Args:
        a: [N, d] features, any floating dtype; the loss is float32 (float64 for float64 features), under autocast too.
        b: [N, d] features of the other images, of the same dtype.
        weight: w, [d].
        bias: 0-d, or [1].
        same: bool [N], whether a_i and b_i are two views of an image, or of images of one cluster.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(a, b, weight, bias, same)
    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        logit = (a.to(dtype) - b.to(dtype)).abs() @ weight.to(dtype) + bias.to(dtype)
        # softplus of the wrong side's logit: its gradient, a sigmoid, is exact for confident rows too, where
        # sigmoid(logit) - 1 would have cancelled to nothing. Above its threshold softplus is linear.
        loss = F.softplus(torch.where(same, -logit, logit), threshold=40)
    return SiameseResult(loss, (logit > 0) == same)


def _check(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, same: torch.Tensor) -> None:
    if a.ndim != 2 or not a.is_floating_point() or not len(a):
        raise ValueError(f"a must be [N, d] floating point with N >= 1, got {list(a.shape)} {a.dtype}")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"a and b must be alike, got {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}")
    if weight.shape != a.shape[1:] or bias.numel() != 1:
        raise ValueError(
            f"weight must be [{a.shape[1]}] and bias a single number, got {list(weight.shape)} and {list(bias.shape)}"
        )
    if same.shape != a.shape[:1] or same.dtype != torch.bool:
        raise ValueError(f"same must be [{len(a)}] bool, got {list(same.shape)} {same.dtype}")

"""The loss of BYOL (Grill et al., NeurIPS 2020, equation 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def byol(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The squared distance of a prediction from its target, both made unit vectors,

        loss_i = | p_i / |p_i| - z_i / |z_i| |^2 = 2 - 2 cos(p_i, z_i)

    Args:
        prediction: p, [N, d] of any length and floating dtype; the loss is float32 (float64 for float64 predictions),
            under autocast too.
        target: z, [N, d] likewise, of the same dtype. They are constants: no gradient goes through them.

    Returns:
        [N], from 0 to 4. Differentiable in prediction; rows never mix. A prediction of zeros has no direction: its loss
        is 1, and its gradient 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(prediction, target)
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    with torch.autocast(prediction.device.type, enabled=False):
        prediction = prediction.to(dtype)
        length = prediction.norm(dim=1, keepdim=True)
        # All of a predictor's ReLUs may be off. F.normalize would send a gradient of 1e12 to such a row.
        unit = prediction / length.masked_fill(length == 0, torch.inf)
        # As a sum of squares: 2 - 2 cos would cancel where they agree, and be negative of some rows.
        return (unit - F.normalize(target.detach().to(dtype), dim=1)).square().sum(1)


def _check(prediction: torch.Tensor, target: torch.Tensor) -> None:
    if prediction.ndim != 2 or not prediction.is_floating_point() or not len(prediction):
        raise ValueError(
            f"prediction must be [N, d] floating point with N >= 1, got {list(prediction.shape)} {prediction.dtype}"
        )
    if (prediction.shape, prediction.dtype, prediction.device) != (target.shape, target.dtype, target.device):
        raise ValueError(
            f"prediction and target must be alike, got {list(prediction.shape)} {prediction.dtype} on "
            f"{prediction.device} and {list(target.shape)} {target.dtype} on {target.device}"
        )

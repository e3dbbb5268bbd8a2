"""NT-Xent, the loss of SimCLR (Chen et al., ICML 2020, equation 1)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pcl_fast.distributed import all_gather_with_gradient


def nt_xent(
    a: torch.Tensor, b: torch.Tensor, temperature: float, *, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Cross-entropy of each view's other view among all other views of all ranks,

        loss_i = -log( exp(z_i.z_j/tau) / sum_{k != i} exp(z_i.z_k/tau) ),    j the other view of i's image.

    With G ranks of N images each the sum is over the positive and 2GN - 2 negatives.

    Args:
        a: [N, d] unit features of one view of this rank's images, any floating dtype; scores are float32 (float64 for
            float64 features), under autocast too.
        b: [N, d] unit features of the other view, of the same dtype.
        temperature: tau > 0.
        group: the ranks, each with as many images; None for this process alone.

    Returns:
        [2N] in the scores' dtype: the losses of a's rows, then of b's. Differentiable in a and b on every rank, also
        where they are other ranks' negatives: if every rank calls backward on the mean of its own losses, the mean of
        its gradients over the ranks is the gradient of the mean over all of them.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature that is not positive, or a single image,
            which has no negatives.
    """
    _check(a, b, temperature, group)
    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        a, b = a.to(dtype), b.to(dtype)
        # Of every rank in turn: its rows of a, then its rows of b.
        everyone = all_gather_with_gradient(torch.cat([a, b]), group)
        first = 0 if group is None else 2 * len(a) * dist.get_rank(group)
        of_a, of_b = torch.arange(first, first + 2 * len(a), device=a.device).chunk(2)
        # One view at a time: no more than N x 2GN scores are held at once.
        return torch.cat(
            [
                _anchored(a, b, everyone, of_a, of_b, temperature),
                _anchored(b, a, everyone, of_b, of_a, temperature),
            ]
        )


def _anchored(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    everyone: torch.Tensor,
    own: torch.Tensor,
    other: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """The losses of N anchors: z = logsumexp of the negatives - the positive's score, and loss = softplus(z), whose
    gradient sigmoid(z) is exact for confident rows too, where 1 - softmax would have cancelled to nothing.

    Args:
        own, other: int64 [N], where each anchor and its positive stand in `everyone`, which are no negatives of it.
    """
    scores = anchors @ everyone.T / temperature
    hidden = torch.stack([own, other], dim=1)
    negatives = scores.scatter(1, hidden, -torch.inf).logsumexp(1)
    # Above its threshold softplus is linear: at 40 the difference is below the resolution of float64 too.
    return F.softplus(negatives - (anchors * positives).sum(1) / temperature, threshold=40)


def _check(a: torch.Tensor, b: torch.Tensor, temperature: float, group: dist.ProcessGroup | None) -> None:
    for name, rows in (("a", a), ("b", b)):
        if rows.ndim != 2 or not rows.is_floating_point() or not len(rows):
            raise ValueError(f"{name} must be [N, d] floating point with N >= 1, got {list(rows.shape)} {rows.dtype}")
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"a and b must be alike, got {list(a.shape)} {a.dtype} on {a.device} and {list(b.shape)} {b.dtype} on "
            f"{b.device}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if len(a) == 1 and (group is None or dist.get_world_size(group) == 1):
        raise ValueError("a single image has nothing to be contrasted with; give two or more")

"""The loss by PyTorch's own flash attention: what an existing fused kernel achieves, without writing a new one.

If both keys and values are negatives / phi, attention's output is the softmax-weighted mean O of the negatives. With
its log-sum-exp, that is all that the loss needs: the gradient has a closed form, and no backward kernel runs.

    z_i = lse_i - s_i+        loss_i = softplus(z_i)        dloss_i/dq_i = sigmoid(z_i) (O_i - w_i+ c_i+)

What attention cannot do is left to plain operations: to draw and gather the negatives, and to contrast with the other
rows' prototypes, from which a row's twins (the rows that have the same prototype) must be hidden.

It takes fp16 and bf16 only, from compute capability 8.0 on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from pcl_fast.clustering import PrototypeSet
from pcl_fast.losses import sample_negatives

LossAndGradient = tuple[torch.Tensor, torch.Tensor]


def prescale(prototypes: Sequence[PrototypeSet]) -> list[PrototypeSet]:
    """Return the sets with centroids divided by their phi. This is not timed, because once per E-step would do."""
    return [
        granularity._replace(
            centroids=(granularity.centroids / granularity.concentration[:, None]).to(granularity.centroids.dtype)
        )
        for granularity in prototypes
    ]


def loss(query: torch.Tensor, **arguments) -> torch.Tensor:
    """Return `pcl_fast.losses.pcl_loss(...).loss`, up to half precision, for prototypes that `prescale` has made."""
    return _KnownGradient.apply(query, partial(loss_and_gradient, **arguments))


class _KnownGradient(torch.autograd.Function):
    """A scalar loss whose gradient is computed together with it."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, function: Callable[[torch.Tensor], LossAndGradient]) -> torch.Tensor:
        value, gradient = function(query)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None


def loss_and_gradient(
    query: torch.Tensor,
    *,
    key: torch.Tensor,
    queue: torch.Tensor,
    prototypes: Sequence[PrototypeSet],
    index: torch.Tensor,
    temperature: float,
    num_negatives: int | None,
    seed: torch.Tensor,
) -> LossAndGradient:
    """Return the loss and its gradient: (scalar, [N, d] in the query's dtype)."""
    output, lse = attend(query, queue, 1 / temperature)
    value, gradient = residual(query, key.float() / temperature, output / temperature, lse)
    for m, granularity in enumerate(prototypes):
        part, part_gradient = proto_nce(query, granularity, index, num_negatives, seed + m)
        value = value + part / len(prototypes)
        gradient = gradient + part_gradient / len(prototypes)
    return value, gradient.to(query.dtype)


def proto_nce(
    query: torch.Tensor, prototypes: PrototypeSet, index: torch.Tensor, num_negatives: int | None, seed: torch.Tensor
) -> LossAndGradient:
    """Return mean loss and gradient of one granularity: attention over the drawn negatives, combined with the other
    rows' prototypes.
    """
    centroids = prototypes.centroids
    positives = prototypes.assignment[index].long()
    negatives = sample_negatives(len(centroids), num_negatives, positives, seed=seed)
    output, lse = attend(query, centroids.index_select(0, negatives), 1.0)
    own = centroids.index_select(0, positives).float()
    scores = (query.float() @ own.T).masked_fill(positives[:, None] == positives, -torch.inf)
    total = torch.logaddexp(lse, scores.logsumexp(1))
    output = (lse - total).exp()[:, None] * output + (scores - total[:, None]).exp() @ own
    return residual(query, own, output, total)


def attend(query: torch.Tensor, bank: torch.Tensor, scale: float) -> LossAndGradient:
    """Return, in float32, the softmax-weighted mean of the bank [N, d] and the log-sum-exp [N] of scale x scores."""
    bank = bank[None, None]
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention.default(
        query[None, None], bank, bank, scale=scale
    )
    return output[0, 0].float(), lse[0, 0]


def residual(query: torch.Tensor, own: torch.Tensor, output: torch.Tensor, lse: torch.Tensor) -> LossAndGradient:
    """Return the mean loss and its gradient, from the positives, scaled, and attention's results for the negatives."""
    z = lse - (query.float() * own).sum(1)
    return F.softplus(z).mean(), z.sigmoid()[:, None] * (output - own) / len(query)

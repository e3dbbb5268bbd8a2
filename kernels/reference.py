"""Contrast of queries against one positive each and a bank of negatives: the plain twin of the fused kernels.

The loss of row i is the cross-entropy of its positive among positive and negatives,

    s_i+ = w_i+ (q_i . p_i)        s_ij = w_j (q_i . c_j)
    loss_i = -log(exp s_i+ / (exp s_i+ + sum_j exp s_ij))

computed in residual form, z_i = logsumexp_j s_ij - s_i+ and loss_i = softplus(z_i). Its gradient sigmoid(z_i) is exact
for confident rows too, where 1 - softmax would have cancelled to nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def contrast(
    query: torch.Tensor,
    positive: torch.Tensor,
    positive_weight: torch.Tensor | float,
    bank: torch.Tensor,
    bank_weight: torch.Tensor | float,
    hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every query's positive against the bank.

    Args:
        query: [N, d], the only input that gets a gradient.
        positive: [N, d], each query's own.
        positive_weight: [N] or scalar, 1 / temperature of the positives.
        bank: [R, d] negatives, shared by all queries; R may be 0.
        bank_weight: [R] or scalar, 1 / temperature of each negative.
        hidden: [N, H] bool with H <= R, True where column j < H is no negative of row i.

    Inputs are brought to float32 (float64 if query is) before anything is multiplied.

    Returns:
        (loss [N] in that dtype, correct [N] bool). correct: the positive scores strictly above every negative, so that
        a collapsed encoder, whose scores are all equal, gets none right. A row without negatives has loss 0 and is
        correct.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.to(dtype)
    score = (query * positive.detach().to(dtype)).sum(1) * positive_weight
    scores = (query @ bank.detach().to(dtype).T) * bank_weight
    if hidden is not None:
        scores[:, : hidden.shape[1]].masked_fill_(hidden, -torch.inf)
    if not len(bank):
        return score * 0, torch.ones_like(score, dtype=torch.bool)
    largest = scores.detach().amax(1)
    # A row whose negatives are all hidden has largest = -inf; the clamp keeps -inf - -inf out of its sum, which is
    # then 0, and z is -inf. What flows back into hidden scores is dropped, so its gradient is 0 and not 0/0.
    shift = largest.clamp(min=-1e30)
    total = (scores - shift[:, None]).exp().sum(1)
    # Above its threshold softplus is linear: at 40 the difference is below the resolution of float64 too.
    return F.softplus((shift - score) + total.log(), threshold=40), score.detach() > largest


def candidate_negatives(
    num_prototypes: int, num_negatives: int | None, positives: torch.Tensor, seed: int
) -> torch.Tensor:
    """Distinct prototypes, uniform over those that are nobody's positive, in random order.

    Args:
        num_prototypes: K.
        num_negatives: r, or None for all there are.
        positives: int64 [N] in [0, K).
        seed: the draw depends on nothing but it and the other arguments.

    Returns:
        int64 [min(r, number of prototypes that are nobody's positive)], on the device of `positives`.
    """
    device = positives.device
    taken = torch.zeros(num_prototypes, dtype=torch.bool, device=device)
    taken.index_fill_(0, positives, True)  # taken[positives] = True would copy the value from the host and wait
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(num_prototypes, generator=generator, device=device)
    # Among the first r + N of a permutation at most N are somebody's positive, so r others are left if they exist.
    needed = num_prototypes if num_negatives is None else num_negatives + len(positives)
    order = order[:needed]
    free = ~taken[order]
    if num_negatives is None or needed > num_prototypes:
        return order[free][:num_negatives]  # only the device knows how many these are: this waits for it
    # The same without waiting, as r of them are sure to be there: each goes to its place, what is too much to a dump.
    place = torch.where(free, free.cumsum(0) - 1, num_negatives).clamp(max=num_negatives)
    return order.new_empty(num_negatives + 1).scatter_(0, place, order)[:num_negatives]


# What follows is the loss as the paper and the official code define it, row by row in Python and float64: slow on
# purpose, sharing nothing with what it is compared with, for tests only.


def info_nce_rows(query, key, queue, temperature) -> list[float]:
    """-log softmax of q.k'/tau among itself and q.(every queue key)/tau, per row."""
    losses = []
    for i in range(len(query)):
        logits = [_dot(query[i], key[i]) / temperature]
        logits += [_dot(query[i], queue[j]) / temperature for j in range(len(queue))]
        losses.append(_cross_entropy(logits))
    return losses


def proto_nce_rows(query, centroids, concentration, positives, negatives) -> list[float]:
    """Per row: its own prototype, against the other rows' prototypes and the sampled ones, each over its own phi.

    Another row contributes a column even if a third row shares its prototype; a row whose prototype is this row's own
    contributes none.
    """
    losses = []
    for i in range(len(query)):
        own = int(positives[i])
        columns = [own]
        columns += [int(positives[j]) for j in range(len(query)) if int(positives[j]) != own]
        columns += [int(c) for c in negatives]
        losses.append(_cross_entropy([_dot(query[i], centroids[c]) / float(concentration[c]) for c in columns]))
    return losses


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True))


def _cross_entropy(logits: list[float]) -> float:
    """-log softmax(logits)[0]."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[0]

"""Contrast of queries against one positive each and a bank of negatives: the plain twin of the fused kernels.

The loss of row i is the cross-entropy of its positive among positive and negatives,

    s_i+ = w_i+ (q_i . p_i)        s_ij = w_j (q_i . c_j)
    loss_i = -log(exp s_i+ / (exp s_i+ + sum_j exp s_ij))

computed in residual form, z_i = logsumexp_j s_ij - s_i+ and loss_i = softplus(z_i). Its gradient sigmoid(z_i) is exact
for confident rows too, where 1 - softmax would have cancelled to nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def contrast(
    query: torch.Tensor,
    positive: torch.Tensor,
    positive_weight: torch.Tensor | float,
    bank: torch.Tensor,
    bank_weight: torch.Tensor | float,
    hidden: torch.Tensor | None = None,
    there: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every query's positive against the bank.

    Args:
        query: [N, d], the only input that gets a gradient.
        positive: [N, d], each query's own.
        positive_weight: [N] or scalar, 1 / temperature of the positives.
        bank: [R, d] negatives, shared by all queries; R may be 0.
        bank_weight: [R] or scalar, 1 / temperature of each negative.
        hidden: [N, H] bool with H <= R, True where column j < H is no negative of row i.
        there: [C] bool with C <= R, False where one of the last C columns is nobody's negative.

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
    if there is not None:
        scores[:, len(bank) - len(there) :].masked_fill_(~there, -torch.inf)
    if not len(bank):
        return score * 0, torch.ones_like(score, dtype=torch.bool)
    largest = scores.detach().amax(1)
    # A row whose negatives are all hidden has largest = -inf; the clamp keeps -inf - -inf out of its sum, which is
    # then 0, and z is -inf. What flows back into hidden scores is dropped, so its gradient is 0 and not 0/0.
    shift = largest.clamp(min=-1e30)
    total = (scores - shift[:, None]).exp().sum(1)
    # Above its threshold softplus is linear: at 40 the difference is below the resolution of float64 too.
    return F.softplus((shift - score) + total.log(), threshold=40), score.detach() > largest

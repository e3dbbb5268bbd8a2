"""Contrast of queries against one positive each and a bank of negatives: the plain version of contrast.py.

The loss of row i is the cross-entropy of its positive among positive and negatives,

    s_i+ = w_i+ (q_i . p_i)        s_ij = w_j (q_i . c_j)
    loss_i = -log(exp s_i+ / (exp s_i+ + sum_j exp s_ij))

computed in residual form, z_i = logsumexp_j s_ij - s_i+ and loss_i = softplus(z_i). Its gradient sigmoid(z_i) is exact
for confident rows too, where 1 - softmax would cancel to nothing.
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
    """Return every query's cross-entropy of its positive against the bank, and whether the positive wins.

    Inputs are converted to float32 (float64 if the query is) before anything is multiplied.

    Args:
        query: [N, d], the only input that gets a gradient.
        positive: [N, d], each query's own.
        positive_weight: [N] or scalar, 1 / temperature of the positives.
        bank: [R, d] negatives, shared by all queries; R may be 0.
        bank_weight: [R] or scalar, 1 / temperature of each negative.
        hidden: [N, H] bool with H <= R, True where column j < H is no negative of row i.
        there: [C] bool with C <= R, about the last C columns: False where a column is nobody's negative.

    Returns:
        loss: [N] in the type of the computation; 0 for a row without negatives.
        correct: [N] bool, True where the positive scores strictly above every negative. So a collapsed encoder, whose
            scores are all equal, gets no row right, and a row without negatives is right.
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
    # A row whose negatives are all hidden has largest = -inf. The clamp keeps -inf - -inf out of its sum, which is then
    # 0, so z is -inf. What flows back into hidden scores is dropped, so the row's gradient is 0 and not 0/0.
    shift = largest.clamp(min=-1e30)
    total = (scores - shift[:, None]).exp().sum(1)
    # Above its threshold PyTorch's softplus is linear; from 40 on that is exact even in float64.
    return F.softplus((shift - score) + total.log(), threshold=40), score.detach() > largest

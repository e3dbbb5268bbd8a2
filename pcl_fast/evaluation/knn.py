"""Weighted kNN: how well an image's class follows from the classes of its nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pcl_fast.distributed import all_gather_rows, all_reduce_sum, shard_lengths

# How many similarities are held at once.
_CHUNK = 1 << 26


def knn_accuracy(
    features: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    *,
    neighbours: int,
    temperature: float,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Return the share of the queries that their neighbours classify correctly (weighted kNN; paper, section 4.3).

    Every query is an image of the data set. Its nearest `neighbours` other images each vote for their own class, with
    the weight exp(v.v'/temperature).

    Args:
        features: [n_local, d] unit features, this rank's shard.
        labels: int64 [n], classes of the whole data set.
        queries: int64 [Q], positions in the data set, the same on every rank.
        neighbours: k; a smaller data set gives fewer.
        temperature: tau.
        group: the ranks that hold the shards; None for this process alone.
    """
    queries = queries.to(features.device)
    begin = _begin(features, group)
    mine = (queries >= begin) & (queries < begin + len(features))
    vectors = features.new_zeros(len(queries), features.shape[1])
    vectors[mine] = features[queries[mine] - begin]
    all_reduce_sum(vectors, group)
    [accuracy] = knn_accuracies(
        features,
        labels,
        vectors,
        labels[queries],
        neighbours=[neighbours],
        temperatures=[temperature],
        own=queries,
        group=group,
    ).values()
    return accuracy


@torch.no_grad()
def knn_accuracies(
    bank: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    answers: torch.Tensor,
    *,
    neighbours: Sequence[int],
    temperatures: Sequence[float],
    own: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[tuple[int, float], float]:
    """Return the share of the queries that the bank classifies correctly, for every (k, tau), from one search.

    Args:
        bank: [n_local, d] unit features, this rank's shard.
        labels: int64 [n], classes of the whole bank.
        queries: [Q, d] unit features, the same on every rank.
        answers: int64 [Q], the queries' classes.
        neighbours: every k; a smaller bank gives fewer.
        temperatures: every tau.
        own: int64 [Q], the position in the bank of every query itself, which does not vote; None: queries are no part
            of the bank.
        group: the ranks that hold the bank; None for this process alone.
    """
    begin, most = _begin(bank, group), max(neighbours)
    rows = max(1, _CHUNK // max(shard_lengths(len(bank), group, bank.device)))  # the same on every rank
    correct = {(k, tau): 0 for k in neighbours for tau in temperatures}
    own_chunks = [None] * -(-len(queries) // rows) if own is None else own.split(rows)
    for chunk, answer, excluded in zip(queries.split(rows), answers.split(rows), own_chunks, strict=True):
        similarity, voters = _nearest(bank, chunk, begin, most, excluded, group)
        for k, tau in correct:
            votes = torch.zeros(len(chunk), int(labels.max()) + 1, device=bank.device)
            # The common factor exp(-1/tau) keeps the weights at or below 1.
            votes.scatter_add_(1, labels[voters[:, :k]], ((similarity[:, :k] - 1) / tau).exp())
            correct[k, tau] += int((votes.argmax(1) == answer).sum())
    return {name: count / len(queries) for name, count in correct.items()}


def _begin(shard: torch.Tensor, group: dist.ProcessGroup | None) -> int:
    """Return the position in the data set of the first image of this rank's shard."""
    lengths = shard_lengths(len(shard), group, shard.device)
    return sum(lengths[: 0 if group is None else dist.get_rank(group)])


def _nearest(bank, queries, begin, neighbours, own, group) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (similarities, positions), each [Q, k], of the images in all shards that are nearest to the queries, the
    nearest first; not the queries themselves, which are at `own`.
    """
    similarity = queries @ bank.T
    if own is not None:
        mine = (own >= begin) & (own < begin + len(bank))
        similarity[mine.nonzero().view(-1), own[mine] - begin] = -torch.inf
    k = min(neighbours, len(bank))
    best, position = similarity.topk(k, dim=1)
    best = best.float()  # features may be half precision
    # A shard smaller than k fills up with places that lose against everything, so that their class does not matter.
    best_padded = best.new_full((len(queries), neighbours), -torch.inf)
    position_padded = position.new_zeros(len(queries), neighbours)
    best_padded[:, :k], position_padded[:, :k] = best, position + begin
    if group is None:
        return best_padded, position_padded
    ranks = dist.get_world_size(group)
    best_all = all_gather_rows(best_padded, group).view(ranks, len(queries), -1).transpose(0, 1).flatten(1)
    position_all = all_gather_rows(position_padded, group).view(ranks, len(queries), -1).transpose(0, 1).flatten(1)
    best, column = best_all.topk(neighbours, dim=1)
    return best, position_all.gather(1, column)

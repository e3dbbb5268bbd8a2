"""Weighted kNN: how well an image's class follows from the classes of its nearest neighbours."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pcl_fast.distributed import all_gather_rows, all_reduce_sum, shard_lengths

# How many similarities are held at once.
_CHUNK = 1 << 26


@torch.no_grad()
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
    lengths = shard_lengths(len(features), group, features.device)
    first = sum(lengths[: 0 if group is None else dist.get_rank(group)])
    rows = max(1, _CHUNK // max(lengths))  # the same on every rank
    correct = 0
    for chunk in queries.to(features.device).split(rows):
        similarity, voters = _nearest_others(features, chunk, first, neighbours, group)
        votes = torch.zeros(len(chunk), int(labels.max()) + 1, device=features.device)
        # The common factor exp(-1/tau) keeps the weights at or below 1.
        votes.scatter_add_(1, labels[voters], ((similarity - 1) / temperature).exp())
        correct += int((votes.argmax(1) == labels[chunk]).sum())
    return correct / len(queries)


def _nearest_others(features, queries, first, neighbours, group) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (similarities, positions), each [Q, k], of the queries' nearest other images in all shards."""
    mine = (queries >= first) & (queries < first + len(features))
    vectors = features.new_zeros(len(queries), features.shape[1])
    vectors[mine] = features[queries[mine] - first]
    all_reduce_sum(vectors, group)

    similarity = vectors @ features.T
    similarity[mine.nonzero().view(-1), queries[mine] - first] = -torch.inf
    k = min(neighbours, len(features))
    best, position = similarity.topk(k, dim=1)
    best = best.float()  # features may be half precision
    # A shard smaller than k fills up with places that lose against everything, so that their class does not matter.
    best_padded = best.new_full((len(queries), neighbours), -torch.inf)
    position_padded = position.new_zeros(len(queries), neighbours)
    best_padded[:, :k], position_padded[:, :k] = best, position + first
    if group is None:
        return best_padded, position_padded
    ranks = dist.get_world_size(group)
    best_all = all_gather_rows(best_padded, group).view(ranks, len(queries), -1).transpose(0, 1).flatten(1)
    position_all = all_gather_rows(position_padded, group).view(ranks, len(queries), -1).transpose(0, 1).flatten(1)
    best, column = best_all.topk(neighbours, dim=1)
    return best, position_all.gather(1, column)

"""Evaluation while a run trains, if its data set has labels: kNN and adjusted mutual information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pcl_fast.clustering import kmeans
from pcl_fast.config import Config
from pcl_fast.distributed import World, all_gather_shards
from pcl_fast.evaluation.ami import adjusted_mutual_information
from pcl_fast.evaluation.knn import knn_accuracy
from pcl_fast.seeds import Purpose, mix_seeds


def number_classes(labels: Sequence[int] | None, device: torch.device) -> torch.Tensor | None:
    """Return labels as int64 [n], numbered without gaps, because kNN counts votes for every number up to the largest;
    None if there are none.
    """
    return None if labels is None else torch.as_tensor(labels).unique(return_inverse=True)[1].to(device)


def evaluate_features(
    features: torch.Tensor,
    labels: torch.Tensor,
    clusterings: dict[str, torch.Tensor],
    config: Config,
    epoch: int,
    world: World,
) -> dict[str, Any] | None:
    """Return what online evaluation records of an epoch's features.

    Args:
        features: [n_local, d] unit features, this rank's shard.
        labels: int64 [n], classes of the whole data set.
        clusterings: assignments [n] that training has made, by name. Those of config.evaluation.ks that are not among
            them are made here.
        config: the run's recipe.
        epoch: the epoch that the features belong to, which seeds k-means.
        world: the ranks.

    Returns:
        {"knn": accuracy, "ami": {name: AMI}} on the main rank, None on the others.
    """
    options = config.evaluation
    queries = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: options.queries]
    knn = knn_accuracy(
        features,
        labels,
        queries,
        neighbours=options.neighbours,
        temperature=config.loss.temperature,
        group=world.group,
    )
    made = {f"{k}": _assignment(features, k, config, epoch, world) for k in options.ks if f"{k}" not in clusterings}
    if not world.is_main:
        return None
    ami = {name: adjusted_mutual_information(found, labels) for name, found in {**clusterings, **made}.items()}
    return {"knn": knn, "ami": ami}


def _assignment(features: torch.Tensor, k: int, config: Config, epoch: int, world: World) -> torch.Tensor:
    """Return the assignment that k-means finds for the features, int32 [n] of the whole data set."""
    seed = mix_seeds(config.seed, Purpose.EVALUATION, epoch)
    return all_gather_shards(kmeans(features, k, seed=seed, group=world.group).assignment, world.group)

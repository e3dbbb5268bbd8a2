"""kNN of a bank and queries apart, against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from sklearn.neighbors import KNeighborsClassifier

from pcl_fast.evaluation.knn import knn_accuracies


def clouds(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (n,), generator=generator)
    middle = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    return F.normalize(middle[labels] + 1.5 * torch.randn(n, 12, generator=generator), dim=1), labels


KS, TAUS = (1, 5, 40), (0.05, 0.5)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("k", KS)
def test_equals_scikit_learn(k, tau):
    bank, labels = clouds(150, 1)
    queries, answers = clouds(90, 2)
    found = knn_accuracies(bank, labels, queries, answers, neighbours=KS, temperatures=TAUS)
    classifier = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / tau))
    expected = classifier.fit(bank.numpy(), labels.numpy()).score(queries.numpy(), answers.numpy())
    assert found[k, tau] == pytest.approx(expected)
    assert 0.3 < expected < 1


def test_shuffled_labels_are_chance():
    bank, labels = clouds(1000, 1)
    queries, answers = clouds(1000, 2)
    shuffled = labels[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    [right] = knn_accuracies(bank, labels, queries, answers, neighbours=[20], temperatures=[0.1]).values()
    [chance] = knn_accuracies(bank, shuffled, queries, answers, neighbours=[20], temperatures=[0.1]).values()
    assert right > 0.6
    assert abs(chance - 0.2) < 0.06


def of_shard(world, bank, labels, queries, answers):
    shard = bank[:30] if world.rank == 0 else bank[30:]
    return knn_accuracies(shard, labels, queries, answers, neighbours=KS, temperatures=TAUS, group=world.group)


def test_ranks_equal_one():
    """One of the shards is smaller than the most neighbours."""
    data = (*clouds(150, 1), *clouds(90, 2))
    whole = knn_accuracies(*data, neighbours=KS, temperatures=TAUS)
    assert run_ranks(2, of_shard, *data) == [whole, whole]

"""kNN against a slow version and on two ranks, and AMI against scikit-learn's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

import pcl_fast.evaluation.knn
from pcl_fast.evaluation import adjusted_mutual_information, knn_accuracy
from pcl_fast.evaluation.ami import agreement


def labelled(n: int = 120, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    middle = torch.randn(classes, 8, generator=generator)
    return F.normalize(middle[labels] + 1.2 * torch.randn(n, 8, generator=generator), dim=1), labels


def slow(features, labels, queries, neighbours, temperature) -> float:
    correct = 0
    for q in queries.tolist():
        similarity = [(float(features[q] @ features[i]), i) for i in range(len(features)) if i != q]
        votes = [0.0] * (int(labels.max()) + 1)
        for value, i in sorted(similarity, reverse=True)[:neighbours]:
            votes[labels[i]] += torch.tensor(value / temperature).exp().item()
        correct += votes.index(max(votes)) == labels[q]
    return correct / len(queries)


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.1), (7, 0.1), (60, 0.05), (500, 0.2)])
def test_equals_the_slow_version(neighbours, temperature):
    features, labels = labelled()
    queries = torch.tensor([0, 5, 7, 30, 31, 64, 99, 118, 119, 77, 2, 51])
    options = {"neighbours": neighbours, "temperature": temperature}
    assert knn_accuracy(features, labels, queries, **options) == slow(features, labels, queries, **options)
    assert 0.3 < knn_accuracy(features, labels, torch.arange(120), **options) < 1


def test_an_image_is_not_its_own_neighbour():
    """Every image is a class of its own, so no other image can give the right answer."""
    features, _ = labelled()
    everything = torch.arange(120)
    assert knn_accuracy(features, everything, everything, neighbours=1, temperature=0.1) == 0


def accuracy_of_shard(world, features, labels, bounds, chunk):
    pcl_fast.evaluation.knn._CHUNK = chunk
    shard = features[bounds[world.rank] : bounds[world.rank + 1]]
    return knn_accuracy(shard, labels, torch.arange(0, 120, 3), neighbours=9, temperature=0.1, group=world.group)


@pytest.mark.parametrize(("bounds", "chunk"), [((0, 50, 120), 1 << 26), ((0, 4, 120), 1 << 26), ((0, 50, 120), 500)])
def test_ranks_equal_one(bounds, chunk):
    """The second case has a shard smaller than the number of neighbours, the third takes the queries in chunks."""
    features, labels = labelled()
    whole = knn_accuracy(features, labels, torch.arange(0, 120, 3), neighbours=9, temperature=0.1)
    assert run_ranks(2, accuracy_of_shard, features, labels, bounds, chunk) == [whole, whole]


def test_ami_is_one_for_equal_partitions_and_zero_by_chance():
    labels = torch.arange(400) % 4
    assert adjusted_mutual_information((labels + 1) % 4, labels) == pytest.approx(1)
    assert abs(adjusted_mutual_information(torch.arange(400) // 100, labels)) < 0.02


@pytest.mark.parametrize(("n", "clusters", "classes"), [(50, 3, 4), (400, 20, 7), (300, 250, 2), (40, 1, 3), (9, 5, 9)])
def test_ami_is_scikit_learn_s(n, clusters, classes):
    """Classes have very unequal sizes, two of which may add up to more than all images, and half of the images are in
    the cluster of their class.
    """
    generator = torch.Generator().manual_seed(n)
    labels = (torch.rand(n, generator=generator) ** 3 * classes).long()
    assignment = torch.where(
        torch.rand(n, generator=generator) < 0.5, labels % clusters, torch.randint(clusters, (n,), generator=generator)
    )
    expected = adjusted_mutual_info_score(labels.numpy(), assignment.numpy())
    assert adjusted_mutual_information(assignment, labels) == pytest.approx(expected, abs=1e-12)


def test_ami_of_parts_that_must_overlap():
    """A class of four and a cluster of four among five images have at least three images in common."""
    labels, assignment = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 0])
    expected = adjusted_mutual_info_score(labels.numpy(), assignment.numpy())
    assert adjusted_mutual_information(assignment, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ami_of_partitions_that_cannot_differ(n):
    whole, single = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    assert adjusted_mutual_information(whole, whole) == 1
    assert adjusted_mutual_information(single.flip(0), single) == 1


def test_float16_features():
    """A GPU's shard holds float16; the votes are counted in float32."""
    features, labels = labelled()
    half, full = (
        knn_accuracy(x, labels, torch.arange(120), neighbours=9, temperature=0.1) for x in (features.half(), features)
    )
    assert half == pytest.approx(full, abs=0.02)


@pytest.mark.parametrize(("clusters", "classes"), [(3, 4), (20, 7), (120, 2)])
def test_other_measures_are_scikit_learn_s(clusters, classes):
    generator = torch.Generator().manual_seed(clusters)
    labels = torch.randint(0, classes, (300,), generator=generator)
    assignment = (labels * 3 + torch.randint(0, clusters, (300,), generator=generator)) % clusters
    found, names = agreement(assignment, labels), (labels.numpy(), assignment.numpy())
    assert found.ami_max == pytest.approx(adjusted_mutual_info_score(*names, average_method="max"), abs=1e-12)
    assert found.nmi == pytest.approx(normalized_mutual_info_score(*names))
    most = sum(int(labels[assignment == cluster].bincount().max()) for cluster in assignment.unique())
    assert found.purity == most / 300

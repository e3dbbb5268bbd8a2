"""Findings and neighbours of features that were made up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pcl_fast.data import ImageFolder
from pcl_fast.exploring import neighbours
from pcl_fast.exploring.findings import GREY_SIDE, find, grey
from pcl_fast.exploring.knowledge import Granularity, Knowledge, Labels
from pcl_fast.exploring.neighbours import Nearest, nearest


@pytest.mark.parametrize("held", [1, 500, 1 << 20])
def test_blocks_find_the_nearest(held, monkeypatch):
    monkeypatch.setattr(neighbours, "_HELD", held)
    points = F.normalize(torch.randn(97, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    done = []
    found = nearest(points, points, 5, not_itself=True, progress=done.append)
    distances = torch.cdist(points.double(), points.double()).fill_diagonal_(torch.inf)
    expected = distances.topk(5, largest=False)
    np.testing.assert_allclose(found.distance, expected.values, atol=1e-3)
    np.testing.assert_array_equal(found.index, expected.indices)
    assert done[-1] == 97
    assert nearest(points, points[:3], 5).index.shape == (97, 3)


def known(sizes: list[int], labels: list[int]) -> Knowledge:
    """Images in clusters of these sizes, of which image 1 is far from all others."""
    n, k = sum(sizes), len(sizes)
    assignment = np.repeat(np.arange(k), sizes)
    distance = np.full((n, 12), 0.5, np.float32)
    distance[1] = 1.3
    others = Nearest(np.array([[(i + j) % n for j in range(1, 13)] for i in range(n)]), distance)
    nowhere = Nearest(np.zeros((k, 0), np.int64), np.zeros((k, 0), np.float32))
    granularity = Granularity(
        k, np.ones(k, np.float32), assignment, np.zeros(n, np.float32), np.zeros(n, np.float32), nowhere
    )
    paths = tuple(f"{number}.png" for number in range(n))
    images = ImageFolder(None, paths, None, ())
    named = Labels(np.array(labels), ("cat", "dog"))
    return Knowledge(images, paths, named, torch.zeros(n, 2), (granularity,), others)


def test_each_finding():
    sizes = [20, 0, 4, 3, 2, 2, 2]
    labels = [0] * 33
    labels[5] = labels[21] = 1  # one in the pure cluster, one in a small one
    found = find(known(sizes, labels), np.zeros((33, GREY_SIDE, GREY_SIDE), np.uint8), complete=True)
    rows = {finding.name: finding.rows for finding in found}
    assert rows["outliers"][0] == (1, 1.3)
    assert rows["label-disagreements"] == [(5, "dog", "cat", 7, 0, 0.95)]
    assert rows["empty-clusters"] == [(7, 1, 0)]
    assert rows["overlarge-clusters"] == [(7, 0, 20)]
    for finding in found:
        assert all(len(row) == len(finding.columns) for row in finding.rows)


def test_duplicates_look_the_same():
    """Copies in another size and compressed again do; a shifted picture, its negative and a plain one do not."""
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((96, 96), Image.BICUBIC)
    shifted = picture.transform(picture.size, Image.AFFINE, (1, 0, 9, 0, 1, 0))
    negative = Image.eval(picture, lambda value: 255 - value)
    plain = Image.new("RGB", (96, 96), (120, 120, 120))
    images = [picture, picture.resize((61, 61), Image.BICUBIC), shifted, negative, plain, plain, *[negative] * 10]
    greys = np.stack([grey(image) for image in images[:6]] + [random.integers(0, 256, (16, 16)) for _ in range(10)])
    found = find(known([16], [0] * 16), greys.astype(np.uint8), complete=False)[0]
    assert sorted(row[:2] for row in found.rows) == [(0, 1), (4, 5)]
    # The most alike come first.
    assert [row[2] for row in found.rows] == sorted(row[2] for row in found.rows)


def test_the_majority_of_equals_is_the_first_class():
    granularity = known([4, 0, 3], [1, 0, 1, 0, 1, 1, 0]).granularities[0]
    label, purity = granularity.majority(Labels(np.array([1, 0, 1, 0, 1, 1, 0]), ("cat", "dog")))
    assert label.tolist() == [0, -1, 1]
    np.testing.assert_allclose(purity, [0.5, 0, 2 / 3])

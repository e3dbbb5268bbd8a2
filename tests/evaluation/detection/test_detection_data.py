"""The images that detectors are trained and tested on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coco_sets import SIZE, picture, rectangles, write_coco
from torchvision.transforms.functional import pil_to_tensor

from pcl_fast.data.loaders.resources import Resources
from pcl_fast.data.sources.coco import read_coco
from pcl_fast.distributed import World
from pcl_fast.errors import ImageError
from pcl_fast.evaluation.detection.data import Annotated, TestImages, TrainingImages, mirror

ALONE = Resources(0, 2, None, 0)


def rank_of(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> Annotated:
    split = read_coco(write_coco(tmp_path_factory.mktemp("coco"), images=7), "train2017")
    return Annotated(split.images, split.boxes, [labels + 1 for labels in split.labels], split.masks)


def test_images_without_objects_are_left_out(annotated):
    kept = Annotated(
        annotated.images, annotated.boxes, [labels if place != 1 else labels[:0] for place, labels in
        enumerate(annotated.labels)], annotated.masks,
    ).with_objects()  # fmt: skip
    assert len(annotated) == 8
    assert len(kept) == 6
    assert [kept.images.name(place)[-5] for place in range(6)] == list("023456")
    np.testing.assert_array_equal(kept.masks(1), annotated.masks(2))
    np.testing.assert_array_equal(kept.boxes[1], annotated.boxes[2])


def test_mirroring_moves_objects_along():
    """A column of pixels, its box and its mask."""
    image, mask = torch.zeros(3, 4, 10), torch.zeros(1, 4, 10, dtype=torch.uint8)
    image[:, 1:3, 2:5], mask[:, 1:3, 2:5] = 1, 1
    target = {"boxes": torch.tensor([[2.0, 1, 5, 3]]), "labels": torch.tensor([1]), "masks": mask}
    mirrored, found = mirror(image, target)
    x1, y1, x2, y2 = found["boxes"][0].int().tolist()
    expected = torch.zeros(4, 10)
    expected[y1:y2, x1:x2] = 1
    assert (x1, x2) == (5, 8)
    assert torch.equal(mirrored[0], expected)
    assert torch.equal(found["masks"][0], expected.byte())
    assert found["labels"] is target["labels"]


def test_half_of_the_images_are_mirrored_with_their_objects(annotated):
    loader = TrainingImages(annotated.with_objects(), batch_size=1, seed=5, world=rank_of(0, 1), resources=ALONE)
    turned = 0
    for epoch in range(4):
        for batch in loader.epoch(epoch):
            (index,), (image,), (target,) = batch.index, batch.images, batch.targets
            original = pil_to_tensor(picture(index)).float() / 255
            near, far = ((image - side).abs().mean() for side in (original, original.flip(2)))
            turned += bool(far < near)
            for mask, box, ((x1, _, x2, _), _) in zip(target["masks"], target["boxes"], rectangles(index), strict=True):
                assert box[0] == (SIZE[1] - x2 if far < near else x1)
                x1, y1, x2, y2 = box.int().tolist()
                assert mask.sum() == mask[y1:y2, x1:x2].sum() == (x2 - x1) * (y2 - y1)
                # The pixels are where the box says.
                assert image[:, y1:y2, x1:x2].max(0).values.min() > 0.5
            assert target["labels"].tolist() == [1, 2]
    assert 5 < turned < 23


def test_ranks_see_disjoint_images_and_an_epoch_goes_on_anywhere(annotated):
    kept = annotated.with_objects()

    def epoch(rank: int, size: int, first: int = 0) -> list[list[int]]:
        loader = TrainingImages(kept, batch_size=2 // size, seed=1, world=rank_of(rank, size), resources=ALONE)
        return [batch.index for batch in loader.epoch(3, first)]

    whole = epoch(0, 1)
    assert [sorted(a + b) for a, b in zip(epoch(0, 2), epoch(1, 2), strict=True)] == [sorted(step) for step in whole]
    assert epoch(0, 1, first=2) == whole[2:]
    assert len({index for step in whole for index in step}) == 6


def test_workers_make_the_same(annotated):
    kept = annotated.with_objects()
    batches = [
        list(TrainingImages(kept, batch_size=3, seed=1, world=rank_of(0, 1), resources=resources).epoch(0))
        for resources in (ALONE, Resources(1, 2, None, 0))
    ]
    for one, other in zip(*batches, strict=True):
        assert one.index == other.index
        assert all(torch.equal(a, b) for a, b in zip(one.images, other.images, strict=True))
        assert all(torch.equal(a["masks"], b["masks"]) for a, b in zip(one.targets, other.targets, strict=True))


def test_another_image_under_the_same_name(annotated):
    wrong = Annotated(
        annotated.images, annotated.boxes, annotated.labels, lambda index: np.zeros((2, 30, 30), np.uint8)
    )
    loader = TrainingImages(wrong, batch_size=1, seed=1, world=rank_of(0, 1), resources=ALONE)
    with pytest.raises(ImageError, match=r"has \(40, 56\) pixels, but its annotations say \(30, 30\)"):
        next(loader.epoch(0))


def test_ranks_share_the_test_images(annotated):
    found = [
        index
        for rank in range(3)
        for index, image in TestImages(annotated.images, world=rank_of(rank, 3), resources=ALONE)
        if image.shape == (3, *SIZE) and image.dtype == torch.float32 and 0 <= image.min() <= image.max() <= 1
    ]
    assert sorted(found) == list(range(8))

"""Running a detector over images, with one that finds what a test wants."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from coco_sets import SIZE, rectangles, write_coco
from faster_coco_eval.core import mask as rle
from ranks import run_ranks
from torch import nn

import pcl_fast.evaluation.detection.detecting as detecting
from pcl_fast.data.loaders.resources import Resources
from pcl_fast.data.sources.coco import read_coco
from pcl_fast.evaluation.detection.detecting import detect

RESOURCES = Resources(0, 2, None, 0)


class Seeing(nn.Module):
    """Finds the red rectangle by its pixels, with a mask that lacks a corner; nothing where there is none."""

    def forward(self, images):
        assert not self.training
        (image,) = images
        red = (image[0] > 0.7) & (image[1] < 0.4)
        rows, columns = red.any(1).nonzero()[:, 0], red.any(0).nonzero()[:, 0]
        found = min(len(rows), 1)
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if found else []
        masks = torch.zeros(found, 1, *image.shape[1:])
        if found:
            masks[0, 0, box[1] : box[3], box[0] : box[2]] = 0.9
            masks[0, 0, box[1] : box[1] + 5, box[0] : box[0] + 3] = 0.4
        boxes = torch.tensor([[float(side) for side in box]]).reshape(found, 4)
        return [
            {"boxes": boxes, "scores": torch.full((found,), 0.8), "labels": torch.ones(found).long(), "masks": masks}
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), images=4)


def look(world, folder, every: int = 50):
    images, told = read_coco(folder, "val2017").images, []
    with mock.patch.object(detecting, "_TELL_EVERY", every):
        found = detect(Seeing(), images, world=world, resources=RESOURCES, reached=lambda: told.append(1))
    return found, len(told)


def test_what_is_found_in_every_image(folder, alone):
    found, _ = look(alone, folder)
    assert len(found) == 5
    for number, item in enumerate(found[:4]):
        x1, y1, x2, y2 = rectangles(number)[0][0]
        np.testing.assert_allclose(item.boxes, [[x1, y1, x2, y2]], atol=1)
        x1, y1, x2, y2 = item.boxes[0].astype(int)
        mask = np.zeros(SIZE, np.uint8)
        mask[y1:y2, x1:x2] = 1
        mask[y1 : y1 + 5, x1 : x1 + 3] = 0
        np.testing.assert_array_equal(rle.decode(item.masks[0]), mask)
        assert (item.scores.tolist(), item.labels.tolist()) == ([pytest.approx(0.8)], [1])
    assert found[4].boxes.shape == (0, 4)
    assert found[4].masks == []


def test_two_ranks_find_what_one_does(folder, alone):
    """Five images: one rank has one less, but all call `reached` as often."""
    expected, _ = look(alone, folder)
    for found, told in run_ranks(2, look, folder, 1):
        assert told == 3
        for item, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(item.boxes, other.boxes)
            assert item.masks == other.masks

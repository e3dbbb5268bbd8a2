"""What is held out of the training images."""

from __future__ import annotations

import pytest
import torch

from pcl_fast.errors import ImageError
from pcl_fast.evaluation.held_out import hold_out, usual_share

# Classes of 2, 10, 300 and 41 images, mixed.
LABELS = torch.repeat_interleave(torch.arange(4), torch.tensor([2, 10, 300, 41]))
LABELS = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(("share", "counts"), [(0.1, [1, 1, 30, 4]), (0.5, [1, 5, 150, 20]), (0.999, [1, 9, 299, 40])])
def test_every_class_gives_its_share(share, counts):
    held = hold_out(LABELS, share, seed=0)
    assert torch.bincount(LABELS[held], minlength=4).tolist() == counts


def test_the_seed_draws():
    one, again, other = (hold_out(LABELS, 0.3, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    # Within a class they differ by chance in most images.
    assert (one & other).sum() < 0.6 * one.sum()


def test_the_draw_is_even():
    """No place of the data set is more likely held out than another."""
    labels = torch.zeros(20, dtype=torch.int64)
    counts = sum(hold_out(labels, 0.25, seed).long() for seed in range(400))
    assert counts.sum() == 400 * 5
    assert (counts - 100).abs().max() < 45


def test_what_cannot_be_divided():
    with pytest.raises(ImageError, match=r"1 of 3 classes \(number 1\) have a single training image"):
        hold_out(torch.tensor([0, 0, 1, 2, 2]), 0.5, 0)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            hold_out(LABELS, share, 0)


def test_the_usual_share():
    assert usual_share(1_281_167) == pytest.approx(10_000 / 1_281_167)
    assert usual_share(4000) == 0.1

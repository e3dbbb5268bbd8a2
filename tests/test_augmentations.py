"""Small crops beside large ones."""

from __future__ import annotations

import dataclasses

import pytest

from pcl_fast.augmentations import AUGMENTATIONS, View, check_areas, multi_crop, small_side


def test_small_crops_are_the_large_one_but_for_size_and_area():
    large = dataclasses.replace(AUGMENTATIONS["simclr"], min_area=0.14)
    crops = multi_crop(large, 6, areas=(0.05, 0.14))
    assert crops == (dataclasses.replace(large, size=96, min_area=0.05, max_area=0.14),) * 6
    assert multi_crop(large, 0) == ()


@pytest.mark.parametrize(("large", "small"), [(224, 96), (160, 69), (64, 27), (20, 9), (1, 1)])
def test_their_side_is_in_swav_s_proportion_unless_given(large, small):
    assert small_side(large) == small
    assert {crop.size for crop in multi_crop(View(size=large), 2)} == {small}
    assert {crop.size for crop in multi_crop(View(size=large), 2, size=14)} == {14}


@pytest.mark.parametrize("areas", [(0.0, 0.14), (0.2, 0.1), (0.5, 1.2), (-0.1, 0.5), (float("nan"), 0.5)])
def test_areas_that_are_no_shares_are_refused_by_their_flag(areas):
    with pytest.raises(ValueError, match=r"--swav.small-areas .*smaller one first"):
        check_areas("--swav.small-areas", areas)
    with pytest.raises(ValueError, match="areas"):
        multi_crop(View(), 2, areas=areas)


def test_numbers_and_sizes_that_no_crop_has_are_refused():
    for wrong in ({"count": -1}, {"count": 2, "size": 0}):
        with pytest.raises(ValueError, match="cannot be made"):
            multi_crop(View(), **wrong)

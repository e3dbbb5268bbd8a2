"""The random numbers of the views, against torchvision's own transforms over thousands of draws."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from pcl_fast.kernels.photometric_plain import Op
from scipy import stats
from torchvision import transforms

from pcl_fast.augmentations import AUGMENTATIONS
from pcl_fast.data.views.draws import Draws, draw_views, uniforms

DRAWS = 6000
JITTER = (Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION, Op.HUE)


def draw(name: str, size=(375, 500), images: int = DRAWS, number: int = 0, **changes) -> Draws:
    """One view of each of so many images of one size."""
    view, sizes = dataclasses.replace(AUGMENTATIONS[name], **changes), np.tile(np.array([size]), (images, 1))
    return draw_views(view, sizes, seed=0, epoch=1, number=number, index=np.arange(images))


def alike(ours, theirs) -> None:
    """Two samples of one distribution, by Kolmogorov and Smirnov. Seeds are fixed, so this passes or fails for good."""
    assert stats.ks_2samp(ours, theirs).pvalue > 0.01


def share(of: np.ndarray) -> float:
    return float(np.mean(of))


def factors_of(draws: Draws, op: Op) -> np.ndarray:
    return draws.factors[draws.ops == op]


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (40, 400), (300, 60), (3, 3)], ids=str)
def test_crops_are_distributed_as_torchvision_s(size):
    """Long images too, where ten attempts often fail and the centre is taken."""
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)])
    window = draw("v1", size).window
    for column in range(4):
        alike(window[:, column], theirs[:, column])
    alike(window[:, 2] * window[:, 3], theirs[:, 2] * theirs[:, 3])
    alike(window[:, 3] / window[:, 2], theirs[:, 3] / theirs[:, 2])
    assert (window[:, :2] >= 0).all()
    assert (window[:, :2] + window[:, 2:] <= size).all()
    assert (window[:, 2:] > 0).all()


@pytest.mark.parametrize(("name", "hue"), [("v1", 0.4), ("v2", 0.1)])
def test_jitter_is_distributed_as_torchvision_s(name, hue):
    torch.manual_seed(0)
    bounds = [[0.6, 1.4]] * 3 + [[-hue, hue]]
    theirs = [transforms.ColorJitter.get_params(*bounds)[1:] for _ in range(2000)]
    draws = draw(name)
    for op, factors in zip(JITTER, zip(*theirs, strict=True), strict=True):
        alike(factors_of(draws, op), [float(factor) for factor in factors])


def test_the_jitter_s_order_is_uniform():
    draws = draw("v1")
    orders = draws.ops[:, 1:]
    assert (np.sort(orders, axis=1) == np.array(JITTER)).all()
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(("name", "jitter", "blur"), [("v1", 1.0, 0.0), ("v2", 0.8, 0.5), ("digits", 0.0, 0.5)])
def test_shares_are_the_augmentation_s(name, jitter, blur):
    draws = draw(name)
    close = {"abs": 3 * math.sqrt(0.25 / DRAWS)}
    assert share((draws.ops == Op.HUE).any(axis=1)) == pytest.approx(jitter, **close)
    assert share((draws.ops == Op.GRAYSCALE).any(axis=1)) == pytest.approx(0 if name == "digits" else 0.2, **close)
    assert share(draws.sigma > 0) == pytest.approx(blur, **close)
    assert share(draws.flip) == pytest.approx(0 if name == "digits" else 0.5, **close)


def test_the_chosen_share_is_solarised_and_no_other_number_moves():
    draws, before = draw("v2", solarise_share=0.3), draw("v2")
    assert share(draws.solarise) == pytest.approx(0.3, abs=3 * math.sqrt(0.21 / DRAWS))
    assert not before.solarise.any()
    for ours, theirs in zip(draws[:-1], before[:-1], strict=True):
        assert ours is theirs is None or np.array_equal(ours, theirs)
    assert draw("v2", solarise_share=1.0).solarise.all()


def test_grey_comes_before_the_jitter_in_v1_and_after_it_in_v2():
    assert set(draw("v1").ops[:, 0]) == {Op.NONE, Op.GRAYSCALE}
    assert set(draw("v2").ops[:, 4]) == {Op.NONE, Op.GRAYSCALE}
    assert not (draw("v1").ops[:, 1:] == Op.GRAYSCALE).any()
    assert not (draw("v2").ops[:, :4] == Op.GRAYSCALE).any()


def test_blur_is_as_wide_as_the_paper_s():
    sigma = draw("v2").sigma
    alike(sigma[sigma > 0], np.random.default_rng(0).uniform(0.1, 2.0, DRAWS))


def test_what_is_drawn_is_independent():
    """Of each other, of the other view, of the neighbouring image and epoch."""
    draws, other = draw("v2", solarise_share=0.5), draw("v2", number=1)
    jittered = (draws.ops == Op.HUE).any(axis=1)
    columns = {
        "top": draws.window[:, 0], "left": draws.window[:, 1], "height": draws.window[:, 2], "flip": draws.flip,
        "sigma": draws.sigma, "grey": draws.ops[:, 4], "jitter": jittered, "solarise": draws.solarise,
        "other": other.window[:, 1],
        "next": np.roll(draws.window[:, 1], 1), "other flip": other.flip, "next flip": np.roll(draws.flip, 1),
    }  # fmt: skip
    for one, a in columns.items():
        for two, b in columns.items():
            related = {one, two} <= {"top", "left", "height"} or one == two  # all follow from the area
            assert related or abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(DRAWS), (one, two)
    brightness, contrast = (draws.factors[jittered][draws.ops[jittered] == op] for op in JITTER[:2])
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 5 / math.sqrt(DRAWS)


def test_views_depend_on_seed_epoch_view_and_image_alone():
    view, sizes = AUGMENTATIONS["v2"], np.array([[375, 500], [300, 200], [64, 64]])
    together = draw_views(view, sizes, seed=1, epoch=2, number=1, index=np.array([7, 8, 9]))
    alone = draw_views(view, sizes[1:2], seed=1, epoch=2, number=1, index=np.array([8]))
    for many, one in zip(together, alone, strict=True):
        assert many is one is None or np.array_equal(many[1:2], one)
    for change in ({"seed": 2}, {"epoch": 3}, {"number": 0}):
        keys = {"seed": 1, "epoch": 2, "number": 1, **change}
        other = draw_views(view, sizes, **keys, index=np.array([7, 8, 9]))
        assert not np.array_equal(other.window, together.window)


@pytest.mark.parametrize(
    ("name", "window", "ops", "hue", "sigma"),
    [
        ("v1", [21, 6, 38, 29], [5, 1, 4, 2, 3], -0.30635616183280945, 0),
        ("v2", [21, 6, 38, 29], [1, 4, 2, 3, 5], -0.07658904045820236, 0.25720271468162537),
        ("digits", [0, 0, 64, 64], [0, 0, 0, 0, 0], 0, 0.1827382743358612),
    ],
)
def test_numbers_stay_what_they_are(name, window, ops, hue, sigma):
    """A run that goes on under a later version sees the views that it would have seen."""
    sizes, index = np.array([[300, 200], [64, 64]]), np.array([1281166, 0])
    draws = draw_views(AUGMENTATIONS[name], sizes, seed=5, epoch=3, number=1, index=index)
    assert draws.window[1].tolist() == window
    assert draws.ops[1].tolist() == ops
    assert draws.flip.tolist() == [name != "digits", False]
    assert draws.factors[1][draws.ops[1] == Op.HUE] == pytest.approx(hue)
    assert draws.sigma == pytest.approx([sigma, 0])


def test_a_view_of_its_own_least_area():
    """Multi-crop's small views: no crop reaches below the bound, and all of the range is drawn."""
    window = draw("v2", (400, 400), min_area=0.05).window
    area = window[:, 2] * window[:, 3] / 400**2
    assert 0.0495 < area.min() < 0.055
    assert area.max() > 0.8


def test_a_view_of_its_own_largest_area():
    window = draw("v2", (400, 400), min_area=0.05, max_area=0.14).window
    area = window[:, 2] * window[:, 3] / 400**2
    assert 0.0495 < area.min() < 0.055
    assert 0.13 < area.max() < 0.141


def test_uniform_numbers_are_uniform():
    numbers = uniforms(5, np.arange(2000), 32)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in (0, 1, 15, 31):
        assert stats.kstest(numbers[:, column], "uniform").pvalue > 0.01
    assert len(np.unique(numbers)) == numbers.size


def test_distortions_are_torchvision_s():
    """The inverse map of what RandomAffine draws, for the same angle, translation, scale and shear."""
    from torchvision.transforms.functional import _get_inverse_affine_matrix

    height, width = 28, 36
    distortion = AUGMENTATIONS["digits"].distortion
    draws = draw("digits", (height, width), 50)
    uniform = uniforms_of_digits(50)
    for row in range(50):
        angle = (2 * uniform[row, 0] - 1) * distortion.degrees
        shift = [round((2 * u - 1) * 0.1 * side) for u, side in zip(uniform[row, 1:3], (width, height), strict=True)]
        scale = 0.9 + 0.4 * uniform[row, 3]
        shear = (2 * uniform[row, 4] - 1) * distortion.shear
        expected = _get_inverse_affine_matrix([width / 2, height / 2], angle, shift, scale, [shear, 0.0])
        np.testing.assert_allclose(draws.matrix[row].ravel(), expected, rtol=1e-5, atol=1e-4)


def uniforms_of_digits(draws: int) -> np.ndarray:
    from pcl_fast.seeds import Purpose, mix_seeds

    return uniforms(mix_seeds(0, Purpose.VIEWS, 1, 0), np.arange(draws), 5)

"""The views as PIL makes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pcl_fast.kernels.photometric_plain import Op
from photos import piece
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pcl_fast.augmentations import AUGMENTATIONS
from pcl_fast.data.views.draws import Draws, draw_views
from pcl_fast.data.views.pil import clustering_view, training_view

PHOTO = piece(0, 80, 60)


def draws(window=(0, 0, 60, 80), matrix=None, flip=False, ops=(), sigma=0.0, solarise=False) -> Draws:
    """One image's; ops are (op, factor)."""
    return Draws(
        np.array([window]),
        matrix,
        np.array([flip]),
        np.array([[op for op, _ in ops]], dtype=np.int32),
        np.array([[factor for _, factor in ops]], dtype=np.float32),
        np.array([sigma], dtype=np.float32),
        np.array([solarise]),
    )


def made(drawn: Draws, size: int = 40) -> np.ndarray:
    return training_view(PHOTO, drawn, 0, size).numpy()


RESIZED = F.resize(PHOTO, [40, 40])


@pytest.mark.parametrize(
    ("op", "factor", "expected"),
    [
        (Op.BRIGHTNESS, 1.3, lambda image: F.adjust_brightness(image, 1.3)),
        (Op.CONTRAST, 0.7, lambda image: F.adjust_contrast(image, 0.7)),
        (Op.SATURATION, 1.2, lambda image: F.adjust_saturation(image, 1.2)),
        (Op.HUE, -0.1, lambda image: F.adjust_hue(image, -0.1)),
        (Op.GRAYSCALE, 0, lambda image: image.convert("L").convert("RGB")),
        (Op.NONE, 0, lambda image: image),
    ],
)
def test_each_operation_is_torchvision_s(op, factor, expected):
    assert np.array_equal(made(draws(ops=[(op, float(np.float32(factor)))])), np.array(expected(RESIZED)))


def test_operations_come_in_order_then_blur_then_solarise_then_flip():
    image = F.adjust_contrast(F.adjust_brightness(RESIZED, 1.5), 0.5)
    image = ImageOps.solarize(image.filter(ImageFilter.GaussianBlur(1.5)), 128)
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawn = draws(flip=True, ops=[(Op.BRIGHTNESS, 1.5), (Op.CONTRAST, 0.5)], sigma=1.5, solarise=True)
    assert np.array_equal(made(drawn), np.array(image))
    other = draws(flip=True, ops=[(Op.CONTRAST, 0.5), (Op.BRIGHTNESS, 1.5)], sigma=1.5, solarise=True)
    assert not np.array_equal(made(other), np.array(image))


def test_crop_is_torchvision_s():
    expected = F.resized_crop(PHOTO, 7, 11, 40, 50, [40, 40], antialias=True)
    assert np.array_equal(made(draws(window=(7, 11, 40, 50))), np.array(expected))


def test_distortion_is_torchvision_s():
    """The map of RandomAffine's parameters goes the same way."""
    expected = F.affine(PHOTO, 15.0, [4, -3], 1.2, [10.0, 0.0], interpolation=F.InterpolationMode.BILINEAR)
    from torchvision.transforms.functional import _get_inverse_affine_matrix

    matrix = np.array(_get_inverse_affine_matrix([40, 30], 15.0, [4, -3], 1.2, [10.0, 0.0])).reshape(1, 2, 3)
    assert np.array_equal(made(draws(matrix=matrix)), np.array(F.resize(expected, [40, 40])))


@pytest.mark.parametrize("name", ["v1", "v2", "digits"])
@pytest.mark.parametrize("size", [8, 28, 224])
def test_views_are_bytes_of_the_right_size_and_differ(name, size):
    first, second = (
        draw_views(AUGMENTATIONS[name], np.array([[60, 80]]), seed=0, epoch=0, number=number, index=np.array([0]))
        for number in (0, 1)
    )
    first, second = (training_view(PHOTO, drawn, 0, size) for drawn in (first, second))
    assert first.dtype == torch.uint8
    assert first.shape == (size, size, 3)
    assert not torch.equal(first, second)


def test_clustering_view_is_the_centre_crop():
    view = clustering_view(PHOTO, 60, 40).numpy()
    assert np.array_equal(view, np.array(PHOTO)[10:50, 20:60])
    expected = v2.Compose([v2.Resize(51, antialias=True), v2.CenterCrop(33)])(PHOTO)
    assert np.array_equal(clustering_view(PHOTO, 51, 33).numpy(), np.array(expected))

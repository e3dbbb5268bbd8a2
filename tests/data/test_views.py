"""The augmentations."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pcl_fast.config import DataConfig
from pcl_fast.data.views import clustering_view, normalise, training_view


def photo() -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (3, 5, 7), generator=generator, dtype=torch.uint8)
    return v2.functional.to_pil_image(v2.functional.resize(coarse, [60, 80]))


def grey_share(views: str, draws: int = 400) -> float:
    view, image = training_view(DataConfig(views=views, size=16)), photo()
    torch.manual_seed(0)
    return sum(bool((v[0] == v[1]).all() and (v[1] == v[2]).all()) for v in (view(image) for _ in range(draws))) / draws


@pytest.mark.parametrize("views", ["v1", "v2", "digits"])
@pytest.mark.parametrize("size", [8, 28, 224])
def test_views_are_bytes_of_the_right_size_and_differ(views, size):
    view = training_view(DataConfig(views=views, size=size))
    first, second = view(photo()), view(photo())
    assert first.dtype == torch.uint8
    assert first.shape == (3, size, size)
    assert not torch.equal(first, second)


def test_a_fifth_of_the_paper_s_views_is_grey():
    assert grey_share("v1") == pytest.approx(0.2, abs=0.06)
    assert grey_share("v2") == pytest.approx(0.2, abs=0.06)


def test_the_recipes_are_the_paper_s():
    """Names and parameters in order, as torchvision prints them."""
    v1, v2_ = (repr(training_view(DataConfig(views=views))) for views in ("v1", "v2"))
    for text in ("scale=(0.2, 1.0)", "RandomGrayscale(p=0.2)", "saturation=(0.6, 1.4), hue=(-0.4, 0.4)"):
        assert text in v1
    for text in ("brightness=(0.6, 1.4)", "hue=(-0.1, 0.1)", "RandomGrayscale(p=0.2)", "sigma=0.1..2.0"):
        assert text in v2_
    assert v1.index("RandomGrayscale") < v1.index("ColorJitter") < v1.index("HorizontalFlip")
    assert v2_.index("ColorJitter") < v2_.index("RandomGrayscale") < v2_.index("Blur") < v2_.index("HorizontalFlip")


def test_clustering_view_is_the_centre_crop():
    view = clustering_view(DataConfig(size=40, resize=60))(photo())
    expected = v2.functional.pil_to_tensor(photo())[:, 10:50, 20:60]
    assert torch.equal(view, expected)


def test_normalise_is_torchvision_s():
    images = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    expected = v2.functional.normalize(images.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalise(images), expected, atol=1e-5, rtol=1e-5)
    assert normalise(images).is_contiguous(memory_format=torch.channels_last)

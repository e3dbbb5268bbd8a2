"""Colours of crops, and what encoders take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pcl_fast.kernels.photometric_plain import Op
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from pcl_fast.augmentations import AUGMENTATIONS
from pcl_fast.data import normalise
from pcl_fast.data.views.draws import Draws, draw_views
from pcl_fast.data.views.finish import Finisher
from pcl_fast.data.views.pil import training_view

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def crops(device: str) -> torch.Tensor:
    return torch.randint(0, 256, (5, 9, 7, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_normalisation_is_torchvision_s(device, dtype):
    """With the numbers that everybody uses for ImageNet."""
    images = crops(device)
    result = normalise(images, dtype)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected = F.normalize(images.permute(0, 3, 1, 2).float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    # These numbers are rounded to three digits in units of a byte's 255.
    torch.testing.assert_close(result, expected.to(dtype), atol=1e-5, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
def test_each_image_gets_its_own_colours(device):
    images = crops(device)
    nothing = np.zeros(5, dtype=np.float32)
    ops = np.array([[Op.NONE, Op.GRAYSCALE][i % 2] for i in range(5)], dtype=np.int32)[:, None]
    draws = Draws(np.zeros((5, 4)), None, nothing > 0, ops, nothing[:, None], nothing, nothing > 0)
    result = Finisher(2)(images, draws).cpu()
    for number, image in enumerate(images.cpu()):
        picture = Image.fromarray(image.numpy())
        expected = picture.convert("L").convert("RGB") if number % 2 else picture
        assert np.array_equal(result[number].numpy(), np.array(expected))


@pytest.mark.parametrize("device", DEVICES)
def test_solarise_is_pil_s_for_every_byte_of_the_chosen_views(device):
    images = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16, 1).repeat(4, 1, 1, 3)
    nothing, chosen = np.zeros(4, dtype=np.float32), np.array([True, False, True, False])
    ops = np.zeros((4, 1), dtype=np.int32)
    result = Finisher(2)(images, Draws(np.zeros((4, 4)), None, nothing > 0, ops, nothing[:, None], nothing, chosen))
    for view, solarised in zip(result.cpu(), chosen, strict=True):
        picture = Image.fromarray(images[0].cpu().numpy())
        assert np.array_equal(view.numpy(), np.array(ImageOps.solarize(picture, 128) if solarised else picture))


@pytest.mark.parametrize("device", DEVICES)
def test_all_colours_together_are_pil_s(device):
    """Of whole images of the view's own size, which no resize changes; solarise comes after the blur."""
    rng, n = np.random.default_rng(int.from_bytes(np.random.bytes(4))), 24
    images = rng.integers(0, 256, (n, 16, 16, 3)).astype(np.uint8)
    view = replace(AUGMENTATIONS["v2"], blur_share=0.7, solarise_share=0.6, flip_share=0.0)
    draws = draw_views(view, np.full((n, 2), 16), seed=int(rng.integers(2**31)), epoch=0, number=1, index=np.arange(n))
    draws = draws._replace(window=np.tile([0, 0, 16, 16], (n, 1)))
    assert (draws.solarise & (draws.sigma > 0)).any()
    found = Finisher(2)(torch.from_numpy(images).to(device), draws).cpu()
    for row, image in enumerate(images):
        assert torch.equal(found[row], training_view(Image.fromarray(image), draws, row, 16)), row

"""Colours of crops, and what encoders take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pcl_fast.kernels.photometric_plain import Op
from PIL import Image
from torchvision.transforms.v2 import functional as F

from pcl_fast.data import normalise
from pcl_fast.data.views.draws import Draws
from pcl_fast.data.views.finish import Finisher

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
    draws = Draws(np.zeros((5, 4)), None, nothing > 0, ops, nothing[:, None], nothing)
    result = Finisher(2)(images, draws).cpu()
    for number, image in enumerate(images.cpu()):
        picture = Image.fromarray(image.numpy())
        expected = picture.convert("L").convert("RGB") if number % 2 else picture
        assert np.array_equal(result[number].numpy(), np.array(expected))

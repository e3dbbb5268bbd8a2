"""From bytes to what an encoder takes."""

from __future__ import annotations

import pytest
import torch
from pcl_fast.kernels.normalise import BLOCK, normalise
from pcl_fast.kernels.normalise_plain import normalise as normalise_plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGENET = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}


def kernel(images, **options):
    return normalise(images.to(DEVICE), **options).cpu()


both = pytest.mark.parametrize("run", [kernel, normalise_plain])


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_byte_of_every_channel(run, dtype):
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    found = run(images, **IMAGENET, dtype=dtype)
    assert found.dtype == dtype
    assert found.shape == (2, 3, 16, 16)
    assert found.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(IMAGENET[name], dtype=torch.float64) for name in ("mean", "std"))
    expected = (images.double() - mean) / std
    error = (found.permute(0, 2, 3, 1) - expected).abs()
    # Triton's interpreter cuts a bfloat16 off where it should be rounded.
    cut_off = dtype == torch.bfloat16 and run is kernel and DEVICE == "cpu"
    # Beside the result the mean is rounded too, to float32, which shows where little is left of the difference.
    assert (error <= (1 if cut_off else 0.51) * torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, *[torch.bfloat16] * (DEVICE == "cuda")])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 11, 31), (4, 16, 16), (2, 19, 9), (3, 20, 18)])
def test_kernel_and_plain_version_agree_in_every_bit(shape, dtype):
    """Fewer entries than a block, one less, three blocks, one and two entries more, several and a part."""
    assert BLOCK == 1024
    images = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    assert torch.equal(*(run(images, **IMAGENET, dtype=dtype) for run in (kernel, normalise_plain)))


@both
def test_images_that_are_not_contiguous(run):
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    options = {**IMAGENET, "dtype": torch.float32}
    turned = run(images.transpose(1, 2), **options)
    assert torch.equal(turned, run(images, **options).transpose(2, 3))
    assert turned.is_contiguous(memory_format=torch.channels_last)


@both
def test_no_images(run):
    found = run(torch.zeros(0, 4, 5, 3, dtype=torch.uint8), **IMAGENET, dtype=torch.float16)
    assert found.shape == (0, 3, 4, 5)


@both
@pytest.mark.parametrize(
    ("images", "dtype", "message"),
    [
        (torch.zeros(2, 4, 4, 3), torch.float32, "images must be uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.float32, "images must be uint8"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), torch.float32, "images must be uint8"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.int32, "dtype must be"),
    ],
)
def test_wrong_arguments(run, images, dtype, message):
    with pytest.raises(ValueError, match=message):
        run(images, **IMAGENET, dtype=dtype)

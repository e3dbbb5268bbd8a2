"""Normalise images, the plain version of normalise.py."""

import torch


def normalise(
    images: torch.Tensor,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Do what normalise.normalise does, in the same bits."""
    check(images, dtype)
    n, h, w, _ = images.shape
    # The operands are whole rows of an image, for those of three entries would be taken one by one.
    shift, scale = (torch.tensor(numbers * w, dtype=torch.float32, device=images.device) for numbers in (mean, std))
    out = torch.sub(images.reshape(n, h, 3 * w), shift).div_(scale).to(dtype)
    return out.view(n, h, w, 3).permute(0, 3, 1, 2)


def check(images: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError for images or a dtype that cannot be normalised."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [n, h, w, 3], not {images.dtype} {list(images.shape)}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be float16, bfloat16 or float32, not {dtype}")

"""From the bytes of images to what an encoder takes: one pass on a GPU, and its plain twin."""

# Not with postponed annotations: Triton 3.1's interpreter would not know a tl.constexpr.
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

BLOCK = 1024  # entries at a time


def normalise(
    images: torch.Tensor,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """(image - mean) / std, computed in float32.

    Args:
        images: uint8 [n, h, w, 3].
        mean, std: of each channel, in units of a byte.
        dtype: of the result: float16, bfloat16 or float32.

    Returns:
        [n, 3, h, w] in channels_last.

    Raises:
        ValueError: a shape or type is wrong.
    """
    check(images, dtype)
    out = torch.empty(images.shape, dtype=dtype, device=images.device)
    if out.numel():
        with torch.cuda.device(images.device) if images.is_cuda else nullcontext():
            grid = (triton.cdiv(out.numel(), BLOCK),)
            shift_and_scale[grid](images.contiguous(), out, *mean, *std, out.numel(), BLOCK=BLOCK)
    return out.permute(0, 3, 1, 2)


def normalise_plain(
    images: torch.Tensor,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The twin: the same bits."""
    check(images, dtype)
    n, h, w, _ = images.shape
    # By whole rows of an image: operands of three entries would be taken one by one.
    shift, scale = (torch.tensor(numbers * w, dtype=torch.float32, device=images.device) for numbers in (mean, std))
    out = torch.sub(images.reshape(n, h, 3 * w), shift).div_(scale).to(dtype)
    return out.view(n, h, w, 3).permute(0, 3, 1, 2)


def check(images: torch.Tensor, dtype: torch.dtype) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [n, h, w, 3], not {images.dtype} {list(images.shape)}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be float16, bfloat16 or float32, not {dtype}")


@triton.jit(do_not_specialize=["entries"])
def shift_and_scale(
    images, out, mean0, mean1, mean2, std0, std1, std2, entries, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes out, as many entries as images. Grid: blocks of entries."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = first + tl.arange(0, BLOCK)
    channel = place % 3
    mean = tl.where(channel == 0, mean0, tl.where(channel == 1, mean1, mean2))
    std = tl.where(channel == 0, std0, tl.where(channel == 1, std1, std2))
    x = tl.load(images + place, mask=place < entries, other=0).to(tl.float32)
    tl.store(out + place, tl.div_rn(x - mean, std), mask=place < entries)

"""Normalise images: from their bytes to what an encoder takes, in one pass."""

# Not with postponed annotations: Triton 3.1's interpreter would not know a tl.constexpr.
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from pcl_fast.kernels.normalise_plain import check

BLOCK = 1024  # entries are taken at a time


def normalise(
    images: torch.Tensor,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return (image - mean) / std, computed in float32.

    Args:
        images: uint8 [n, h, w, 3].
        mean, std: mean and deviation of each channel, in units of a byte.
        dtype: the result's: float16, bfloat16 or float32.

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


@triton.jit(do_not_specialize=["entries"])
def shift_and_scale(
    images, out, mean0, mean1, mean2, std0, std1, std2, entries, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes out, which has as many entries as images. Grid: blocks of entries."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.arange(0, BLOCK)
    channel = ((first % 3).to(tl.int32) + step) % 3
    mean = tl.where(channel == 0, mean0, tl.where(channel == 1, mean1, mean2))
    std = tl.where(channel == 0, std0, tl.where(channel == 1, std1, std2))
    # Only the last block is masked: a mask whose end may lie anywhere would have every entry moved by itself.
    if first + BLOCK <= entries:
        x = tl.load(images + first + step).to(tl.float32)
        tl.store(out + first + step, tl.div_rn(x - mean, std))
    else:
        mask = first + step < entries
        x = tl.load(images + first + step, mask=mask, other=0).to(tl.float32)
        tl.store(out + first + step, tl.div_rn(x - mean, std), mask=mask)

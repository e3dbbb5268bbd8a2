"""The plain version of photometric.py for CPUs: PyTorch operations alone. Also what both share: codes, checks, limits.

An image is three planes of whole numbers in float32, which holds all that come up (below 2^24) exactly. It takes some
100 operations, each of which must be one of those that take a few microseconds: they run over whole planes, write to
memory that is there already, and compare to floats. Masks of bools and `where` take ten times as long.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import Executor
from enum import IntEnum

import torch

MAX_SIGMA = 2.44  # pixels: from sqrt(6) on, PIL's box reaches further than two pixels

# `add` takes a tensor as its first operand, and a factor for the second: a constant and a multiple in one operation.
_HALF, _MINUS_5, _170 = torch.tensor([32768.0, -5.0, 170.0]).unbind()
_MIDDLES = torch.tensor([-255.0, -170.0, -340.0]).unbind()


class Op(IntEnum):
    """An operation says what a slot does to an image."""

    NONE = 0
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4
    GRAYSCALE = 5


def photometric(
    images: torch.Tensor,
    ops: torch.Tensor,
    factors: torch.Tensor,
    sigma: torch.Tensor,
    *,
    pool: Executor | None = None,
) -> torch.Tensor:
    """Do what photometric.photometric does, in the same bits, for images on the CPU.

    Args:
        pool: threads that share the images among them; without them the images are done one after the other. PyTorch's
            own threads are of little use to operations this short: each of these should be set to one.
    """
    check(images, ops, factors, sigma)
    n, h, w, _ = images.shape
    out = torch.empty(n, h, w, 3, dtype=torch.uint8)
    steps = [list(zip(*slots, strict=True)) for slots in zip(ops.tolist(), factors.tolist(), strict=True)]
    weights = box_weights(sigma)
    left = iter(range(n))

    def work() -> None:
        canvas = _Canvas(h, w)
        for i in left:
            canvas.read(images[i])
            for op, factor in steps[i]:
                canvas.apply(op, factor)
            if weights[i] is not None:
                canvas.blur(weights[i])
            canvas.write(out[i])

    if pool is None:
        work()
    else:
        for task in [pool.submit(work) for _ in range(min(n, os.cpu_count() or 1))]:
            task.result()
    return out


def check(images: torch.Tensor, ops: torch.Tensor, factors: torch.Tensor, sigma: torch.Tensor) -> None:
    """Raise ValueError for arguments that are not as photometric.py says, as far as a GPU need not be waited for."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [n, h, w, 3], not {images.dtype} {list(images.shape)}")
    n = len(images)
    if ops.dtype != torch.int32 or ops.ndim != 2 or len(ops) != n:
        raise ValueError(f"ops must be int32 [{n}, slots], not {ops.dtype} {list(ops.shape)}")
    if factors.dtype != torch.float32 or factors.shape != ops.shape:
        raise ValueError(f"factors must be float32 {list(ops.shape)}, not {factors.dtype} {list(factors.shape)}")
    if sigma.dtype != torch.float32 or sigma.shape != (n,):
        raise ValueError(f"sigma must be float32 [{n}], not {sigma.dtype} {list(sigma.shape)}")
    if sigma.device.type == "cpu" and not ((sigma >= 0) & (sigma <= MAX_SIGMA)).all():
        raise ValueError(f"sigma must lie in [0, {MAX_SIGMA}]: beyond, PIL's box reaches further than two pixels")


def box_weights(sigma: torch.Tensor) -> list[tuple[int, int, int] | None]:
    """Return the weights, in 2^-24, of a pixel, its neighbours and theirs in a pass of the blur; None without a blur.

    PIL computes them like this, in single precision, from Gwosdek et al., "Theoretical foundations of Gaussian
    convolution by extended box filtering" (2011): a box of 1 + 2 floor(radius) pixels and a part of the two next to it.
    """
    variance = sigma.square() / 3  # each of the three passes adds a third
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    radius = whole + rest / (6 * (variance - (whole + 1) * (whole + 1)))
    within, reach = (2**24 / (2 * radius + 1)).int(), radius.int()
    beyond = (2**24 - (2 * reach + 1) * within) // 2
    near, far = torch.where(reach == 0, beyond, within), torch.where(reach == 0, 0, beyond)
    weights = zip(within.tolist(), near.tolist(), far.tolist(), strict=True)
    return [taps if blurred else None for taps, blurred in zip(weights, (sigma > 0).tolist(), strict=True)]


class _Canvas:
    """A canvas holds one image at a time, as planes float32 [3, h, w], and the memory to work on it.

    It is allocated once for many images: the system takes several times as long to hand out memory as the operations
    take to fill it.
    """

    def __init__(self, h: int, w: int):
        self.planes = torch.empty(3, h, w)
        self._channels = self.planes.unbind()
        # What works on the planes takes turns with one piece of memory, small enough to stay in the caches.
        work = torch.empty(6 * (h + 4) * (w + 4))
        self._spare = work[: 6 * h * w].view(6, h, w).unbind()
        self._pixels = work[: 3 * h * w].view(h, w, 3)
        # The blur works on two copies of the planes, with two pixels around them.
        boxes = work.view(torch.int32).view(2, 3, h + 4, w + 4)
        self._blurred = boxes[0, :, 2:-2, 2:-2]
        self._lines = [[_Lines(box, axis) for box in boxes] for axis in (2, 1)]

    def read(self, image: torch.Tensor) -> None:
        """Take an image, uint8 [h, w, 3]."""
        self.planes.copy_(image.permute(2, 0, 1))

    def write(self, out: torch.Tensor) -> None:
        """Write the image to uint8 [h, w, 3]."""
        # These are two steps because a copy that transposes takes much longer if it converts as well.
        out.copy_(self._pixels.copy_(self.planes.permute(1, 2, 0)))

    def apply(self, op: int, factor: float) -> None:
        """Do to the image what a slot says."""
        if op == Op.BRIGHTNESS:
            self.planes.mul_(factor).clamp_(0, 255).floor_()
        elif op == Op.CONTRAST:
            luma = self._luma()
            total = luma.sum(1).sum(dtype=torch.float64).item()  # exact, as a row's sum is below 2^24
            self._blend(math.floor(total / luma.numel() + 0.5), factor)
        elif op == Op.SATURATION:
            self._blend(self._luma(), factor)
        elif op == Op.HUE:
            self._turn(int(factor * 255) % 256)
        elif op == Op.GRAYSCALE:
            self.planes.copy_(self._luma())

    def _luma(self) -> torch.Tensor:
        r, g, b = self._channels
        luma = torch.add(_HALF, r, alpha=19595, out=self._spare[0])
        return luma.add_(g, alpha=38470).add_(b, alpha=7471).mul_(2.0**-16).floor_()

    def _blend(self, reference: torch.Tensor | int, factor: float) -> None:
        """Round the product and the sum, as PIL does; with a factor for `add_` they would be rounded as one."""
        self.planes.sub_(reference).mul_(factor).add_(reference).clamp_(0, 255).floor_()

    def _turn(self, shift: int) -> None:
        """Convert to PIL's HSV in bytes, which has 255 hues and not 256, and back with the hue shifted modulo 256.

        The hue in sixths is 1, 3 or 5 where b, r or g is the least, and from there, up or down, how far the middle
        channel lies below the highest, in units of the chroma. Where b > g everything is mirrored, h to 6 - h, which an
        absolute value does: the sign of the distance depends on red alone, and 1 and 3 become -5 and -3.
        """
        r, g, b = self._channels
        high, low, value, chroma, hue, red_least = self._spare
        torch.maximum(g, b, out=high)
        torch.minimum(g, b, out=low)
        torch.maximum(high, r, out=value)
        torch.minimum(low, r, out=chroma)
        torch.sub(value, chroma, out=chroma)
        torch.lt(r, low, out=red_least)
        torch.sub(low, high, out=low)
        torch.sub(high, r, out=high)
        torch.lerp(high, low, red_least, out=hue)
        hue.div_(torch.clamp(chroma, min=1, out=high))
        start = torch.add(_MINUS_5, torch.ge(g, b, out=low), alpha=6, out=low).add_(red_least, alpha=2)
        hue.add_(start).abs_()
        # Where 255ths are whole, rounding errors decide on their floor. They do as in PIL up to 5; beyond, PIL counts
        # down from 6 and does not fall short.
        beyond = torch.threshold(hue, 5, 0, out=low)
        hue.div_(6).mul_(255).add_(beyond, alpha=2e-4).floor_().add_(shift)
        hue.sub_(torch.ge(hue, 256, out=low), alpha=256)
        saturation = chroma.mul_(255).div_(torch.clamp(value, min=1, out=high)).floor_()
        self._from_hsv(hue, saturation, value)

    def _from_hsv(self, hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> None:
        """Set every channel to value (1 - saturation / 255 a / 85), with a = 0 ... 85 piecewise linear in the hue."""
        planes, red = self.planes, self._channels[0]
        for plane, middle in zip(self._channels, _MIDDLES, strict=True):
            torch.add(middle, hue, alpha=2, out=plane)
        planes.abs_()
        torch.sub(_170, red, out=red)
        planes[1:].sub_(85)
        most = saturation.mul_(value).mul_(1 / (255 * 85))
        torch.sub(value, planes.clamp_(0, 85).mul_(most), out=planes).round_()

    def blur(self, weights: tuple[int, int, int]) -> None:
        """Apply three boxes along the rows, then three along the columns."""
        missing = 2**24 - weights[0] - 2 * weights[1] - 2 * weights[2]
        rounding = torch.tensor(2**23 - 128 * missing, dtype=torch.int32)
        # From bytes 128 is subtracted, so that their weighted sums fit into int32.
        self._blurred.copy_(self.planes.sub_(128))
        for i in range(6):
            lines = self._lines[i // 3]
            lines[i % 2].box(lines[1 - i % 2], weights, rounding)
        self.planes.copy_(self._blurred).add_(128)


class _Lines:
    """Lines are padded planes, int32 [3, h + 4, w + 4], seen along one axis."""

    def __init__(self, planes: torch.Tensor, axis: int):
        size, step = planes.shape[axis], planes.stride(axis)
        self._ends = [
            (planes.narrow(axis, to, 2), planes.narrow(axis, of, 1)) for to, of in ((0, 2), (size - 2, size - 3))
        ]
        # All lines are taken as one. What a box mixes up between two of them is padding, which is made anew before the
        # next box.
        whole, count = planes.view(-1), planes.numel() - 4 * step
        self._shifted = [whole.narrow(0, tap * step, count) for tap in range(5)]
        self._centre = self._shifted[2]

    def box(self, target: _Lines, weights: tuple[int, int, int], rounding: torch.Tensor) -> None:
        """Set target to (sum of weighted pixels + rounding) / 2^24; beyond the ends their pixels are repeated."""
        for padding, end in self._ends:
            padding.copy_(end)
        total = torch.add(rounding, self._centre, alpha=weights[0], out=target._centre)
        for distance, weight in enumerate(weights[1:], start=1):
            if weight:
                total.add_(self._shifted[2 - distance], alpha=weight)
                total.add_(self._shifted[2 + distance], alpha=weight)
        total.bitwise_right_shift_(24)

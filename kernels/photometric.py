"""Colour jitter, grey and blur of uint8 crops on the GPU.

The bytes are PIL's, on which torchvision and with it the papers' official code rely: after every step they are whole
numbers again. Four launches; none waits for the host, or adds in an order left to chance:

add_luma   Contrast needs the image's mean luma at that point. Program (image, part) runs the slots before it on its
           share of the pixels and adds up their luma, in integers. Images without contrast are left out.
jitter     Program (image, block of pixels) runs all slots in registers. What a slot does is the same for the whole
           program: a branch, not a selection. The program writes to the result, or to where the blur reads.
blur       PIL's Gaussian is three boxes along the rows, then three along the columns, each rounded to bytes. A thread
twice      has one channel of one row and walks along it. Of each box it keeps the last five values in registers, so
           every box runs two pixels behind the one before it; one byte comes in at a step, one goes out, and nothing
           between is stored or computed twice. It reads along the rows, at each step as many sectors as rows, which
           the L1 cache holds for the next steps, and writes side by side what lies on top of each other: the image
           transposed. So the second launch, along the columns, is the first once more.

Bytes moved, for an image of B bytes: B with contrast, and 2 B without a blur, 6 B with it.
The blur takes some 45 integer instructions a byte and launch, which is more than its bytes take.

Numerics. Integers wherever PIL has them, else float32 in PIL's order, with divisions correctly rounded and no fused
multiply-adds. That is needed: hues that are whole numbers of PIL's 255ths end above or below by their rounding errors.
No colour and no blur differs from PIL's (tests/kernels/test_photometric.py).
"""

# Not with postponed annotations: Triton 3.1's interpreter would not know a tl.constexpr.
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from pcl_fast.kernels.photometric_plain import Op, check

PARTS = 16  # programs share the sum of an image's luma
BLOCK = 512  # pixels are taken at a time
LINES = 64  # channels of rows are taken by a program of `blur`, each by a thread

# A fused multiply-add rounds once where PIL rounds twice.
EXACT = {"enable_fp_fusion": False}

_BRIGHTNESS = tl.constexpr(Op.BRIGHTNESS.value)
_CONTRAST = tl.constexpr(Op.CONTRAST.value)
_SATURATION = tl.constexpr(Op.SATURATION.value)
_HUE = tl.constexpr(Op.HUE.value)
_GRAYSCALE = tl.constexpr(Op.GRAYSCALE.value)


def photometric(
    images: torch.Tensor,
    ops: torch.Tensor,
    factors: torch.Tensor,
    sigma: torch.Tensor,
) -> torch.Tensor:
    """Run the slots of every image in turn, and blur it.

    Args:
        images: uint8 [n, h, w, 3], of fewer than 2^25 pixels each.
        ops: int32 [n, slots] of `Op`, at most one CONTRAST an image.
        factors: float32 [n, slots]. 1 changes nothing but for the hue, which is shifted by -0.5 to 0.5 of a turn.
        sigma: float32 [n], standard deviation of the blur in pixels; 0 without a blur. At most `MAX_SIGMA`, which is
            not checked for a tensor on a GPU: beyond it the result is wrong.

    Returns:
        uint8 [n, h, w, 3], contiguous.

    Raises:
        ValueError: a shape or type is wrong, or, on the CPU, a sigma is out of bounds.
    """
    check(images, ops, factors, sigma)
    out = torch.empty(images.shape, dtype=torch.uint8, device=images.device)
    if out.numel():
        with torch.cuda.device(images.device) if images.is_cuda else nullcontext():
            _launch(*(tensor.contiguous() for tensor in (images, ops, factors, sigma)), out)
    return out


def _launch(images, ops, factors, sigma, out):
    n, h, w, _ = images.shape
    luma = torch.empty(n, PARTS, dtype=torch.int32, device=images.device)
    jittered, transposed = torch.empty(2, *images.shape, dtype=torch.uint8, device=images.device)
    jitters = slots(ops.shape[1]) | EXACT
    lines = {"LINES": LINES, "num_warps": LINES // 32} | EXACT
    add_luma[(n, PARTS)](images, ops, factors, luma, h * w, **jitters)
    jitter[(n, triton.cdiv(h * w, BLOCK))](images, ops, factors, sigma, luma, jittered, out, h * w, **jitters)
    blur[(n, triton.cdiv(3 * h, LINES))](jittered, sigma, transposed, h, w, **lines)
    blur[(n, triton.cdiv(3 * w, LINES))](transposed, sigma, out, w, h, **lines)


def slots(count: int) -> dict[str, int]:
    """Return the constants with which `add_luma` and `jitter` are compiled."""
    return {"SLOTS": count, "PARTS": PARTS, "BLOCK": BLOCK}


@triton.jit
def _luma(r, g, b):
    return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16


@triton.jit
def _divide(x, y):
    return tl.div_rn(x.to(tl.float32), y.to(tl.float32))


@triton.jit
def _blend(reference, x, factor):
    """Return floor(reference + factor (x - reference)), within a byte."""
    blended = reference.to(tl.float32) + factor * (x - reference).to(tl.float32)
    return tl.minimum(tl.maximum(blended, 0.0), 255.0).to(tl.int32)


@triton.jit
def _blend_channels(reference, r, g, b, factor):
    return _blend(reference, r, factor), _blend(reference, g, factor), _blend(reference, b, factor)


@triton.jit
def _turn(r, g, b, factor):
    """Convert to PIL's HSV in bytes, which has 255 hues and not 256, and back with the hue shifted modulo 256."""
    value = tl.maximum(tl.maximum(r, g), b)
    least = tl.minimum(tl.minimum(r, g), b)
    # In sixths: 1, 3 or 5 where b, r or g is the least and, up or down, how far the middle channel lies below the
    # highest. What is below 0 is a turn further.
    red, green = r == value, g == value
    falls = tl.where(red, g >= b, tl.where(green, b >= r, r >= g))
    start = tl.where(red, 0, tl.where(green, 2, 4)) + tl.where(falls, 1, -1)
    distance = _divide(2 * value + least - r - g - b, tl.maximum(value - least, 1))
    sixths = start.to(tl.float32) + tl.where(falls, -distance, distance)
    turns = tl.div_rn(sixths, 6.0)
    turns = tl.where(sixths < 0, turns + 1.0, turns)
    hue = ((turns * 255.0).to(tl.int32) + (factor.to(tl.float64) * 255).to(tl.int32)) & 255
    saturation = _divide((value - least) * 255, tl.maximum(value, 1)).to(tl.int32)

    most = value * saturation
    r = _lower(value, most, 170 - tl.abs(2 * hue - 255))
    g = _lower(value, most, tl.abs(2 * hue - 170) - 85)
    b = _lower(value, most, tl.abs(2 * hue - 340) - 85)
    return r, g, b


@triton.jit
def _lower(value, most, share):
    """Return value - most / 255 share / 85, rounded, with share from 0 to 85. It is never a half: 255 * 85 is odd."""
    share = tl.minimum(tl.maximum(share, 0), 85)
    return value - (2 * most * share + 255 * 85) // (2 * 255 * 85)


@triton.jit
def _run(r, g, b, ops, factors, stop, pivot):
    """Return the channels after the slots before `stop`. Contrast takes `pivot` for the image's mean luma."""
    for slot in range(0, stop):
        op = tl.load(ops + slot)
        factor = tl.load(factors + slot)
        if op == _BRIGHTNESS:
            r, g, b = _blend_channels(tl.zeros_like(r), r, g, b, factor)
        elif op == _CONTRAST:
            r, g, b = _blend_channels(tl.zeros_like(r) + pivot, r, g, b, factor)
        elif op == _SATURATION:
            r, g, b = _blend_channels(_luma(r, g, b), r, g, b, factor)
        elif op == _HUE:
            r, g, b = _turn(r, g, b, factor)
        elif op == _GRAYSCALE:
            r = _luma(r, g, b)
            g = r
            b = r
    return r, g, b


@triton.jit
def _read(image, place, valid):
    """Load the channels of pixels as int32."""
    r = tl.load(image + 3 * place, mask=valid, other=0)
    g = tl.load(image + 3 * place + 1, mask=valid, other=0)
    b = tl.load(image + 3 * place + 2, mask=valid, other=0)
    return r.to(tl.int32), g.to(tl.int32), b.to(tl.int32)


@triton.jit
def _write(to, r, g, b, valid):
    tl.store(to, r, mask=valid)
    tl.store(to + 1, g, mask=valid)
    tl.store(to + 2, b, mask=valid)


@triton.jit(do_not_specialize=["pixels"])
def add_luma(
    images, ops, factors, luma, pixels, SLOTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes luma [n, PARTS] int32: sums over the parts of images with contrast. Grid: images x PARTS."""
    image = tl.program_id(0)
    part = tl.program_id(1)
    ops += image * SLOTS
    factors += image * SLOTS
    images += image.to(tl.int64) * pixels * 3
    stop = SLOTS
    for slot in tl.static_range(SLOTS):
        stop = tl.where(tl.load(ops + slot) == _CONTRAST, slot, stop)
    if stop < SLOTS:
        total = tl.zeros([BLOCK], tl.int32)
        for start in range(part * BLOCK, pixels, PARTS * BLOCK):
            place = start + tl.arange(0, BLOCK)
            r, g, b = _read(images, place, place < pixels)
            r, g, b = _run(r, g, b, ops, factors, stop, 0)
            total += _luma(r, g, b)  # beyond the image it is black, which stays black until contrast
        tl.store(luma + image * PARTS + part, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["pixels"])
def jitter(
    images, ops, factors, sigma, luma, jittered, out, pixels,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes jittered for images with a blur, and out for the others. Grid: images x blocks of pixels."""
    image = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = place < pixels
    first = image.to(tl.int64) * pixels * 3
    # Without contrast nobody wrote these sums, and nobody uses them.
    total = tl.sum(tl.load(luma + image * PARTS + tl.arange(0, PARTS)).to(tl.int64), axis=0)
    pivot = ((2 * total + pixels) // (2 * pixels)).to(tl.int32)
    r, g, b = _read(images + first, place, valid)
    r, g, b = _run(r, g, b, ops + image * SLOTS, factors + image * SLOTS, SLOTS, pivot)
    at = first + 3 * place
    if tl.load(sigma + image) > 0:
        _write(jittered + at, r, g, b, valid)
    else:
        _write(out + at, r, g, b, valid)


@triton.jit
def _box_weights(sigma):
    """Return the weights of photometric_plain.box_weights, as uint32."""
    variance = tl.div_rn(sigma * sigma, 3.0)
    whole = tl.floor((tl.sqrt_rn(12 * variance + 1) - 1) * 0.5)
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    radius = whole + tl.div_rn(rest, 6 * (variance - (whole + 1) * (whole + 1)))
    within = tl.div_rn(16777216.0, 2 * radius + 1).to(tl.uint32)
    reach = radius.to(tl.uint32)
    beyond = (16777216 - (2 * reach + 1) * within) >> 1
    return within, tl.where(reach == 0, beyond, within), tl.where(reach == 0, 0, beyond)


@triton.jit
def _box(x0, x1, x2, x3, x4, centre, near, far):
    return (x2 * centre + (x1 + x3) * near + (x0 + x4) * far + 8388608) >> 24


@triton.jit(do_not_specialize=["rows", "length"])
def blur(source, sigma, out, rows, length, LINES: tl.constexpr):
    """Writes out [n, length, rows, 3] from source [n, rows, length, 3], of images with a blur: three boxes along
    `length`. Grid: images x blocks of lines."""
    image = tl.program_id(0)
    strength = tl.load(sigma + image)
    if strength > 0:
        centre, near, far = _box_weights(strength)
        line = tl.program_id(1) * LINES + tl.arange(0, LINES)
        valid = line < 3 * rows
        channel = line % 3
        first = image.to(tl.int64) * rows * length * 3
        at = source + first + (line // 3) * (length * 3) + channel
        to = out + first + line
        # Pixels x, values y of the first box and z of the second: the four that came last. The next is x4, y4, z4.
        # Each begins as a value of its own, though `_start` would not need it: of variables that begin as one value
        # and are handed on among each other (x0 = x1) Triton's compiler sees no change, and leaves them as they were.
        x0, x1, x2, x3 = _first(at, valid), _first(at, valid), _first(at, valid), _first(at, valid)
        y0, y1, y2, y3 = _first(at, valid), _first(at, valid), _first(at, valid), _first(at, valid)
        z0, z1, z2, z3 = _first(at, valid), _first(at, valid), _first(at, valid), _first(at, valid)
        for step in range(0, length + 6):
            x4 = tl.load(at + 3 * tl.minimum(step, length - 1), mask=valid, other=0).to(tl.uint32)
            # A box's first value stands for those before it too, and its last for those after it.
            y4 = tl.where(step < length + 2, _box(x0, x1, x2, x3, x4, centre, near, far), y3)
            y0, y1, y2, y3 = _start(step <= 2, y4, y0, y1, y2, y3)
            z4 = tl.where(step < length + 4, _box(y0, y1, y2, y3, y4, centre, near, far), z3)
            z0, z1, z2, z3 = _start(step <= 4, z4, z0, z1, z2, z3)
            blurred = _box(z0, z1, z2, z3, z4, centre, near, far)
            tl.store(to + (step - 6) * (rows * 3), blurred, mask=valid & (step >= 6))
            x0, x1, x2, x3 = x1, x2, x3, x4
            y0, y1, y2, y3 = y1, y2, y3, y4
            z0, z1, z2, z3 = z1, z2, z3, z4


@triton.jit
def _first(at, valid):
    return tl.load(at, mask=valid, other=0).to(tl.uint32)


@triton.jit
def _start(condition, x, x0, x1, x2, x3):
    return (
        tl.where(condition, x, x0),
        tl.where(condition, x, x1),
        tl.where(condition, x, x2),
        tl.where(condition, x, x3),
    )

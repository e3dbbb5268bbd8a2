"""Max pooling of activations in channels_last, and its gradient.

pool     A program has some pixels of the result and a block of channels. It reads each pixel's window, which the caches
         hold for the neighbours, and writes the maximum. For a backward pass it also writes which of the window's
         pixels that came from, counted line by line: a byte, where PyTorch writes a place in the image, of 8 bytes.
unpool   A program has some pixels of the image. Each lies in at most ceil(kernel / stride)^2 windows, and adds up the
         gradients of those that took it, in float32 and always in the same order: no atomics, the same bits every run.

Bytes moved, with V values in and W values out of b bytes: b V + b W and W forward, b V + b W + W backward. PyTorch's
indices alone are 8 W each way.
"""

# Not with postponed annotations: Triton 3.1's interpreter would not know a tl.constexpr.
import torch
import triton
import triton.language as tl
from pcl_fast.kernels.launch import on
from torch.autograd.function import once_differentiable

VALUES = 2048  # that a program takes
COLUMNS = 64  # channels of a program, at most
MOST = 15  # pixels along a window: its places are bytes


def max_pool(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Return the maxima over windows, as torch.nn.functional.max_pool2d does: NaN counts as the largest value.

    Differentiable, once. The first of equal values gets the gradient.

    Args:
        x: [N, C, H, W] float16, bfloat16 or float32, in channels_last or copied to it.
        kernel: pixels along a window, 1 to 15.
        stride: pixels between windows, at least 1.
        padding: pixels of -inf on each side of the image, at most half of `kernel`.

    Returns:
        [N, C, (H + 2 padding - kernel) // stride + 1, likewise of W], in channels_last.

    Raises:
        ValueError: an argument is out of bounds, or the image is smaller than a window.
    """
    _check(x, kernel, stride, padding)
    x = x.contiguous(memory_format=torch.channels_last)
    if torch.is_grad_enabled() and x.requires_grad:
        return _MaxPool.apply(x, kernel, stride, padding)
    return torch.ops.pcl_fast.max_pool(x, kernel, stride, padding, False)[0]


def _check(x, kernel, stride, padding) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point [N, C, H, W], not {x.dtype} {list(x.shape)}")
    if not 1 <= kernel <= MOST:
        raise ValueError(f"a window must be of 1 to {MOST} pixels a side, not {kernel}")
    if stride < 1:
        raise ValueError(f"the stride must be at least 1, not {stride}")
    if not 0 <= padding <= kernel // 2:
        raise ValueError(f"the padding must be at most half of the window of {kernel}, not {padding}")
    if min(_size(x.shape[2], kernel, stride, padding), _size(x.shape[3], kernel, stride, padding)) < 1:
        raise ValueError(f"no window of {kernel} fits into {list(x.shape[2:])} pixels and a padding of {padding}")


def _size(pixels, kernel, stride, padding):
    return (pixels + 2 * padding - kernel) // stride + 1


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, stride, padding):
        y, taps = torch.ops.pcl_fast.max_pool(x, kernel, stride, padding, True)
        ctx.save_for_backward(taps)
        ctx.options = *x.shape[2:], kernel, stride, padding
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dy = dy.contiguous(memory_format=torch.channels_last)
        return torch.ops.pcl_fast.max_pool_backward(dy, *ctx.saved_tensors, *ctx.options), None, None, None


# --- operators ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("pcl_fast", "FRAGMENT")
for _schema in (
    "max_pool(Tensor x, int kernel, int stride, int padding, bool keep) -> (Tensor y, Tensor taps)",
    "max_pool_backward(Tensor dy, Tensor taps, SymInt height, SymInt width, int kernel, int stride, int padding) "
    "-> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _new_pooled(x, kernel, stride, padding, keep):
    sides = [_size(pixels, kernel, stride, padding) for pixels in x.shape[2:]]
    y = _channels_last(x, *sides)
    return y, torch.empty_like(y, dtype=torch.uint8) if keep else x.new_empty(0, dtype=torch.uint8)


def _new_dx(dy, taps, height, width, kernel, stride, padding):
    return _channels_last(dy, height, width)


def _channels_last(like, height, width):
    size = (*like.shape[:2], height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _pool(x, kernel, stride, padding, keep):
    y, taps = _new_pooled(x, kernel, stride, padding, keep)
    c = x.shape[1]
    if y.numel():
        pixels = y.numel() // c
        with on(x):
            pool[_grid(pixels, c)](
                x, y, taps, pixels, c, *x.shape[2:], *y.shape[2:],
                KERNEL=kernel, STRIDE=stride, PADDING=padding, KEEP=keep, **tile(c),
            )  # fmt: skip
    return y, taps


def _unpool(dy, taps, height, width, kernel, stride, padding):
    dx = _new_dx(dy, taps, height, width, kernel, stride, padding)
    c = dy.shape[1]
    if dx.numel():
        pixels = dx.numel() // c
        with on(dy):
            unpool[_grid(pixels, c)](
                dy, taps, dx, pixels, c, height, width, *dy.shape[2:],
                KERNEL=kernel, STRIDE=stride, PADDING=padding, **tile(c),
            )  # fmt: skip
    return dx


def tile(channels: int) -> dict[str, int]:
    """Return what a program takes."""
    columns = min(COLUMNS, triton.next_power_of_2(channels))
    return {"ROWS": VALUES // columns, "COLUMNS": columns}


def _grid(pixels: int, channels: int) -> tuple[int, int]:
    rows, columns = tile(channels).values()
    return triton.cdiv(pixels, rows), triton.cdiv(channels, columns)


for _name, _run, _fake in (("max_pool", _pool, _new_pooled), ("max_pool_backward", _unpool, _new_dx)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pcl_fast::{_name}", _fake)


# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _split(pixel, height, width):
    """Return the image, row and column of pixels that are counted through."""
    line = pixel // width
    return line // height, line % height, pixel % width


@triton.jit
def _tile(pixels, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return this program's pixels [ROWS], its channels [1, COLUMNS], and the mask of both."""
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return pixel, channel, (pixel < pixels)[:, None] & (channel < channels)


@triton.jit(do_not_specialize=["pixels", "h", "w", "out_h", "out_w"])
def pool(
    x, y, taps, pixels, channels, h, w, out_h, out_w,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes y [pixels, channels], and with KEEP taps. Grid: pixels of the result, blocks of channels.

    Moves: reads x, writes y; KEEP: writes a byte a value.
    """
    pixel, channel, valid = _tile(pixels, channels, ROWS, COLUMNS)
    image, row, column = _split(pixel, out_h, out_w)
    top = row * STRIDE - PADDING
    left = column * STRIDE - PADDING
    best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    # Where all is -inf, the first pixel that there is.
    tap = (tl.maximum(-top, 0) * KERNEL + tl.maximum(-left, 0))[:, None] + tl.zeros([ROWS, COLUMNS], tl.int32)
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            there = (top + i >= 0) & (top + i < h) & (left + j >= 0) & (left + j < w)
            at = ((image.to(tl.int64) * h + top + i) * w + left + j) * channels
            value = tl.load(x + at[:, None] + channel, mask=valid & there[:, None], other=float("-inf")).to(tl.float32)
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            tap = tl.where(better, i * KERNEL + j, tap)
    place = pixel.to(tl.int64)[:, None] * channels + channel
    tl.store(y + place, best.to(y.dtype.element_ty), mask=valid)
    if KEEP:
        tl.store(taps + place, tap.to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=["pixels", "h", "w", "out_h", "out_w"])
def unpool(
    dy, taps, dx, pixels, channels, h, w, out_h, out_w,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes dx [pixels, channels]. Grid: pixels of the image, blocks of channels.

    Moves: reads dy and a byte a value of it, writes dx.
    """
    pixel, channel, valid = _tile(pixels, channels, ROWS, COLUMNS)
    image, row, column = _split(pixel, h, w)
    last_row = (row + PADDING) // STRIDE
    last_column = (column + PADDING) // STRIDE
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
        for j in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
            out_row = last_row - i
            out_column = last_column - j
            down = row + PADDING - out_row * STRIDE
            along = column + PADDING - out_column * STRIDE
            there = (out_row >= 0) & (out_row < out_h) & (out_column >= 0) & (out_column < out_w)
            mask = valid & (there & (down < KERNEL) & (along < KERNEL))[:, None]
            at = (((image.to(tl.int64) * out_h + out_row) * out_w + out_column) * channels)[:, None] + channel
            took = tl.load(taps + at, mask=mask, other=255).to(tl.int32) == (down * KERNEL + along)[:, None]
            gradient = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
            total += tl.where(took, gradient, 0.0)
    tl.store(dx + pixel.to(tl.int64)[:, None] * channels + channel, total.to(dx.dtype.element_ty), mask=valid)

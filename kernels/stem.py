"""The first convolution of a ResNet, of 7 x 7 pixels with a stride of 2, as one of 4 x 4 blocks with a stride of 1.

Images have three channels, too few for matrix units, which take eight or more at a time: cuDNN pads them with zeros, in
a pass of its own, and multiplies these too. So 2 x 2 pixels become one pixel of 16 channels, and filters of
7 x 7 x 3 become 4 x 4 x 16. Along a line, pixel d of tap m of a folded filter is tap 2 m + d - 1 of the filter:

    y[i] = sum over k < 7 of w[k] x[2 i + k - 3] = sum over m < 4, d < 2 of w[2 m + d - 1] x[2 (i + m - 2) + d]

where w[-1] = 0. The products are the same ones, and some with zeros.

stack_blocks    x in blocks, with the convolution's padding around them: 2 blocks before and 1 behind.
fold_filters    the filters, rounded to the type of x.
unfold_filters  their gradient from that of the folded.

Bytes moved, of N images of V values of b bytes: stack_blocks reads b V N and writes 4/3 b V N and the padding; the
others are as small as filters are. No atomics, the same bits every run.
"""

# Not with postponed annotations: Triton 3.1's interpreter would not know a tl.constexpr.
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from pcl_fast.kernels.launch import on
from torch.autograd.function import once_differentiable

COLOURS, SIDE = 3, 7
TAPS = 4  # of a folded filter along a line
CHANNELS = 16  # of a block: 2 x 2 pixels of 3 colours and a zero
ROWS = 128  # blocks of a program of stack_blocks
BLOCK = 1024  # entries of a program of the others


def stem(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return F.conv2d(x, weight, bias, stride=2, padding=3) of images x by filters of 7 x 7 pixels.

    Differentiable, once, in weight and bias. These and their gradients are rounded to the type of x, as under autocast.

    Args:
        x: [N, 3, H, W] float16, bfloat16 or float32, in channels_last or copied to it; it must not need a gradient.
        weight: [D, 3, 7, 7] of any floating dtype.
        bias: [D] or None.

    Returns:
        [N, D, (H + 1) // 2, (W + 1) // 2] like x.

    Raises:
        ValueError: a shape or type is another, or x needs a gradient.
    """
    _check(x, weight)
    blocks = torch.ops.pcl_fast.stem_stack(x.contiguous(memory_format=torch.channels_last))
    return F.conv2d(blocks, _Fold.apply(weight, x.dtype), bias if bias is None else bias.to(x.dtype))


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != COLOURS or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        kinds = "float16, bfloat16 or float32"
        raise ValueError(f"x must be {kinds} [N, {COLOURS}, H, W], not {x.dtype} {list(x.shape)}")
    if weight.ndim != 4 or tuple(weight.shape[1:]) != (COLOURS, SIDE, SIDE) or not weight.is_floating_point():
        wanted = f"[D, {COLOURS}, {SIDE}, {SIDE}]"
        raise ValueError(f"weight must be floating-point {wanted}, not {weight.dtype} {list(weight.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x needs a gradient, which this convolution does not compute")


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, dtype):
        ctx.dtype = weight.dtype
        return torch.ops.pcl_fast.stem_fold(weight, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        return torch.ops.pcl_fast.stem_unfold(gradient, ctx.dtype), None


# --- operators ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("pcl_fast", "FRAGMENT")
for _schema in (
    "stem_stack(Tensor x) -> Tensor",
    "stem_fold(Tensor weight, ScalarType dtype) -> Tensor",
    "stem_unfold(Tensor gradient, ScalarType dtype) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _new_blocks(x):
    h, w = ((pixels + 1) // 2 + TAPS - 1 for pixels in x.shape[2:])
    return _channels_last(x, x.dtype, x.shape[0], CHANNELS, h, w)


def _new_folded(weight, dtype):
    return _channels_last(weight, dtype, weight.shape[0], CHANNELS, TAPS, TAPS)


def _new_unfolded(gradient, dtype):
    return _channels_last(gradient, dtype, gradient.shape[0], COLOURS, SIDE, SIDE)


def _channels_last(like, dtype, *size):
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _stack(x):
    blocks = _new_blocks(x)
    count = blocks.numel() // CHANNELS
    if count:
        with on(x):
            stack_blocks[(triton.cdiv(count, ROWS),)](x, blocks, count, *x.shape[2:], *blocks.shape[2:], ROWS=ROWS)
    return blocks


def _fold(weight, dtype):
    folded = _new_folded(weight, dtype)
    if folded.numel():
        with on(weight):
            fold_filters[(triton.cdiv(folded.numel(), BLOCK),)](
                weight, folded, folded.numel(), *weight.stride(), BLOCK=BLOCK
            )
    return folded


def _unfold(gradient, dtype):
    unfolded = _new_unfolded(gradient, dtype)
    if unfolded.numel():
        with on(gradient):
            unfold_filters[(triton.cdiv(unfolded.numel(), BLOCK),)](gradient, unfolded, unfolded.numel(), BLOCK=BLOCK)
    return unfolded


for _name, _run, _fake in (
    ("stack", _stack, _new_blocks),
    ("fold", _fold, _new_folded),
    ("unfold", _unfold, _new_unfolded),
):
    _library.impl(f"stem_{_name}", _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pcl_fast::stem_{_name}", _fake)


# --- kernels ------------------------------------------------------------------------------------------------------
# A channel of a block counts as 8 dy + 4 dx + colour: colour 3 is zero.


@triton.jit(do_not_specialize=["pixels", "h", "w", "out_h", "out_w"])
def stack_blocks(x, y, pixels, h, w, out_h, out_w, ROWS: tl.constexpr):
    """Write y [pixels, 16], which are the blocks, from x [N, h, w, 3]. Grid: blocks."""
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = pixel // out_w
    channel = tl.arange(0, 16)[None, :]
    row = (2 * (line % out_h) - 4)[:, None] + channel // 8
    column = (2 * (pixel % out_w) - 4)[:, None] + channel // 4 % 2
    colour = channel % 4
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w) & (colour < 3) & (pixel < pixels)[:, None]
    image = (line // out_h).to(tl.int64)[:, None]
    value = tl.load(x + ((image * h + row) * w + column) * 3 + colour, mask=inside, other=0.0)
    tl.store(y + pixel.to(tl.int64)[:, None] * 16 + channel, value, mask=(pixel < pixels)[:, None])


@triton.jit(do_not_specialize=["entries"])
def fold_filters(weight, folded, entries, filter_stride, colour_stride, row_stride, column_stride, BLOCK: tl.constexpr):
    """Write folded [D, 4, 4, 16] from weight, of any strides. Grid: blocks of entries."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = entry % 16
    colour = channel % 4
    row = 2 * (entry // 64 % 4) + channel // 8 - 1
    column = 2 * (entry // 16 % 4) + channel // 4 % 2 - 1
    at = entry // 256 * filter_stride + colour * colour_stride + row * row_stride + column * column_stride
    mask = (entry < entries) & (colour < 3) & (row >= 0) & (column >= 0)
    value = tl.load(weight + at, mask=mask, other=0.0)
    tl.store(folded + entry, value.to(folded.dtype.element_ty), mask=entry < entries)


@triton.jit(do_not_specialize=["entries"])
def unfold_filters(gradient, unfolded, entries, BLOCK: tl.constexpr):
    """Write unfolded [D, 7, 7, 3] from gradient [D, 4, 4, 16]. Grid: blocks of entries."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    colour = entry % 3
    column = entry // 3 % 7 + 1
    row = entry // 21 % 7 + 1
    channel = row % 2 * 8 + column % 2 * 4 + colour
    at = ((entry // 147 * 4 + row // 2) * 4 + column // 2) * 16 + channel
    value = tl.load(gradient + at, mask=entry < entries, other=0.0)
    tl.store(unfolded + entry, value.to(unfolded.dtype.element_ty), mask=entry < entries)

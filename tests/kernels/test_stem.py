"""The stem's convolution by blocks against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pcl_fast.kernels.stem import ROWS, stem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# [N, H, W]: even and odd sides, one pixel, less than a filter, several programs and a part of one.
SHAPES = [(2, 8, 12), (1, 7, 9), (1, 1, 1), (3, 2, 5), (2, 34, 19)]


def images(n: int, h: int, w: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, 3, h, w).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def filters(d: int = 8, memory_format=torch.channels_last) -> torch.Tensor:
    return (torch.randn(d, 3, 7, 7, device=DEVICE) / 12).contiguous(memory_format=memory_format).requires_grad_()


@pytest.fixture(autouse=True)
def full_precision():
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # mkldnn.flags sets that too
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_is_as_near_to_float64_as_pytorch_s(shape, dtype, memory_format):
    x, weight, bias = images(*shape, dtype), filters(memory_format=memory_format), torch.randn(8, device=DEVICE)
    y = stem(x, weight, bias)
    assert y.dtype == dtype
    upstream = torch.randn_like(y)
    exact_weight = weight.detach().double().requires_grad_()
    exact = F.conv2d(x.double(), exact_weight, bias.double(), stride=2, padding=3)
    assert y.shape == exact.shape
    # oneDNN, for CPUs with AMX, at times makes filters' gradients NaN for an image of one pixel in bfloat16.
    with torch.backends.mkldnn.flags(enabled=False):
        usual = F.conv2d(x, weight.to(dtype), bias.to(dtype), stride=2, padding=3)
        (theirs,) = torch.autograd.grad(usual, weight, upstream)
    _as_near(y, usual, exact, dtype)
    (found,) = torch.autograd.grad(y, weight, upstream)
    (wanted,) = torch.autograd.grad(exact, exact_weight, upstream.double())
    assert found.dtype == weight.dtype
    _as_near(found, theirs, wanted, dtype)


def _as_near(found, usual, exact, dtype) -> None:
    errors, allowed = ((each.double() - exact).abs().max() for each in (found, usual))
    assert errors <= 2 * allowed + 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_every_pixel_and_every_entry_of_a_filter_counts_once():
    """Whole numbers are exact in every order: each product is there, and no other."""
    shape = (2, 3, 34, 33)
    assert 2 * ROWS < 2 * 20 * 20  # several programs
    x = torch.randint(-8, 9, shape).float().to(DEVICE).contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-8, 9, (5, 3, 7, 7), device=DEVICE).float().requires_grad_()
    y, expected = stem(x, weight), F.conv2d(x, weight, stride=2, padding=3)
    assert torch.equal(y, expected)
    upstream = torch.randint(-8, 9, y.shape, device=DEVICE).float()
    found, wanted = (torch.autograd.grad(each, weight, upstream)[0] for each in (y, expected))
    assert torch.equal(found, wanted)


def test_what_is_not_in_channels_last():
    x, weight = torch.randn(2, 3, 6, 10, device=DEVICE), filters()
    torch.testing.assert_close(stem(x, weight), F.conv2d(x, weight, stride=2, padding=3))


def test_under_autocast_as_a_convolution():
    x, weight = images(2, 16, 16, torch.bfloat16), filters()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, usual = stem(x, weight), F.conv2d(x, weight, stride=2, padding=3)
    assert y.dtype == usual.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(y, usual, rtol=0.02, atol=0.02)


def test_no_images():
    assert stem(torch.zeros(0, 3, 8, 8, device=DEVICE), filters()).shape == (0, 8, 4, 4)


def test_operators_are_sound():
    """Their schema and their fake tensors are right, and torch.compile can trace them."""
    operators, x = torch.ops.pcl_fast, images(2, 5, 8)
    torch.library.opcheck(operators.stem_stack.default, (x,))
    torch.library.opcheck(operators.stem_fold.default, (filters().detach(), torch.float16))
    gradient = torch.randn(8, 16, 4, 4, device=DEVICE).half().contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(operators.stem_unfold.default, (gradient, torch.float32))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    x, weight = images(2, 8, 10), filters()

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return stem(x, weight * 2).square().sum()

    torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")(x, weight).backward()
    (expected,) = torch.autograd.grad(F.conv2d(x, weight * 2, stride=2, padding=3).square().sum(), weight)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 4, 8, 8), torch.zeros(8, 3, 7, 7), r"float32 \[N, 3, H, W\], not .*\[2, 4, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(8, 3, 7, 7), "not torch.uint8"),
        (torch.zeros(2, 3, 8, 8).double(), torch.zeros(8, 3, 7, 7), "not torch.float64"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(8, 3, 7, 7, dtype=torch.int32), "not torch.int32"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(8, 3, 3, 3), r"\[D, 3, 7, 7\], not torch.float32 \[8, 3, 3, 3\]"),
        (torch.zeros(2, 3, 8, 8, requires_grad=True), torch.zeros(8, 3, 7, 7), "x needs a gradient"),
    ],
)
def test_errors_name_argument_and_value(x, weight, message):
    with pytest.raises(ValueError, match=message):
        stem(x.to(DEVICE), weight.to(DEVICE))

"""Max pooling against PyTorch's, and its gradient against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pcl_fast.kernels.max_pool import VALUES, max_pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A ResNet's on several sizes [N, C, H, W]: its stem in small; a pixel; one channel more than a block; several programs
# and a part of one. Then others: what no window or several share, a stride beyond the window, no padding.
CASES = [((3, 2, 1), shape) for shape in ((2, 64, 6, 6), (1, 8, 1, 1), (2, 65, 5, 7), (1, 24, 13, 18))]
CASES += [(window, (1, 16, 7, 8)) for window in ((2, 2, 0), (3, 1, 1), (1, 1, 0), (5, 3, 2), (2, 3, 1))]


def activations(shape, dtype, seed: int | None = None) -> torch.Tensor:
    """As behind ReLU: many are equal."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).relu()
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "shape"), CASES, ids=str)
def test_equals_pytorch(window, shape, dtype):
    x = activations(shape, dtype).requires_grad_()
    y = max_pool(x, *window)
    expected = F.max_pool2d(x, *window)
    assert torch.equal(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, upstream)
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.max_pool2d(exact, *window), exact, upstream.double())
    # Float32 adds up at most 9 gradients here (25 taps of stride 3 share a pixel 4 times), and one rounding follows.
    assert ((dx.double() - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-5).all()
    assert ((dx != 0) == (wanted != 0)).all() or dtype != torch.float32
    with torch.no_grad():
        assert torch.equal(max_pool(x, *window), y)


def test_more_than_a_program():
    shape = (3, 64, 9, 31)
    values = 3 * 64 * 5 * 16  # of the result
    assert values > 2 * VALUES
    x = activations(shape, torch.float32, seed=1)
    assert torch.equal(max_pool(x, 3, 2, 1), F.max_pool2d(x, 3, 2, 1))


def test_the_first_of_equal_values_gets_the_gradient():
    x = torch.zeros(1, 8, 5, 5, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn(1, 8, 3, 3, device=DEVICE)
    ours, theirs = (torch.autograd.grad(pool(x, 3, 2, 1), x, upstream)[0] for pool in (max_pool, F.max_pool2d))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_values_that_are_no_numbers(value):
    """As PyTorch has them on a CPU. On a GPU, in channels_last, it takes the image's first pixel for the maximum of a
    window that is all -inf, and loses the gradient if that pixel does not lie in the window.
    """
    x = activations((2, 16, 6, 6), torch.float32, seed=0)
    x[0, :, 2, 3], x[1] = value, value
    on_cpu = x.cpu().requires_grad_()
    x.requires_grad_()
    y, expected = max_pool(x, 3, 2, 1), F.max_pool2d(on_cpu, 3, 2, 1)
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    upstream = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(y, x, upstream.to(DEVICE))
    (wanted,) = torch.autograd.grad(expected, on_cpu, upstream)
    torch.testing.assert_close(dx.cpu(), wanted)


def test_what_is_not_in_channels_last():
    x = torch.randn(2, 16, 6, 7, device=DEVICE, requires_grad=True)
    y = max_pool(x, 3, 2, 1)
    assert torch.equal(y, F.max_pool2d(x, 3, 2, 1))
    upstream = torch.randn(y.shape, device=DEVICE)  # contiguous in the other order
    ours, theirs = (torch.autograd.grad(out, x, upstream)[0] for out in (y, F.max_pool2d(x, 3, 2, 1)))
    torch.testing.assert_close(ours, theirs)


def test_no_images():
    assert max_pool(torch.zeros(0, 8, 4, 4, device=DEVICE), 3, 2, 1).shape == (0, 8, 2, 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    x = activations((2, 16, 6, 6), torch.float32).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return max_pool(x * 2, 3, 2, 1).sum()

    torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")(x).backward()
    (expected,) = torch.autograd.grad(F.max_pool2d(x * 2, 3, 2, 1).sum(), x)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    ("shape", "window", "message"),
    [
        ((2, 3, 4), (3, 2, 1), r"\[N, C, H, W\].*\[2, 3, 4\]"),
        ((1, 1, 4, 4), (16, 2, 1), "1 to 15 pixels a side, not 16"),
        ((1, 1, 4, 4), (3, 0, 1), "stride must be at least 1, not 0"),
        ((1, 1, 4, 4), (3, 2, 2), "at most half of the window of 3, not 2"),
        ((1, 1, 1, 4), (4, 2, 1), r"no window of 4 fits into \[1, 4\] pixels and a padding of 1"),
    ],
)
def test_errors_name_argument_and_value(shape, window, message):
    with pytest.raises(ValueError, match=message):
        max_pool(torch.zeros(shape, device=DEVICE), *window)

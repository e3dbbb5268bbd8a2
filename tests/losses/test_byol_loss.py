"""BYOL's loss against 2 - 2 cos, row by row in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pcl_fast.losses import byol


def rows(n: int, d: int = 24, *, distance: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and targets of any length, each near its other; float64, and other ones every time."""
    generator = torch.Generator()
    generator.seed()
    common = torch.randn(d, generator=generator, dtype=torch.float64)
    target = common + torch.randn(n, d, generator=generator, dtype=torch.float64)
    lengths = 10 * torch.rand(n, 1, generator=generator, dtype=torch.float64) + 0.1
    return lengths * (target + distance * torch.randn(n, d, generator=generator, dtype=torch.float64)), target


def formula(prediction: torch.Tensor, target: torch.Tensor) -> list[float]:
    def dot(x: list[float], y: list[float]) -> float:
        return math.fsum(u * v for u, v in zip(x, y, strict=True))

    pairs = zip(prediction.tolist(), target.tolist(), strict=True)
    return [2 - 2 * dot(p, z) / math.sqrt(dot(p, p) * dot(z, z)) for p, z in pairs]


def naive(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 2 - 2 * F.cosine_similarity(prediction, target, dim=1)


def gradient(loss, prediction: torch.Tensor, target: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    prediction = prediction.clone().requires_grad_()
    return torch.autograd.grad(loss(prediction, target), prediction, upstream.to(prediction.dtype))[0]


@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize("distance", [3.0, 0.1])
def test_equals_the_formula(n, distance):
    given = rows(n, distance=distance)
    assert byol(*given).tolist() == pytest.approx(formula(*given), rel=1e-10, abs=1e-13)


def test_gradient_in_float64():
    given, upstream = rows(17), torch.randn(17, dtype=torch.float64)
    found = gradient(byol, *given, upstream)
    torch.testing.assert_close(found, gradient(naive, *given, upstream), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [1.0, 0.05])
def test_is_as_exact_as_pytorch_in_the_same_type(dtype, distance):
    low = [part.to(dtype) for part in rows(40, distance=distance)]
    high, upstream = [part.double() for part in low], torch.randn(40, dtype=torch.float64)
    ours, exact = byol(*low), naive(*high)
    theirs = naive(*low)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + 1e-6
    exact = gradient(naive, *high, upstream)
    found, others = (gradient(loss, *low, upstream).double() for loss in (byol, naive))
    assert (found - exact).abs().max() <= (others - exact).abs().max() + 1e-5


def test_rows_that_nearly_agree_keep_their_digits():
    """2 - 2 cos is 0 in float32, or less."""
    target = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    prediction = torch.tensor([[5.0, 5e-5], [5.0, 0.0]])
    assert byol(prediction, target).tolist() == pytest.approx([1e-10, 0.0], rel=1e-5)
    found = gradient(byol, prediction, target, torch.ones(2))
    assert found[0].tolist() == pytest.approx([-4e-11, 2 * 1e-5 / 5], rel=1e-2, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_row_of_zeros_has_no_gradient(dtype):
    prediction, target = (part.to(dtype) for part in rows(3))
    prediction[1] = 0
    assert byol(prediction, target)[1].item() == pytest.approx(1, abs=1e-3)
    found = gradient(byol, prediction, target, torch.ones(3))
    assert found.isfinite().all()
    assert found.any(1).tolist() == [True, False, True]


def test_targets_are_constants():
    prediction, target = (part.requires_grad_() for part in rows(5))
    byol(prediction, target).sum().backward()
    assert target.grad is None
    assert prediction.grad.any()


def test_autocast_leaves_it_alone():
    given = [part.float() for part in rows(8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = byol(*given)
    assert torch.equal(found, byol(*given))


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (torch.ones(3), torch.ones(3), r"prediction must be \[N, d\] floating point"),
        (torch.ones(0, 2), torch.ones(0, 2), "N >= 1"),
        (torch.ones(3, 2).long(), torch.ones(3, 2), r"floating point.*int64"),
        (torch.ones(3, 2), torch.ones(2, 2), r"must be alike, got \[3, 2\].*\[2, 2\]"),
        (torch.ones(3, 2), torch.ones(3, 2).half(), "must be alike.*float16"),
    ],
)
def test_bad_input_is_refused(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        byol(prediction, target)

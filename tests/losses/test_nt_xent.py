"""NT-Xent against the paper's formula, row by row in float64, and on two ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

from pcl_fast.losses import nt_xent


def features(n: int, d: int = 16, *, seed: int | None = None, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views, correlated with each other and, for a small spread, with all others; float64."""
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    middle = torch.randn(d, generator=generator, dtype=torch.float64)
    a = middle + spread * torch.randn(n, d, generator=generator, dtype=torch.float64)
    b = a + 0.5 * spread * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return F.normalize(a, dim=1), F.normalize(b, dim=1)


def rows(a: torch.Tensor, b: torch.Tensor, temperature: float) -> list[float]:
    """The paper's formula in Python."""
    views, n = torch.cat([a, b]).double().tolist(), len(a)

    def score(i: int, j: int) -> float:
        return math.fsum(x * y for x, y in zip(views[i], views[j], strict=True)) / temperature

    losses = []
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        scores = [score(i, k) for k in range(2 * n) if k != i]
        top = max(scores)
        losses.append(top + math.log(math.fsum(math.exp(s - top) for s in scores)) - score(i, j))
    return losses


def naive(a: torch.Tensor, b: torch.Tensor, temperature: float) -> torch.Tensor:
    views = torch.cat([a, b])
    scores = views @ views.T / temperature
    scores = scores.masked_fill(torch.eye(len(views), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(views)).roll(len(a)), reduction="none")


def gradients(loss, a: torch.Tensor, b: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    return torch.autograd.grad(loss(a, b), (a, b), upstream.to(a.dtype))


@pytest.mark.parametrize("spread", [1.0, 0.01])
@pytest.mark.parametrize(("n", "temperature"), [(2, 0.5), (7, 0.1), (33, 0.07)])
def test_equals_the_paper_s_formula(n, temperature, spread):
    a, b = features(n, spread=spread)
    assert nt_xent(a, b, temperature).tolist() == pytest.approx(rows(a, b, temperature), rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_is_as_exact_as_pytorch_in_the_same_type(dtype, spread):
    a, b = features(24, spread=spread)
    upstream = torch.rand(48, dtype=torch.float64)
    low = a.to(dtype), b.to(dtype)
    exact_rows, plain, ours = (
        naive(low[0].double(), low[1].double(), 0.1),
        naive(*low, 0.1).float(),
        nt_xent(*low, 0.1),
    )
    assert ours.dtype == torch.float32
    assert (ours - exact_rows).abs().max() <= (plain - exact_rows).abs().max() + 1e-6
    exact = gradients(lambda x, y: naive(x, y, 0.1), low[0].double(), low[1].double(), upstream)
    found = gradients(lambda x, y: nt_xent(x, y, 0.1), *low, upstream.float())
    theirs = gradients(lambda x, y: naive(x, y, 0.1), *low, upstream)
    for e, f, t in zip(exact, found, theirs, strict=True):
        assert (f.double() - e).abs().max() <= (t.double() - e).abs().max() + 1e-5


def test_gradients_in_float64():
    a, b = features(9)
    upstream = torch.randn(18, dtype=torch.float64)
    found = gradients(lambda x, y: nt_xent(x, y, 0.1), a, b, upstream)
    expected = gradients(lambda x, y: naive(x, y, 0.1), a, b, upstream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_confident_rows_keep_their_gradient():
    """Opposite images at a low temperature: 1 - softmax is 0 in float32."""
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    b = F.normalize(torch.tensor([[1.0, 0.2], [-1.0, 0.2]]), dim=1)
    upstream = torch.ones(4)
    found = gradients(lambda x, y: nt_xent(x, y, 0.05), a, b, upstream)
    expected = gradients(lambda x, y: nt_xent(x, y, 0.05), a.double(), b.double(), upstream)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=0)
    assert nt_xent(a, b, 0.05).min() > 0


def test_autocast_leaves_scores_alone():
    a, b = (view.float() for view in features(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nt_xent(a, b, 0.1)
    assert torch.equal(found, nt_xent(a, b, 0.1))


def on_a_rank(world, a: torch.Tensor, b: torch.Tensor):
    """Losses of this rank's half, and the gradient of their mean."""
    half = slice(world.rank * len(a) // 2, (world.rank + 1) * len(a) // 2)
    a, b = a[half].clone().requires_grad_(), b[half].clone().requires_grad_()
    losses = nt_xent(a, b, 0.1, group=world.group)
    losses.mean().backward()
    return losses.detach(), a.grad, b.grad


def test_two_ranks_equal_one():
    """The mean over the ranks of what they send back is the gradient of the mean over all."""
    a, b = features(10)
    (first, first_a, first_b), (second, second_a, second_b) = run_ranks(2, on_a_rank, a, b)
    whole_a, whole_b = a.clone().requires_grad_(), b.clone().requires_grad_()
    losses = nt_xent(whole_a, whole_b, 0.1)
    losses.mean().backward()
    torch.testing.assert_close(torch.cat([first[:5], second[:5], first[5:], second[5:]]), losses.detach())
    torch.testing.assert_close(torch.cat([first_a, second_a]) / 2, whole_a.grad)
    torch.testing.assert_close(torch.cat([first_b, second_b]) / 2, whole_b.grad)


def test_one_image_on_each_of_two_ranks_is_enough():
    a, b = features(2)
    found = run_ranks(2, on_a_rank, a, b)
    torch.testing.assert_close(torch.stack([losses for losses, _, _ in found], dim=1).flatten(), nt_xent(a, b, 0.1))


@pytest.mark.parametrize(
    ("a", "b", "temperature", "message"),
    [
        (torch.ones(3), torch.ones(3), 0.1, r"a must be \[N, d\]"),
        (torch.ones(3, 2).long(), torch.ones(3, 2), 0.1, r"a must be \[N, d\] floating point.*int64"),
        (torch.ones(3, 2), torch.ones(0, 2), 0.1, "b must be .* N >= 1"),
        (torch.ones(3, 2), torch.ones(4, 2), 0.1, r"must be alike, got \[3, 2\].*\[4, 2\]"),
        (torch.ones(3, 2), torch.ones(3, 2).half(), 0.1, "must be alike.*float32.*float16"),
        (torch.ones(3, 2), torch.ones(3, 2), 0.0, "temperature must be positive and finite, got 0.0"),
        (torch.ones(3, 2), torch.ones(3, 2), math.nan, "temperature must be positive and finite, got nan"),
        (torch.ones(1, 2), torch.ones(1, 2), 0.1, "a single image has nothing"),
    ],
)
def test_bad_input_is_refused(a, b, temperature, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(a, b, temperature)

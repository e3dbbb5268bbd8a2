"""Sinkhorn against the same in exact arithmetic (float64, and logarithms), its marginals, scales, and two ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

from pcl_fast.losses import sinkhorn


def scores_of(n: int, k: int, *, scale: float = 1.0) -> torch.Tensor:
    """Cosines of correlated embeddings and prototypes, float64; a fresh seed."""
    middle = torch.randn(8, dtype=torch.float64)
    embeddings, prototypes = (middle + 0.7 * torch.randn(rows, 8, dtype=torch.float64) for rows in (n, k))
    return scale * F.normalize(embeddings, dim=1) @ F.normalize(prototypes, dim=1).T


def straightforward(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """The paper's: columns, which are prototypes, to 1/K, then rows to 1/N."""
    q = (scores / epsilon).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q / q.sum(1, keepdim=True)


def in_logarithms(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    q = scores.double() / epsilon
    for _ in range(iterations):
        q = q - q.logsumexp(0, keepdim=True)
        q = q - q.logsumexp(1, keepdim=True)
    return q.exp()


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize(("n", "k"), [(1, 5), (2, 2), (33, 7), (20, 60)])
def test_equals_the_straightforward_one(n, k, iterations):
    scores = scores_of(n, k)
    expected = straightforward(scores, 0.05, iterations)
    torch.testing.assert_close(sinkhorn(scores, epsilon=0.05, iterations=iterations), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_float32_is_as_near_as_the_straightforward_one(iterations):
    scores = scores_of(100, 30)
    exact = straightforward(scores, 0.05, iterations)
    ours = sinkhorn(scores.float(), epsilon=0.05, iterations=iterations)
    theirs = straightforward(scores.float(), 0.05, iterations)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6


def test_half_precision_is_computed_in_float32_under_autocast_too():
    scores = scores_of(10, 4).bfloat16()
    expected = sinkhorn(scores.float(), epsilon=0.05, iterations=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn(scores, epsilon=0.05, iterations=3)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_rows_and_columns_have_their_marginals():
    """Rows at once; columns nearer with every iteration, and in the end."""
    scores, before = scores_of(64, 16), torch.inf
    for iterations in (1, 3, 30, 400):
        codes = sinkhorn(scores.float(), epsilon=0.05, iterations=iterations)
        torch.testing.assert_close(codes.sum(1), torch.ones(64), rtol=0, atol=1e-5)
        farthest = (codes.sum(0) / 4 - 1).abs().max()
        assert farthest <= before + 1e-5
        before = farthest
    assert before < 1e-4


@pytest.mark.parametrize("epsilon", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_nothing_overflows_and_nothing_vanishes(epsilon, scale):
    """Where the straightforward one has inf and NaN: prototypes that no image is near to, images that are far from all
    prototypes, and any number of iterations.
    """
    scores = scores_of(40, 12, scale=scale)
    scores[:, 3] -= scale
    scores[5] -= scale
    for iterations in (3, 60):
        codes = sinkhorn(scores.float(), epsilon=epsilon, iterations=iterations)
        assert codes.isfinite().all()
        torch.testing.assert_close(codes.sum(1), torch.ones(40), rtol=0, atol=1e-5)
        assert (codes.sum(0) > 1e-4).all()
        # What float32 rounds of scores as large as these decides between prototypes: in float64 it does not.
        exact = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
        torch.testing.assert_close(exact, in_logarithms(scores, epsilon, iterations), rtol=0, atol=1e-5)


def test_the_scores_stay_as_they_are_and_get_no_gradient():
    scores = scores_of(6, 3).float().requires_grad_()
    before = scores.detach().clone()
    assert not sinkhorn(scores, epsilon=0.05, iterations=3).requires_grad
    assert torch.equal(scores, before)


def of_rank(world, scores: torch.Tensor, cut: int, iterations: int) -> torch.Tensor:
    mine = scores[:cut] if world.rank == 0 else scores[cut:]
    return sinkhorn(mine, epsilon=0.05, iterations=iterations, group=world.group)


@pytest.mark.parametrize(("cut", "iterations"), [(8, 3), (5, 1), (15, 6)])
def test_two_ranks_make_the_codes_of_one(cut, iterations):
    """With as many images each, and with others."""
    scores = scores_of(16, 10)
    found = torch.cat(run_ranks(2, of_rank, scores, cut, iterations))
    torch.testing.assert_close(found, sinkhorn(scores, epsilon=0.05, iterations=iterations), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("scores", "epsilon", "iterations", "message"),
    [
        (torch.zeros(3), 0.05, 3, r"scores must be \[N, K\] .* got \[3\]"),
        (torch.zeros(3, 2, dtype=torch.int64), 0.05, 3, r"got \[3, 2\] torch\.int64"),
        (torch.zeros(0, 2), 0.05, 3, "not empty"),
        (torch.zeros(3, 2), 0.0, 3, r"epsilon must be positive and finite, got 0\.0"),
        (torch.zeros(3, 2), float("nan"), 3, "epsilon must be positive and finite, got nan"),
        (torch.zeros(3, 2), 0.05, 0, "iterations must be 1 or more, got 0"),
    ],
)
def test_bad_input_is_refused(scores, epsilon, iterations, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(scores, epsilon=epsilon, iterations=iterations)

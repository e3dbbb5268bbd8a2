"""PCA-whitening, on one rank and on two."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from pcl_fast.clustering import pca_whitening
from pcl_fast.clustering import whitening as module


def features(n: int, d: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Correlated, far from 0, with variances from 1 to 1/400 in directions of their own; float64."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(1, 0.05, d) @ turn.T + 3


def covariance(rows: torch.Tensor) -> torch.Tensor:
    centred = rows.double() - rows.double().mean(0)
    return centred.T @ centred / len(rows)


@pytest.mark.parametrize("dim", [1, 5, 12])
def test_the_covariance_becomes_the_identity(dim, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 12 * 70)  # in several chunks, the last one short
    rows = features(500)
    found = pca_whitening(rows, dim).apply(rows)
    torch.testing.assert_close(covariance(found), torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.mean(0), torch.zeros(dim, dtype=torch.float64), rtol=0, atol=1e-10)
    single = pca_whitening(rows.float(), dim).apply(rows.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-3, atol=1e-3)


def test_directions_are_scikit_learn_s_with_fixed_signs():
    from sklearn.decomposition import PCA

    rows = features(300)
    found = pca_whitening(rows, 6)
    expected = PCA(6, whiten=True, svd_solver="full").fit_transform(rows.numpy()) * (300 / 299) ** 0.5
    torch.testing.assert_close(found.apply(rows).abs(), torch.from_numpy(expected).abs(), rtol=1e-8, atol=1e-8)
    largest = found.projection.gather(0, found.projection.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_unit_rows_have_length_one_in_half_precision_too():
    rows = features(200)
    found = pca_whitening(rows.half(), 5).apply(rows.half(), unit=True)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double().norm(dim=1), torch.ones(200, dtype=torch.float64), rtol=2e-3, atol=0)
    expected = torch.nn.functional.normalize(pca_whitening(rows, 5).apply(rows), dim=1)
    assert ((found.double() - expected).norm(dim=1) < 0.05).all()


def of_a_shard(world, rows: torch.Tensor, ends: list[int], dim: int) -> tuple[torch.Tensor, ...]:
    shard = rows[ends[world.rank] : ends[world.rank + 1]]
    found = pca_whitening(shard, dim, group=world.group)
    return found.mean, found.projection, found.apply(shard)


@pytest.mark.parametrize("cut", [130, 0])
def test_two_ranks_equal_one(cut):
    """Shards of other lengths, or an empty one; and both ranks have the same bits."""
    rows = features(300, seed=1)
    one, other = run_ranks(2, of_a_shard, rows, [0, cut, 300], 6)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    expected = pca_whitening(rows, 6)
    torch.testing.assert_close(one[1], expected.projection, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([one[2], other[2]]), expected.apply(rows), rtol=1e-8, atol=1e-8)


def test_directions_that_are_not_filled_stay_quiet():
    """Four directions of rank, in float32: what rounding leaves in the others is not blown up."""
    rows = (features(200, 4) @ torch.randn(4, 20, dtype=torch.float64)).float()
    found = pca_whitening(rows, 10).apply(rows)
    torch.testing.assert_close(covariance(found[:, :4]), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-3)
    assert found[:, 4:].abs().max() < 0.05


def test_features_that_are_all_the_same_become_zeros():
    assert not pca_whitening(torch.ones(8, 4), 3).apply(torch.ones(8, 4), unit=True).any()


@pytest.mark.parametrize(
    ("rows", "dim", "message"),
    [
        (torch.ones(5), 1, r"must be \[n, d\]"),
        (torch.ones(5, 3).long(), 1, "floating point"),
        (torch.ones(5, 3), 4, "cannot whiten 5 features of length 3 to 4 dimensions; use 1 to 3"),
        (torch.ones(2, 3), 3, "cannot whiten 2 features of length 3 to 3 dimensions; use 1 to 2"),
        (torch.ones(5, 3), 0, "to 0 dimensions"),
        (torch.tensor([[1.0, torch.nan], [1.0, 2.0]]), 1, "some are not finite"),
    ],
)
def test_bad_input_is_refused(rows, dim, message):
    with pytest.raises(ValueError, match=message):
        pca_whitening(rows, dim)

"""Sums over clusters against float64. Without a GPU the kernel runs in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from pcl_fast.kernels import segment_plain
from pcl_fast.kernels.segment import rows_at_once, segment_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(n: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values whose mean is not 0, and clusters of very different sizes, of which every fifth is empty."""
    generator = torch.Generator().manual_seed(n + d + k)
    assignment = (k * torch.rand(n, generator=generator) ** 2).int()
    assignment[assignment % 5 == 4] -= 1
    return (0.3 + torch.randn(n, d, generator=generator)).to(DEVICE, dtype), assignment.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n", "d", "k"), [(1, 5, 1), (500, 16, 1), (500, 1, 7), (700, 20, 40), (300, 128, 30), (90, 129, 6), (40, 300, 11)]
)
def test_sums_and_counts(n, d, k, dtype):
    values, assignment = case(n, d, k, dtype)
    exact = torch.zeros(k, d, dtype=torch.float64, device=DEVICE).index_add_(0, assignment, values.double())
    size = torch.zeros(k, d, dtype=torch.float64, device=DEVICE).index_add_(0, assignment, values.double().abs())
    for add in (segment_sums, segment_plain.segment_sums):
        sums, counts = add(values, assignment, k)
        assert sums.dtype == torch.float32
        assert ((sums - exact).abs() <= 1e-6 * size).all()
        assert torch.equal(counts, torch.bincount(assignment, minlength=k))


@pytest.mark.parametrize("add", [segment_sums, segment_plain.segment_sums])
def test_sums_are_written_where_one_wants_them(add):
    values, assignment = case(200, 16, 9)
    everything = torch.full((9 * 16 + 3,), torch.nan, device=DEVICE)
    sums, _ = add(values, assignment, 9, everything[1 : 1 + 9 * 16].view(9, 16))
    assert sums.data_ptr() == everything[1:].data_ptr()
    assert everything.isnan().tolist() == [True] + 144 * [False] + 2 * [True]
    # PyTorch's own adds up in any order on a GPU.
    tolerance = 1e-5 if add is segment_plain.segment_sums and DEVICE == "cuda" else 0.0
    torch.testing.assert_close(sums, add(values, assignment, 9)[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("add", [segment_sums, segment_plain.segment_sums])
def test_no_rows(add):
    sums, counts = add(torch.ones(0, 4, device=DEVICE), torch.zeros(0, dtype=torch.int32, device=DEVICE), 3)
    assert not sums.any()
    assert counts.tolist() == [0, 0, 0]


def test_a_cluster_is_added_up_in_the_order_of_its_points():
    """The sum of a cluster does not depend on the points of other clusters between its own."""
    values, _ = case(150, 8, 2)
    alone, _ = segment_sums(values, torch.zeros(150, dtype=torch.int32, device=DEVICE), 10)
    spread = torch.ones(600, dtype=torch.int32, device=DEVICE)
    places = torch.arange(0, 600, 4, device=DEVICE)
    spread[places] = 0
    among = torch.randn(600, 8, device=DEVICE)
    among[places] = values
    assert rows_at_once(600, 40) == rows_at_once(150, 10)
    assert torch.equal(segment_sums(among, spread, 40)[0][0], alone[0])


def test_rows_at_once():
    assert [rows_at_once(n, k) for n, k in ((10, 10), (1281167, 100000), (1281167, 25000), (1281167, 10))] == [
        16, 16, 16, 64,
    ]  # fmt: skip

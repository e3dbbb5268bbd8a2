"""The draw of negatives in the kernels, against its plain version, and what both promise."""

from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from pcl_fast.kernels import contrast as kernels
from pcl_fast.kernels import sampling, sampling_plain

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEEDS = [0, 1, -1, 2**31, 2**31 - 1, 2**32 + 2**31, -(2**63), 2**63 - 1, 1234567890123456789]


@triton.jit(do_not_specialize=["low", "high", "height", "width", "count"])
def both_ways(ids, positions, height, width, low, high, count, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.arange(0, BLOCK)
    seed = sampling.join(low, high)
    drawn = sampling.permute(place, height, width, seed)
    tl.store(ids + place, drawn, mask=place < count)
    tl.store(positions + place, sampling.unpermute(drawn, height, width, seed), mask=place < count)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (25, 40), (2, 500), (31, 33)])
def test_the_kernels_permutation_is_the_plain_one(seed, height, width):
    count = height * width
    ids, positions = torch.full((2, count), -1, dtype=torch.int32, device=DEVICE)
    both_ways[(1,)](ids, positions, height, width, *sampling.halves(seed), count, BLOCK=1024)
    place = torch.arange(count, device=DEVICE)
    expected = sampling_plain.permute(place, height, width, seed)
    assert torch.equal(ids.long(), expected)
    assert torch.equal(positions.long(), place)
    assert torch.equal(sampling_plain.unpermute(expected, height, width, seed), place)
    assert torch.equal(expected.sort().values, place)


@pytest.mark.parametrize("size", [*range(1, 300, 7), 1009, 25_000, 50_000, 99_991, 100_000, 1_234_567])
def test_grids_are_hardly_larger_than_the_prototypes(size):
    height, width = sampling_plain.grid(size, size - 1 if size > 1 else 1)
    assert size <= height * width <= max(256, size + size**0.5)
    assert sampling_plain.grid(size, None) == sampling_plain.grid(size, size) == (1, size)


def listed_columns(size: int, negatives: int | None, positives: torch.Tensor, seed: int | torch.Tensor):
    """Return the ids that the kernel lists for rows with these positives, and which of them have a weight."""
    n = len(positives)
    index = torch.arange(n, device=DEVICE)
    concentration = torch.linspace(1, 2, size, device=DEVICE)
    bank = kernels._set(torch.empty(size, 16, device=DEVICE), concentration, positives.int(), n, negatives)
    (launch,) = kernels._plan(torch.empty(n, 16, device=DEVICE), [bank])
    on_device = seed if isinstance(seed, torch.Tensor) else None
    ids, weights, stride = kernels._draw(launch, index, 0, 0 if on_device is not None else seed, on_device)
    assert ids.shape == weights.shape == (1, stride)
    shown = weights[0] != 0
    torch.testing.assert_close(weights[0][shown], 1 / concentration[ids[0][shown].long()])
    return ids[0].long(), shown


CASES = [
    # prototypes, negatives, rows, positives drawn from so many
    (300, 40, 20, 300),
    (1000, 990, 30, 1000),  # about as many as are free
    (1000, 960, 50, 1000),
    (259, 200, 64, 10),  # many twins (rows that share a prototype); holes
    (7, 3, 4, 7),  # nearly all of the grid is holes
    (40, 39, 60, 40),  # more rows than prototypes, so that few or none are free
    (500, None, 33, 400),
    (500, 500, 33, 400),
    (2500, 1300, 5, 2500),  # several blocks
    (1, None, 3, 1),
    (2, 1, 1, 2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 7, 2**62])
def test_every_row_sees_just_its_negatives(case, seed):
    """A row sees the sampled prototypes once, the other rows' positives once per row, and never its own."""
    size, negatives, rows, among = case
    generator = torch.Generator().manual_seed(seed)
    positives = torch.randint(0, among, (rows,), generator=generator).to(DEVICE)
    ids, shown = listed_columns(size, negatives, positives, seed)
    drawn, there = sampling_plain.negative_columns(size, negatives, positives, seed)
    drawn = drawn if there is None else drawn[there]
    assert len(drawn) == min(negatives or size, size - len(positives.unique()))
    for own in positives.unique().tolist():
        seen = Counter(ids[shown & (ids != own)].tolist())
        assert seen == Counter(drawn.tolist()) + Counter(positives[positives != own].tolist())


def test_a_seed_on_the_device_is_the_same_seed():
    positives = torch.tensor([3, 50, 3], device=DEVICE)
    for seed in SEEDS:
        given = listed_columns(100, 20, positives, seed)
        read = listed_columns(100, 20, positives, torch.tensor(seed, device=DEVICE))
        assert all(torch.equal(one, other) for one, other in zip(given, read, strict=True))
    assert not torch.equal(listed_columns(100, 20, positives, 1)[0], listed_columns(100, 20, positives, 2)[0])


def test_draws_are_uniform_in_marginals_pairs_and_order():
    """Ids, pairs of ids and the first id are within 5 standard deviations of chi-squared over 40,000 seeds.

    A cyclic window over a fixed order, in which neighbours are always drawn together, is tried too, and must fail.
    """
    size, negatives, seeds = 20, 6, torch.arange(40_000)
    excluded = (4, 11)
    free = torch.tensor([c for c in range(size) if c not in excluded])

    def deviations(height: int, width: int) -> list[float]:
        places = torch.arange(height * width)
        order = sampling_plain.permute(places, height, width, seeds[:, None])
        allowed = (order < size) & ~torch.isin(order, torch.tensor(excluded))
        rank = allowed.cumsum(1) - 1
        chosen = torch.zeros(len(seeds), height * width, dtype=torch.bool)
        chosen.scatter_(1, order, allowed & (rank < negatives))
        chosen = chosen[:, free].float()
        pairs = (chosen.T @ chosen)[tuple(torch.triu_indices(len(free), len(free), 1))]
        first = order[allowed & (rank == 0)].bincount(minlength=size)[free]
        n = len(free)
        tests = [
            (chosen.sum(0), negatives / n),
            (pairs, negatives * (negatives - 1) / (n * (n - 1))),
            (first, 1 / n),
        ]
        return [chi_squared(counts, chance) for counts, chance in tests]

    def chi_squared(counts: torch.Tensor, chance: float) -> float:
        """Return how many standard deviations chi-squared is from its mean."""
        expected = len(seeds) * chance
        value = ((counts - expected) ** 2 / (expected * (1 - chance))).sum().item()
        return abs(value - len(counts)) / (2 * len(counts)) ** 0.5

    assert max(deviations(*sampling_plain.grid(size, negatives))) < 5
    assert deviations(1, size)[1] > 1000

"""NCE against the paper's formulas, row by row in float64, and its constant Z on two ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

from pcl_fast.losses import estimate_log_partition, nce

IMAGES = 300


def bank(rows: int, noise: int, d: int = 16, *, spread: float = 1.0, seed: int | None = None):
    """(query, own, noise) in float64: a row is near its own, and for a small spread near all others too."""
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    middle = torch.randn(d, generator=generator, dtype=torch.float64)
    query = middle + spread * torch.randn(rows, d, generator=generator, dtype=torch.float64)
    own = query + 0.5 * spread * torch.randn(rows, d, generator=generator, dtype=torch.float64)
    others = middle + spread * torch.randn(noise, d, generator=generator, dtype=torch.float64)
    return tuple(F.normalize(part, dim=1) for part in (query, own, others))


def rows(query, own, noise, temperature: float, partition: float) -> list[float]:
    """Equations 4, 6 and 7 of the paper in Python, with h and 1 - h as they stand."""

    def probability(v, f) -> float:
        return math.exp(math.fsum(x * y for x, y in zip(v, f, strict=True)) / temperature) / partition

    query, own, noise = (part.double().tolist() for part in (query, own, noise))
    uniform = len(noise) / IMAGES
    losses = []
    for v, f in zip(query, own, strict=True):
        loss = -math.log(probability(v, f) / (probability(v, f) + uniform))
        for other in noise:
            loss -= math.log(uniform / (probability(v, other) + uniform))
        losses.append(loss)
    return losses


def naive(query, own, noise, temperature: float, partition: float) -> torch.Tensor:
    """The same in PyTorch, in the query's type, by probabilities."""
    p_own = ((query * own).sum(1) / temperature).exp() / partition
    p_noise = (query @ noise.T / temperature).exp() / partition
    uniform = len(noise) / IMAGES
    return -(p_own / (p_own + uniform)).log() - (uniform / (p_noise + uniform)).log().sum(1)


def ours(query, own, noise, temperature: float, partition: float) -> torch.Tensor:
    return nce(query, own, noise, temperature, images=IMAGES, log_partition=math.log(partition))


def gradient(loss, query, *others, upstream: torch.Tensor) -> torch.Tensor:
    query = query.clone().requires_grad_()
    return torch.autograd.grad(loss(query, *others), query, upstream.to(query.dtype))[0]


@pytest.mark.parametrize("spread", [1.0, 0.05])
@pytest.mark.parametrize(("n", "k", "temperature"), [(1, 1, 0.5), (7, 33, 0.07), (16, 300, 0.1)])
def test_equals_the_paper_s_formula(n, k, temperature, spread):
    given, partition = bank(n, k, spread=spread), 40.0 * IMAGES
    expected = rows(*given, temperature, partition)
    assert ours(*given, temperature, partition).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-11)
    upstream = torch.randn(n, dtype=torch.float64)
    found, theirs = (gradient(loss, *given, temperature, partition, upstream=upstream) for loss in (ours, naive))
    torch.testing.assert_close(found, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_is_as_exact_as_pytorch_in_the_same_type(dtype, spread):
    low, partition = tuple(part.to(dtype) for part in bank(24, 200, spread=spread)), 40.0 * IMAGES
    exact_input, upstream = tuple(part.double() for part in low), torch.randn(24, dtype=torch.float64)
    exact, plain, found = naive(*exact_input, 0.1, partition), naive(*low, 0.1, partition), ours(*low, 0.1, partition)
    assert found.dtype == torch.float32
    error = (plain.double() - exact).abs().nan_to_num(math.inf).max()
    assert (found - exact).abs().max() <= error + 1e-6 * exact.abs().max()  # a sum of 201 in float32
    exact, plain, found = (
        gradient(loss, *given, 0.1, partition, upstream=upstream)
        for loss, given in ((naive, exact_input), (naive, low), (ours, low))
    )
    error = (plain.double() - exact).abs().nan_to_num(math.inf).max()
    # float32's own, and for a half query the rounding of its gradient.
    tolerance = max(1e-5, torch.finfo(dtype).eps)
    assert (found.double() - exact).abs().max() <= error + tolerance * exact.abs().max()


def test_half_precision_banks_leave_the_sums_in_float32():
    """As on a GPU: a float32 query, a float16 bank, and under autocast; 4,096 small summands."""
    query, own, noise = bank(8, 4096)
    query, own, noise = query.float(), own.half(), noise.half()
    exact = ours(query.double(), own.double(), noise.double(), 0.07, 1e9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(query, own, noise, 0.07, 1e9)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_confident_rows_keep_their_gradient():
    """So sure of their image that 1 - h is 0 in float32; and of noise that is far away."""
    query, own, noise = (torch.tensor(part) for part in ([[0.8, 0.6]], [[1.0, 0.0]], [[-1.0, 0.0], [0.0, -1.0]]))
    for temperature, partition in ((0.03, 1.0), (0.03, 1e-3)):
        found = gradient(ours, query, own, noise, temperature, partition, upstream=torch.ones(1))
        exact = tuple(part.double() for part in (query, own, noise))
        expected = gradient(ours, *exact, temperature, partition, upstream=torch.ones(1))
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=0)
        scores = exact[1] @ exact[0].T / temperature, exact[2] @ exact[0].T / temperature
        constant = math.log(len(noise) / IMAGES * partition)
        slow = -torch.sigmoid(constant - scores[0]) * exact[1] + (torch.sigmoid(scores[1] - constant) * exact[2]).sum(0)
        torch.testing.assert_close(expected, slow / temperature)
        loss, exact_loss = (ours(*given, temperature, partition) for given in ((query, own, noise), exact))
        assert loss.item() > 0
        torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-5, atol=0)


def test_no_exponential_is_computed_as_it_stands():
    """exp(200) is beyond float32."""
    query, own, noise = (torch.tensor(part) for part in ([[1.0, 0.0]], [[-1.0, 0.0]], [[1.0, 0.0]]))
    found = ours(query, own, noise, 0.005, 1.0)
    torch.testing.assert_close(found, torch.tensor([400.0]))
    assert gradient(ours, query, own, noise, 0.005, 1.0, upstream=torch.ones(1)).tolist() == [[400.0, 0.0]]


def test_only_the_query_has_a_gradient():
    query, own, noise = (part.requires_grad_() for part in bank(3, 5))
    ours(query, own, noise, 0.1, 50.0).sum().backward()
    assert query.grad.abs().sum() > 0
    assert own.grad is None
    assert noise.grad is None


def test_z_is_n_times_the_mean_exponential():
    query, _, noise = bank(9, 40)
    expected = IMAGES * (query @ noise.T / 0.1).exp().mean()
    found = estimate_log_partition(query, noise, 0.1, images=IMAGES)
    torch.testing.assert_close(found.exp(), expected)
    low = estimate_log_partition(query.float(), noise.half(), 0.1, images=IMAGES)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), found, rtol=1e-3, atol=0)
    # Scores of 1000: no exponential is computed as it stands.
    ones = torch.ones(2, 1)
    assert estimate_log_partition(ones, ones, 1e-3, images=1).item() == pytest.approx(1000)


def estimate(world, query: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return estimate_log_partition(query[world.rank], noise[world.rank], 0.1, images=IMAGES, group=world.group)


def test_z_is_of_all_ranks_rows_and_noise():
    query, _, _ = bank(10, 1)
    noise = bank(1, 14, seed=1)[2]
    query, noise = query.view(2, 5, 16), noise.view(2, 7, 16)
    one, other = run_ranks(2, estimate, query, noise)
    assert torch.equal(one, other)
    means = [(query[rank] @ noise[rank].T / 0.1).exp().mean() for rank in range(2)]
    torch.testing.assert_close(one.exp(), IMAGES * torch.stack(means).mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(3)}, "query must be rows of d floating-point numbers, got"),
        ({"noise": torch.ones(0, 4)}, "noise must be rows of d floating-point"),
        ({"noise": torch.ones(2, 4).long()}, r"noise must be rows .* \[2, 4\] torch.int64"),
        ({"noise": torch.ones(2, 5)}, r"noise must be \[K, 4\] on cpu to go with query \[3, 4\], got \[2, 5\]"),
        ({"own": torch.ones(2, 4)}, r"own must be \[3, 4\] floating point on cpu .* got \[2, 4\]"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"images": 0}, "images is how many there are in the bank, 1 or more, got 0"),
    ],
)
def test_bad_input_is_refused(changes, message):
    given = {"query": torch.ones(3, 4), "own": torch.ones(3, 4), "noise": torch.ones(2, 4), "temperature": 0.1}
    with pytest.raises(ValueError, match=message):
        nce(**given | {"images": 5, "log_partition": 1.0} | changes)

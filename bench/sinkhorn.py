"""SwAV's codes by Sinkhorn's algorithm, beside the straightforward way. Run by `make bench`.

Cases are a batch of 4096 images, and what one of four GPUs has in a step of the preset: 64 images and a quarter of the
queue; 3000 prototypes, epsilon 0.05, three iterations, scores in float32. The providers are:

- straightforward: the exponentials, prototypes by images as in the official code, and in every iteration a sum and a
  division of all rows, then of all columns, in place. Written from a description of it, without the exchange.
- ours: pcl_fast.losses.sinkhorn.

Before a provider is timed, both must make the same codes.
"""

from __future__ import annotations

from collections.abc import Callable

import device
import pytest
import torch
import torch.nn.functional as F

from pcl_fast.losses import sinkhorn

D, PROTOTYPES, EPSILON, ITERATIONS = 128, 3000, 0.05, 3
ROWS = (4096, 3840 // 4 + 64)
SIZES = {"d": D, "K": PROTOTYPES, "epsilon": EPSILON, "iterations": ITERATIONS}
DEVICE = "cuda" if device.CUDA else "cpu"
ROUNDS = 100 if device.CUDA else 20

pytestmark = pytest.mark.benchmark(timer=device.clock)


def scores_of(rows: int) -> torch.Tensor:
    """Return cosines as of a trained encoder: of embeddings near to a prototype each."""
    generator = torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(PROTOTYPES, D, generator=generator), dim=1)
    near = prototypes[torch.randint(PROTOTYPES, (rows,), generator=generator)]
    embeddings = F.normalize(near + torch.randn(rows, D, generator=generator) / D**0.5, dim=1)
    return (embeddings @ prototypes.T).to(DEVICE)


def straightforward(scores: torch.Tensor) -> torch.Tensor:
    q = torch.exp(scores / EPSILON).t()
    q /= q.sum()
    for _ in range(ITERATIONS):
        q /= q.sum(1, keepdim=True) * q.shape[0]
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).t()


def ours(scores: torch.Tensor) -> torch.Tensor:
    return sinkhorn(scores, epsilon=EPSILON, iterations=ITERATIONS)


PROVIDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"straightforward": straightforward, "ours": ours}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("rows", ROWS)
def test_sinkhorn(benchmark, rows, provider):
    scores = scores_of(rows)
    run = PROVIDERS[provider]
    found, memory = device.peak_bytes(lambda: run(scores))
    torch.testing.assert_close(found, straightforward(scores.double()).float(), rtol=1e-3, atol=1e-6)
    benchmark.group = f"{rows} x {PROTOTYPES}"
    case = {"N": rows, "floor_bytes": 2 * scores.nbytes}
    benchmark.extra_info.update(provider=provider, sizes=SIZES, case=case, peak_extra_bytes=memory)
    benchmark.pedantic(
        run, args=(scores,), setup=device.flush_cache, warmup_rounds=device.WARM_UP, rounds=ROUNDS, iterations=1
    )

"""The loss of one step, forward and gradient: ours against the official way. Run by `make bench`.

N = 64 rows, d = 128, r = 16384 negatives and as many queue keys, prototypes 25k, 50k and 100k: the paper's step on
one of four GPUs.
"""

from __future__ import annotations

import official
import pytest
import torch
import torch.nn.functional as F

from pcl_fast.clustering import PrototypeSet
from pcl_fast.losses import protonce, sample_negatives

N, D, R, IMAGES, KS = 64, 128, 16384, 1_281_167, (25_000, 50_000, 100_000)


@pytest.fixture(scope="module")
def case() -> dict:
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, D, generator=generator), dim=1)

    prototypes = [
        PrototypeSet(
            unit(k),
            0.1 + 0.2 * torch.rand(k, generator=generator),
            torch.randint(0, k, (IMAGES,), generator=generator, dtype=torch.int32),
        )
        for k in KS
    ]
    index = torch.randint(0, IMAGES, (N,), generator=generator)
    return {"query": unit(N), "key": unit(N), "queue": unit(R), "prototypes": prototypes, "index": index}


def official_step(case: dict) -> torch.Tensor:
    query = case["query"].clone().requires_grad_()
    inputs = {**case, "query": query}
    official.loss(**inputs, temperature=0.2, num_negatives=R).backward()
    return query.grad


def torch_step(case: dict) -> torch.Tensor:
    query = case["query"].clone().requires_grad_()
    inputs = {**case, "query": query}
    protonce(**inputs, temperature=0.2, num_negatives=R, seed=1, backend="torch").loss.backward()
    return query.grad


def official_sampling(case: dict) -> None:
    for granularity in case["prototypes"]:
        official.choose_negatives(len(granularity.centroids), R, granularity.assignment[case["index"]])


def torch_sampling(case: dict) -> None:
    for granularity in case["prototypes"]:
        sample_negatives(len(granularity.centroids), R, granularity.assignment[case["index"]].long(), seed=1)


PROVIDERS = {
    "forward and gradient": {"official": official_step, "torch": torch_step},
    "sampling alone": {"official": official_sampling, "torch": torch_sampling},
}


@pytest.mark.parametrize(
    ("group", "provider"), [(group, provider) for group, providers in PROVIDERS.items() for provider in providers]
)
def test_loss(benchmark, case, group, provider):
    benchmark.group = group
    benchmark.extra_info["provider"] = provider
    benchmark.extra_info["sizes"] = {"N": N, "d": D, "r": R, "queue": R, "K": KS, "images": IMAGES}
    function = PROVIDERS[group][provider]
    benchmark.pedantic(function, args=(case,), warmup_rounds=3, rounds=30)

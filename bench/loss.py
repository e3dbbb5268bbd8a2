"""The loss of one step, forward and gradient, computed by every provider of providers.py. Run by `make bench`.

The base case is the paper's step on one of four GPUs: N = 64 rows, d = 128, r = 16384 negatives and as many queue keys,
and 25k, 50k and 100k prototypes. On a GPU it runs in three dtypes, and in half precision with other N and r too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import device
import official
import pytest
import torch
import torch.nn.functional as F
from providers import GRAPH, PROVIDERS, step

from pcl_fast.clustering import PrototypeSet
from pcl_fast.losses import sample_negatives

D, QUEUE, IMAGES, KS = 128, 16384, 1_281_167, (25_000, 50_000, 100_000)
N, R, MOST_ROWS = 64, 16384, 1024
SIZES = {"d": D, "queue": QUEUE, "K": KS, "images": IMAGES}
DEVICE = "cuda" if device.CUDA else "cpu"
AMPERE = device.CUDA and torch.cuda.get_device_capability() >= (8, 0)
ROUNDS = 100 if device.CUDA else 30

pytestmark = pytest.mark.benchmark(timer=device.clock)


class Case(NamedTuple):
    rows: int
    negatives: int | None  # None: all
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"N={self.rows}, r={self.negatives or 'all'}, {str(self.dtype).removeprefix('torch.')}"

    def describe(self) -> dict:
        """Return what the record says about the case. Its floor is to read every bank once; every score takes part in
        two products.
        """
        columns = QUEUE + sum(min(self.negatives or k, k) for k in KS)
        return {
            "N": self.rows,
            "r": self.negatives or "all",
            "dtype": str(self.dtype).removeprefix("torch."),
            "columns": columns,
            "floor_bytes": columns * D * self.dtype.itemsize,
            "flop": 4 * self.rows * D * columns,
        }


def cases() -> list[Case]:
    if not device.CUDA:
        return [Case(N, R, torch.float32)]
    half = torch.bfloat16 if AMPERE else torch.float16
    base = [Case(N, R, dtype) for dtype in dict.fromkeys([half, torch.float16, torch.float32])]
    return [
        *base,
        *[Case(rows, R, half) for rows in (128, 256, MOST_ROWS)],
        *[Case(N, negatives, half) for negatives in (4096, 65536, None)],
    ]


def providers(case: Case) -> list[str]:
    """Return the providers that can run the case. The official way is slow, so only the base case measures it."""
    if not device.CUDA:
        return ["official", "eager"]
    left_out = set()
    if case[:2] != (N, R):
        left_out.add("official")
    if not AMPERE or case.dtype == torch.float32:
        left_out.add("sdpa")
    return [name for name in PROVIDERS if name not in left_out]


@pytest.fixture(scope="module")
def data() -> dict:
    """Return the float32 inputs of the largest case, on the device."""
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, D, generator=generator), dim=1).to(DEVICE)

    prototypes = [
        PrototypeSet(
            unit(k),
            (0.1 + 0.2 * torch.rand(k, generator=generator)).to(DEVICE),
            torch.randint(0, k, (IMAGES,), generator=generator, dtype=torch.int32).to(DEVICE),
        )
        for k in KS
    ]
    index = torch.randint(0, IMAGES, (MOST_ROWS,), generator=generator).to(DEVICE)
    return {
        "query": unit(MOST_ROWS),
        "key": unit(MOST_ROWS),
        "queue": unit(QUEUE),
        "prototypes": prototypes,
        "index": index,
    }


def inputs_of(case: Case, data: dict) -> dict:
    """Return the arguments of the loss, except query and seed."""
    return {
        "key": data["key"][: case.rows].to(case.dtype),
        "queue": data["queue"].to(case.dtype),
        "prototypes": [p._replace(centroids=p.centroids.to(case.dtype)) for p in data["prototypes"]],
        "index": data["index"][: case.rows],
        "temperature": 0.2,
        "num_negatives": case.negatives,
    }


def ready(function: Callable[[], torch.Tensor], graph: bool) -> tuple[Callable[[], torch.Tensor], int | None]:
    """Return (the function to time, warmed up; the peak of the memory that it takes)."""
    if graph:
        return device.capture(function)
    for _ in range(device.WARM_UP):
        function()
    return function, device.peak_bytes(function)[1]


@pytest.mark.parametrize(("case", "provider"), [(case, name) for case in cases() for name in providers(case)], ids=str)
def test_loss(benchmark, data, case, provider):
    query, inputs = data["query"][: case.rows].to(case.dtype), inputs_of(case, data)
    seed = torch.tensor(1, device=DEVICE)
    timed, memory = ready(step(provider, query, inputs, seed), graph=provider.endswith(GRAPH))
    if provider != "official":  # whose negatives are others
        expected = step("eager", query, inputs, seed)().double()
        assert torch.linalg.norm(timed().double() - expected) < 0.01 * torch.linalg.norm(expected)
    benchmark.group = str(case)
    benchmark.extra_info.update(provider=provider, sizes=SIZES, case=case.describe(), peak_extra_bytes=memory)
    benchmark.pedantic(timed, setup=device.flush_cache, warmup_rounds=device.WARM_UP, rounds=ROUNDS)


def official_sampling(prototypes: list[PrototypeSet], index: torch.Tensor, seed: torch.Tensor) -> None:
    for granularity in prototypes:
        official.choose_negatives(len(granularity.centroids), R, granularity.assignment[index])


def eager_sampling(prototypes: list[PrototypeSet], index: torch.Tensor, seed: torch.Tensor) -> None:
    for m, granularity in enumerate(prototypes):
        positives = granularity.assignment[index].long()
        sample_negatives(len(granularity.centroids), R, positives, seed=seed + m)


SAMPLING = {"official": official_sampling, "eager": eager_sampling}


@pytest.mark.parametrize("provider", SAMPLING)
def test_sampling(benchmark, data, provider):
    benchmark.group = "sampling alone"
    benchmark.extra_info.update(provider=provider, sizes=SIZES, case={"N": N, "r": R})
    arguments = (data["prototypes"], data["index"][:N], torch.tensor(1, device=DEVICE))
    benchmark.pedantic(
        SAMPLING[provider], args=arguments, setup=device.flush_cache, warmup_rounds=device.WARM_UP, rounds=ROUNDS
    )

"""A step of linear classification with a frozen encoder: many heads against one. Run by `make bench`.

A step encodes a batch of bytes that is at hand, and takes one step of every head, with ImageNet's 1000 classes. On a
GPU it is the protocol's: ResNet-50 at 224 px, batch 256. On a CPU it is ResNet-18 at 64 px, where heads weigh more (an
image costs the encoder a twelfth of what it does at 224 px, and the heads the same), and ResNet-50 at 128 px. Nothing
is loaded. The goal is that 16 heads take less than 1.2 times as long as one.

Every round of a provider follows one of a single head, so that both see the machine in the same state. times_one_head
is the median of the rounds' ratios. (That of one head against itself says how exact this is.)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import device
import pytest
import torch

from pcl_fast.config import ModelConfig
from pcl_fast.evaluation.features import FrozenBackbone
from pcl_fast.evaluation.heads import Heads, Setting
from pcl_fast.nn.encoder import Encoder

DEVICE = torch.device("cuda", 0) if device.CUDA else torch.device("cpu")
CLASSES, GRID = 1000, 16
PROVIDERS = {"1 head": 1, f"{GRID} heads": GRID, "encoder alone": 0}
ROUNDS = 30 if device.CUDA else 7

pytestmark = pytest.mark.benchmark(timer=device.clock)


class Case(NamedTuple):
    arch: str
    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.arch}, {self.size} px, batch {self.batch}"


CASES = [Case("resnet50", 224, 256)] if device.CUDA else [Case("resnet18", 64, 256), Case("resnet50", 128, 64)]


def step_of(case: Case, heads: int) -> Callable[[], object]:
    """Return the step of so many heads, warmed up."""
    generator = torch.Generator().manual_seed(0)
    encoder = Encoder(ModelConfig(arch=case.arch)).eval()
    images = torch.randint(256, (case.batch, case.size, case.size, 3), dtype=torch.uint8, generator=generator).to(
        DEVICE
    )
    labels = torch.randint(CLASSES, (case.batch,), generator=generator).to(DEVICE)
    encode = FrozenBackbone(encoder.backbone, DEVICE)
    width = encoder.backbone(torch.zeros(1, 3, case.size, case.size)).shape[1]
    grid = Heads([Setting(0.1 * 1.5**place, 0.0) for place in range(heads)], width, CLASSES, seed=0, device=DEVICE)

    def step() -> object:
        return grid.step(encode(images), labels)

    for _ in range(device.WARM_UP):
        step()
    return step


@pytest.fixture(scope="module", autouse=True)
def fastest_convolutions():
    """Let cuDNN search for the fastest convolutions, for all providers."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize(("case", "provider"), [(case, name) for case in CASES for name in PROVIDERS], ids=str)
def test_linear(benchmark, case, provider):
    step, reference = step_of(case, PROVIDERS[provider]), step_of(case, 1)
    reference_seconds: list[float] = []

    def take_turns() -> None:
        reference_seconds.append(device.seconds(reference))

    benchmark.group = str(case)
    benchmark.extra_info.update(
        provider=provider, sizes={"classes": CLASSES}, case=case._asdict(), peak_extra_bytes=device.peak_bytes(step)[1]
    )
    benchmark.pedantic(step, setup=take_turns, rounds=ROUNDS)
    if benchmark.enabled:
        seconds = benchmark.stats.stats.data
        ratios = (own / theirs for own, theirs in zip(seconds, reference_seconds, strict=True))
        benchmark.extra_info["figures"] = {
            "images_per_s": round(case.batch / statistics.median(seconds), 1),
            "times_one_head": round(statistics.median(ratios), 3),
        }

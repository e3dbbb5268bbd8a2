"""The pass of the encoder over the images before an E-step, on images that are there already. Run by `make bench`.

On a GPU it is ResNet-50 at 224 px, 256 images at a time, in the device's precision; on a CPU, in float32, the demo's
encoder at 20 px and ResNet-18 at 64 px, 64 images at a time, and ResNet-50 at 224 px, 16 at a time, which take half a
second. The providers are:

- modules: the encoder in eval mode, module by module, as the official code does it.
- folded: with batch norm folded into the convolutions.
- fused: the same, and a convolution also adds its shortcut and takes what is positive, in the layers for which a run
  chooses that; on a CPU these are all.
- compile: `folded` by torch.compile, on a GPU only.
- frozen: the modules traced, frozen and optimised for inference by TorchScript, on a CPU only.

Before it is timed, each provider's features must be as near to those in a finer type as rounding allows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import device
import optional
import pytest
import recipe
import torch
from torch import nn

from pcl_fast.config import PRESETS, Config
from pcl_fast.nn.batch_norm import fold_batch_norm
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.feature_pass import find_difference, fused_encoder, unfit_layers
from pcl_fast.nn.precision import encoder_dtype
from pcl_fast.run.encoder_passes import draw_images
from pcl_fast.schedule import encoded_at_a_time

DEVICE = recipe.WORLD.device


class Case(NamedTuple):
    config: Config
    rows: int

    def __str__(self) -> str:
        return f"{self.config.model.arch}, {self.config.data.size} px, {self.rows} images"


def _cases() -> list[Case]:
    rows = encoded_at_a_time(DEVICE)
    usual = Case(recipe.step_recipe(rows), rows)
    return [usual] if device.CUDA else [Case(PRESETS["demo"][1], rows), usual, Case(recipe.pcl_v2(16), 16)]


pytestmark = pytest.mark.benchmark(timer=device.clock)

Pass = Callable[[torch.Tensor], torch.Tensor]


@functools.cache
def encoder(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return Encoder(case.config.model).to(DEVICE, memory_format=torch.channels_last).eval().requires_grad_(False)


@functools.cache
def images(case: Case) -> torch.Tensor:
    return draw_images(case.config, case.rows, recipe.WORLD)


def modules(case: Case) -> Pass:
    whole = encoder(case)

    def run(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE.type, encoder_dtype(DEVICE), enabled=device.CUDA):
            return whole(batch)

    return run


def folded(case: Case) -> Pass:
    return fold_batch_norm(encoder(case)).to(encoder_dtype(DEVICE))


@functools.cache
def plain(case: Case) -> tuple[str, ...]:
    return tuple(unfit_layers(encoder(case), images(case)))


def fused(case: Case) -> Pass:
    if fault := find_difference(encoder(case), images(case), plain(case)):
        pytest.skip(f"the fused encoder {fault}")
    return fused_encoder(encoder(case), plain(case)).to(encoder_dtype(DEVICE))


def compiled(case: Case) -> Pass:
    return torch.compile(folded(case), dynamic=False)


def frozen(case: Case) -> Pass:
    return torch.jit.optimize_for_inference(torch.jit.trace(encoder(case), images(case)))


PROVIDERS: dict[str, Callable[[Case], Pass]] = {"modules": modules, "folded": folded, "fused": fused}
PROVIDERS |= {"compile": compiled} if device.CUDA else {"frozen": frozen}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", _cases(), ids=str)
def test_features(benchmark, case, provider):
    with torch.inference_mode():
        encode, batch = PROVIDERS[provider](case), images(case)
        exact = modules(case)(batch)
        # Of unit features; each rounds elsewhere, and half precision has eps 2^-8.
        assert (encode(batch).float() - exact.float()).norm(dim=1).max() < (0.1 if device.CUDA else 1e-4)
        for _ in range(device.WARM_UP):
            encode(batch)
        benchmark.group = str(case)
        sizes = {"dim": case.config.model.dim}
        described = {"arch": case.config.model.arch, "size": case.config.data.size, "rows": case.rows}
        benchmark.extra_info.update(provider=provider, sizes=sizes, versions=optional.versions(), case=described)
        benchmark.pedantic(encode, args=(batch,), rounds=9)
    if benchmark.enabled:
        figures = {"images_per_s": round(case.rows / benchmark.stats.stats.median, 1)}
        if provider == "fused":
            figures["layers_left_out"] = list(plain(case))
        benchmark.extra_info["figures"] = figures

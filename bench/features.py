"""The pass of the encoder over the images before an E-step, on images that are there already. Run by `make bench`.

On a GPU it is ResNet-50 at 224 px, 256 images at a time, in the device's precision; on a CPU ResNet-18 at 64 px and
small batches, in float32. The providers are:

- modules: the encoder in eval mode, module by module, as the official code does it.
- folded: with batch norm folded into the convolutions.
- fused: the same, and a convolution also adds its shortcut and takes what is positive, in the layers for which a run
  on a GPU chooses that; on a CPU in all, which a run does not do, since the bits are others.
- compile: `folded` by torch.compile, on a GPU only.

Before it is timed, each provider's features must be as near to those in a finer type as rounding allows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import device
import optional
import pytest
import recipe
import torch
from torch import nn

from pcl_fast.nn.batch_norm import fold_batch_norm
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.feature_pass import find_difference, fused_encoder, unfit_layers
from pcl_fast.nn.precision import encoder_dtype
from pcl_fast.run.encoder_passes import draw_images
from pcl_fast.schedule import encoded_at_a_time

DEVICE = recipe.WORLD.device
ROWS = encoded_at_a_time(DEVICE)
CONFIG = recipe.step_recipe(ROWS)
SIZES = {"size": CONFIG.data.size, "dim": CONFIG.model.dim}

pytestmark = pytest.mark.benchmark(timer=device.clock)

Pass = Callable[[torch.Tensor], torch.Tensor]


@functools.cache
def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder(CONFIG.model).to(DEVICE, memory_format=torch.channels_last).eval().requires_grad_(False)


@functools.cache
def images() -> torch.Tensor:
    return draw_images(CONFIG, ROWS, recipe.WORLD)


def modules() -> Pass:
    whole = encoder()

    def run(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE.type, encoder_dtype(DEVICE), enabled=device.CUDA):
            return whole(batch)

    return run


def folded() -> Pass:
    return fold_batch_norm(encoder()).to(encoder_dtype(DEVICE))


@functools.cache
def plain() -> tuple[str, ...]:
    return tuple(unfit_layers(encoder(), images()))


def fused() -> Pass:
    if fault := find_difference(encoder(), images(), plain()):
        pytest.skip(f"the fused encoder {fault}")
    return fused_encoder(encoder(), plain()).to(encoder_dtype(DEVICE))


def compiled() -> Pass:
    return torch.compile(folded(), dynamic=False)


PROVIDERS: dict[str, Callable[[], Pass]] = {"modules": modules, "folded": folded, "fused": fused}
if device.CUDA:
    PROVIDERS["compile"] = compiled


@pytest.mark.parametrize("provider", PROVIDERS)
def test_features(benchmark, provider):
    with torch.inference_mode():
        encode, batch = PROVIDERS[provider](), images()
        exact = modules()(batch)
        # Of unit features; each rounds elsewhere, and half precision has eps 2^-8.
        assert (encode(batch).float() - exact.float()).norm(dim=1).max() < (0.1 if device.CUDA else 1e-4)
        for _ in range(device.WARM_UP):
            encode(batch)
        benchmark.group = f"{CONFIG.model.arch}, {CONFIG.data.size} px, {ROWS} images"
        case = {"arch": CONFIG.model.arch, "size": CONFIG.data.size, "rows": ROWS}
        benchmark.extra_info.update(provider=provider, sizes=SIZES, versions=optional.versions(), case=case)
        benchmark.pedantic(encode, args=(batch,), rounds=9)
    if benchmark.enabled:
        figures = {"images_per_s": round(ROWS / benchmark.stats.stats.median, 1)}
        if provider == "fused":
            figures["layers_left_out"] = list(plain())
        benchmark.extra_info["figures"] = figures

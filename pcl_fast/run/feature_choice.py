"""Which layers of the encoder are fused in the pass over the images, decided at a run's start by all ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pcl_fast.config import Config
from pcl_fast.distributed import World, gather_objects
from pcl_fast.nn.feature_pass import find_difference, fused_encoder, fused_layers, unfit_layers
from pcl_fast.run.encoder_passes import draw_images
from pcl_fast.run.fusion_choice import EAGER
from pcl_fast.schedule import encoded_at_a_time

# What a checkpoint keeps where no layer is fused.
ALL = "all"


class Choice(NamedTuple):
    """plain: names of the layers that are left as they are, sorted; None where none is fused. notes: lines for the log;
    row: for the record, None where nothing was tried. kept: for the checkpoint: as `plain`, ALL where none is fused, or
    None where nothing has been decided yet.
    """

    plain: list[str] | None
    notes: list[str]
    row: dict[str, Any] | None
    kept: list[str] | str | None


def choose_layers(
    config: Config, encoder: nn.Module, sizes: Sequence[int], world: World, *, kept: list[str] | str | None
) -> Choice:
    """Choose the layers of the feature pass. All ranks call this together, and get the same.

    A layer is fused where the fused operator works, is right and, on a GPU, is faster, on every rank and at every size;
    all are left as they are if the features of the whole differ. By --model.fusion eager nothing is fused, and on a GPU
    with --deterministic.

    On a GPU the decision is kept, as it rests on times. On a CPU, where a ResNet's layers gain, nothing is decided by
    time, and the same is found at every start.

    Args:
        encoder: whose features are wanted.
        sizes: that images have in one pass or another, in pixels; empty if there is no pass.
        kept: what the run has decided on a GPU before, see Choice.
    """
    on_gpu = _on_gpu(world.device)
    if not sizes or not may_fuse_features(config, world.device):
        return Choice(None, [], None, kept)
    if on_gpu and kept is not None:
        return Choice(None if kept == ALL else sorted(kept), [], None, kept)
    begin = time.perf_counter()
    plain, fault = _unfit(config, encoder, sizes, world)
    fused = [] if fault else fused_layers(fused_encoder(encoder, list(plain)))
    seconds = round(time.perf_counter() - begin, 1)
    why = f"no layer is fused: the encoder {fault}" if fault else f"{len(fused)} layers are fused"
    row = {"fused": fused, "plain": plain, "fault": fault, "seconds": seconds}
    left = None if fault else sorted(plain)
    if on_gpu:
        kept = ALL if left is None else left
    return Choice(left, [f"in the feature pass {why} (found out in {seconds} s)"], row, kept)


def may_fuse_features(config: Config, device: torch.device) -> bool:
    """Whether layers may be fused on a device. On a CPU they have the same bits from run to run."""
    return config.model.fusion != EAGER and not (config.deterministic and _on_gpu(device))


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _unfit(config: Config, encoder: nn.Module, sizes: Sequence[int], world: World) -> tuple[dict[str, str], str]:
    """The layers that must stay as they are, by name, with the reason; and what is wrong with the whole, or ""."""
    batches = [draw_images(config, encoded_at_a_time(world.device), world, size) for size in sizes]
    told = gather_objects([_tried(encoder, images) for images in batches], world)
    tried = [of_size for of_rank in told for of_size in of_rank]
    plain = {name: reason for unfit, _ in reversed(tried) for name, reason in unfit.items()}
    if fault := next((fault for _, fault in tried if fault), ""):
        return plain, fault
    found = gather_objects([_difference(encoder, images, list(plain)) for images in batches], world)
    return plain, next((fault for of_rank in found for fault in of_rank if fault), "")


def _tried(encoder: nn.Module, images: torch.Tensor) -> tuple[dict[str, str], str]:
    try:
        return unfit_layers(encoder, images), ""
    except Exception as error:  # libraries, and networks whose code was traced, raise whatever they like
        return {}, _in_words(error)


def _difference(encoder: nn.Module, images: torch.Tensor, plain: list[str]) -> str:
    try:
        return find_difference(encoder, images, plain) or ""
    except Exception as error:  # likewise
        return _in_words(error)


def _in_words(error: Exception) -> str:
    return f"cannot be fused ({str(error).strip().partition(chr(10))[0][:200] or type(error).__name__})"

"""Which layers of the encoder are fused in the pass over the images, decided at a run's start by all ranks."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pcl_fast.config import Config
from pcl_fast.distributed import World, gather_objects
from pcl_fast.nn.feature_pass import find_difference, fused_encoder, fused_layers, unfit_layers
from pcl_fast.run.encoder_passes import draw_images
from pcl_fast.run.fusion_choice import EAGER
from pcl_fast.schedule import encoded_at_a_time


class Choice(NamedTuple):
    """plain: names of the layers that are left as they are, sorted; None where none is fused. notes: lines for the log;
    row: for the record, None where nothing was tried.
    """

    plain: list[str] | None
    notes: list[str]
    row: dict[str, Any] | None


def choose_layers(
    config: Config,
    encoder: nn.Module,
    sizes: Sequence[int],
    world: World,
    *,
    kept: Collection[str] | None,
    new: bool,
) -> Choice:
    """Choose the layers of the feature pass. All ranks call this together, and get the same.

    A layer is fused where the fused operator works, is right and, on a GPU, is faster, on every rank and at every size;
    all are left as they are if the features of the whole differ. On a CPU, where all layers gain, nothing is decided by
    time, so that the same run has the same bits. By --model.fusion eager and with --deterministic nothing is fused.

    Args:
        encoder: whose features are wanted.
        sizes: that images have in one pass or another, in pixels; empty if there is no pass.
        kept: what the run that goes on has chosen, which stays where layers may be fused.
        new: whether there is nothing to keep.
    """
    if not may_fuse_features(config):
        return Choice(None, [], None)
    if not new:
        return Choice(None if kept is None else sorted(kept), [], None)
    if not sizes:
        return Choice(None, [], None)
    begin = time.perf_counter()
    batches = [draw_images(config, encoded_at_a_time(world.device), world, size) for size in sizes]
    told = gather_objects([_tried(encoder, images) for images in batches], world)
    tried = [of_size for of_rank in told for of_size in of_rank]
    plain = {name: reason for unfit, _ in reversed(tried) for name, reason in unfit.items()}
    fault = next((fault for _, fault in tried if fault), "")
    if not fault:
        found = gather_objects([_difference(encoder, images, list(plain)) for images in batches], world)
        fault = next((fault for of_rank in found for fault in of_rank if fault), "")
    fused = [] if fault else fused_layers(fused_encoder(encoder, list(plain)))
    seconds = round(time.perf_counter() - begin, 1)
    why = f"no layer is fused: the encoder {fault}" if fault else f"{len(fused)} layers are fused"
    row = {"fused": fused, "plain": plain, "fault": fault, "seconds": seconds}
    return Choice(None if fault else sorted(plain), [f"in the feature pass {why} (found out in {seconds} s)"], row)


def may_fuse_features(config: Config) -> bool:
    """Whether layers may be fused."""
    return config.model.fusion != EAGER and not config.deterministic


def _tried(encoder: nn.Module, images: torch.Tensor) -> tuple[dict[str, str], str]:
    try:
        return unfit_layers(encoder, images), ""
    except RuntimeError as error:
        return {}, _in_words(error)


def _difference(encoder: nn.Module, images: torch.Tensor, plain: list[str]) -> str:
    try:
        return find_difference(encoder, images, plain) or ""
    except RuntimeError as error:
        return _in_words(error)


def _in_words(error: RuntimeError) -> str:
    return f"cannot be fused ({str(error).strip().partition(chr(10))[0][:200]})"

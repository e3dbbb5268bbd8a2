"""Runs' folders with all that evaluation reads of a checkpoint, made without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from steps import small_config

from pcl_fast.config import to_dict
from pcl_fast.distributed import World
from pcl_fast.methods import build
from pcl_fast.run.checkpoint import save_checkpoint

ALONE = World(0, 1, torch.device("cpu"), None)


def save_run(
    folder: Path, images: int, *, ks: Sequence[int] = (3, 5), epochs: int = 3, expected: int = 2, fixed: bool = False
) -> Path:
    """Save a run whose weights are others after every epoch; the checkpoint of each but the last is kept.

    Args:
        images: in the data set, of which prototypes assign all.
        ks: numbers of clusters.
        expected: the first checkpoint with prototypes is that of this epoch.
        fixed: whether all prototypes have the same concentration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = small_config()
    config = replace(config, cluster=replace(config.cluster, ks=tuple(ks), fixed_concentration=fixed))
    method = build(config, ALONE, images)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(1, epochs + 1):
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        if ks and epoch >= expected:
            method.expect(F.normalize(torch.randn(images, config.model.dim, generator=generator), dim=1), epoch)
        state = {
            "config": to_dict(config),
            "method": method.state_dict(),
            "encoders": {name: encoder.state_dict() for name, encoder in method.encoders().items()},
            "epoch": epoch,
        }
        save_checkpoint(folder, state, keep_as=None if epoch == epochs else f"checkpoint-{epoch:04d}.pt")
    return folder

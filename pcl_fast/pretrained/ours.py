"""Encoders out of this project's own checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pcl_fast.clustering.prototypes import prototypes_in
from pcl_fast.config import data_config, model_config
from pcl_fast.errors import CheckpointError
from pcl_fast.nn.encoder import Encoder, building_device
from pcl_fast.pretrained.encoder import Pretrained
from pcl_fast.pretrained.files import checksum
from pcl_fast.pretrained.head import describe
from pcl_fast.pretrained.tensors import fill
from pcl_fast.run.checkpoint import FORMAT


def is_ours(content: Any) -> bool:
    """Whether what a file holds is a run's checkpoint."""
    return isinstance(content, Mapping) and {"format", "config", "encoders"} <= content.keys()


def from_ours(content: Mapping[str, Any], name: Literal["query", "momentum"], file: Path) -> Pretrained:
    """Build an encoder out of a run's checkpoint.

    Raises:
        CheckpointError: the checkpoint is another version's, has no such encoder, or its tensors do not fit its recipe.
    """
    if content["format"] != FORMAT:
        raise CheckpointError(f"{file} was not written by this version of pcl_fast; use the one that wrote it")
    encoders = content["encoders"]
    if name not in encoders:
        raise CheckpointError(f"{file} has no {name} encoder, only {', '.join(encoders)}")
    # Statistics of parts of a batch are how it was trained, not what it computes.
    model = replace(model_config(content["config"]), bn_splits=1)
    with torch.device(building_device(model)), torch.random.fork_rng(devices=[]):
        encoder = Encoder(model)
    fill(encoder, encoders[name], file=file, prefix=f"{name}: ")
    encoder.eval()
    others = [f"the {other} encoder" for other in encoders if other != name]
    return Pretrained(
        backbone=encoder.backbone,
        head=encoder.head,
        width=next(module.in_features for module in encoder.head.modules() if isinstance(module, nn.Linear)),
        arch=model.arch,
        small_stem=model.small_stem,
        encoder=name,
        source=f"a run of pcl_fast with the preset {content['config']['preset']}",
        path=file,
        checksum=checksum(file),
        data=data_config(content["config"]),
        notes=(
            f"loaded: the backbone, {model.arch}{' with the stem for small images' if model.small_stem else ''}, "
            f"and the projection head, {describe(encoder.head)}",
            f"left out: {', '.join([*others, 'what only training needs'])}",
        ),
        facts={name: content[name] for name in ("epoch",) if name in content},
        prototypes=prototypes_in(content.get("method", {})),
    )

"""Reading checkpoints: this project's, the official PCL's and MoCo's, torchvision's and those that look like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from pcl_fast.config import ModelConfig
from pcl_fast.errors import CheckpointError
from pcl_fast.nn.encoder import build_backbone
from pcl_fast.pretrained.architectures import architecture
from pcl_fast.pretrained.encoder import Pretrained
from pcl_fast.pretrained.files import checksum, locate, read
from pcl_fast.pretrained.formats import Found, encoder_names, find_encoder
from pcl_fast.pretrained.head import build_head, describe
from pcl_fast.pretrained.hub import HubConfig, hub_config
from pcl_fast.pretrained.ours import from_ours, is_ours
from pcl_fast.pretrained.tensors import fill


def read_pretrained(path: Path, encoder: Literal["query", "momentum"], *, or_only: bool = False) -> Pretrained:
    """Read an encoder, in eval mode and on the CPU.

    Nothing in it is random: a file that has not all of a ResNet's tensors is refused, and so is one that has others
    in it. No code that a file brings is run.

    Args:
        path: a run's folder, one of timm's with model.safetensors and config.json, or a file.
        encoder: of a file that has two; of one that does not say which its single encoder is, that.
        or_only: of a file that has but one take that, even if it is the other.

    Raises:
        CheckpointError: there is no such file, it cannot be read, has not this encoder, or would leave anything but a
            classifier at random; names the tensors.
        OSError: the file cannot be opened.
    """
    file = locate(path)
    return encoder_of(read(file), encoder, file, or_only=or_only)


def encoder_of(content: Any, encoder: str, file: Path, *, or_only: bool = False) -> Pretrained:
    """Build an encoder out of what a file holds; `read_pretrained` with the content at hand."""
    if or_only and len(names := names_in(content, file)) == 1:
        [encoder] = names
    if is_ours(content):
        return from_ours(content, encoder, file)
    config = hub_config(file) if file.suffix == ".safetensors" else None
    return _from_others(find_encoder(content, encoder, file), config, file)


def names_in(content: Any, file: Path) -> list[str]:
    """Return which encoders a file holds: "query" and "momentum" or one of them, or THE_ONLY_ONE.

    Raises:
        CheckpointError: there is no ResNet, or several of which nothing says which is which.
    """
    return list(content["encoders"]) if is_ours(content) else encoder_names(content, file)


def _from_others(found: Found, config: HubConfig | None, file: Path) -> Pretrained:
    likely = found.facts.get("arch") if config is None else config.architecture
    arch = architecture(found.backbone, file=file, prefix=found.prefix, likely=likely)
    if config is not None and config.architecture != arch:
        raise CheckpointError(
            f"config.json beside {file} names {config.architecture}, which is not {arch}, though its tensors have the "
            "same names and shapes: it may compute something else with them"
        )
    with torch.device("meta"):
        backbone, width = build_backbone(ModelConfig(arch=arch))
    fill(backbone, found.backbone, file=file, prefix=found.prefix)
    head = build_head(found.head, width, file=file, prefix=f"{found.prefix}fc.") if found.head else None
    return Pretrained(
        backbone=backbone.eval(),
        head=head,
        width=width,
        arch=arch,
        small_stem=False,
        encoder=found.encoder,
        source=found.kind if config is None else f"timm's {'.'.join(filter(None, (arch, config.tag)))}",
        path=file,
        checksum=checksum(file),
        data=None if config is None else config.data,
        notes=(
            f"loaded: the backbone, {arch}, from {len(found.backbone)} tensors"
            + (f" {found.prefix}*; " if found.prefix else "; ")
            + ("no projection head" if head is None else f"the projection head, {describe(head)}"),
            f"left out: {found.left_out or 'nothing'}",
            *(() if config is None else config.notes),
        ),
        facts=found.facts,
    )

"""Reading checkpoints: this project's, the official PCL's and MoCo's, torchvision's and those that look like it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from pcl_fast.clustering.prototypes import prototypes_in
from pcl_fast.config import data_config, model_config
from pcl_fast.errors import CheckpointError
from pcl_fast.nn.encoder import Encoder
from pcl_fast.pretrained.encoder import Pretrained
from pcl_fast.run.checkpoint import NAME, load_checkpoint


def read_pretrained(path: Path, encoder: str) -> Pretrained:
    """Read an encoder, in eval mode and on the CPU.

    Args:
        path: a run's folder, or a file.
        encoder: "query" or "momentum"; a file with a single encoder has no choice.

    Raises:
        CheckpointError: there is no such file, it cannot be read, has not this encoder, or would leave anything but a
            classifier at random; names the tensors.
    """
    return _ours(path, encoder)


def _ours(path: Path, name: str) -> Pretrained:
    state = load_checkpoint(path)
    if state is None:
        raise CheckpointError(f"{path} holds no checkpoint; give a run's folder, or a checkpoint's file")
    encoders = state["encoders"]
    if name not in encoders:
        raise CheckpointError(f"{path} has no encoder {name!r}; it has {', '.join(encoders)}")
    model = model_config(state["config"])
    encoder = Encoder(model)
    encoder.load_state_dict(encoders[name])
    encoder.eval()
    file = path / NAME if path.is_dir() else path
    return Pretrained(
        backbone=encoder.backbone,
        head=encoder.head,
        width=next(module.in_features for module in encoder.head.modules() if isinstance(module, nn.Linear)),
        arch=model.arch,
        small_stem=model.small_stem,
        encoder=name,
        source=f"a run of pcl_fast with the preset {state['config']['preset']}",
        path=file,
        checksum=checksum(file),
        data=data_config(state["config"]),
        notes=(),
        facts={"epoch": state["epoch"]},
        prototypes=prototypes_in(state.get("method", {})),
    )


def checksum(file: Path) -> str:
    """Return a file's SHA-256, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()

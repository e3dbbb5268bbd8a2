"""Projection heads as PCL and MoCo keep them, in place of the ResNet's classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from pcl_fast.errors import CheckpointError
from pcl_fast.pretrained.tensors import fill, shortened

_LINEAR = {"weight", "bias"}
_MLP = {"0.weight", "0.bias", "2.weight", "2.bias"}


def build_head(tensors: Mapping[str, torch.Tensor], width: int, *, file: Path, prefix: str) -> nn.Module:
    """Return the head with these tensors: one linear layer (v1), or two with a ReLU between them (v2).

    Args:
        tensors: by the names in the head: weight and bias, or 0.weight, 0.bias, 2.weight and 2.bias.
        width: of the backbone's features.
        file: that they come from; prefix: of their names there.

    Raises:
        CheckpointError: they are no such head, or do not fit the backbone; names them.
    """
    matrices = all(tensor.dim() == 2 for name, tensor in tensors.items() if name.endswith("weight"))
    if not matrices or tensors.keys() not in (_LINEAR, _MLP):
        raise CheckpointError(
            f"the projection head {prefix}* in {file} is neither one linear layer nor two with a ReLU between them: "
            + shortened(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        )
    with torch.device("meta"):
        if tensors.keys() == _LINEAR:
            head: nn.Module = nn.Linear(width, len(tensors["weight"]))
        else:
            hidden = len(tensors["0.weight"])
            head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, len(tensors["2.weight"])))
    fill(head, tensors, file=file, prefix=prefix)
    return head.eval()


def describe(head: nn.Module) -> str:
    """Say what a projection head is: "linear, 2048 -> 128", or "MLP, 2048 -> 2048 -> 128"."""
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    sizes = " -> ".join(map(str, [layers[0].in_features, *(layer.out_features for layer in layers)]))
    batch_norm = any(isinstance(module, nn.BatchNorm1d) for module in head.modules())
    return f"{'linear' if len(layers) == 1 else 'MLP'}{' with batch norm' if batch_norm else ''}, {sizes}"

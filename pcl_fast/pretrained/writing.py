"""Encoders into the files of other libraries: torchvision's, timm's, Detectron2's, and ONNX.

All but ONNX hold the backbone alone, which is what those libraries have; our projection head has no place there.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import nn

from pcl_fast.config import DataConfig
from pcl_fast.data.batch import MEAN, STD
from pcl_fast.errors import MissingPackageError, UserError
from pcl_fast.files import make_folder, write_whole
from pcl_fast.nn.encoder import resnet_names
from pcl_fast.nn.timm_network import arguments, classifiers, first_layer, has_one_size, timm_name
from pcl_fast.pretrained.encoder import Pretrained

# The oldest set of operators in which both stacks' exporters write everything that a ResNet needs.
_OPSET = 17
_DETECTRON2 = {
    "bn1": "conv1.norm",
    "bn2": "conv2.norm",
    "bn3": "conv3.norm",
    "downsample.0": "shortcut",
    "downsample.1": "shortcut.norm",
    "layer1": "res2",
    "layer2": "res3",
    "layer3": "res4",
    "layer4": "res5",
}


def to_torchvision(pretrained: Pretrained, file: Path) -> None:
    """Write the weights that torchvision's ResNet of that name loads, with its classifier `fc` alone missing.

    Raises:
        UserError: torchvision has no such network, as it has none of timm's.
        OSError: the file cannot be written.
    """
    tensors = _backbone(pretrained, "torchvision")
    write_whole(file, lambda out: torch.save(tensors, out))


def to_timm(pretrained: Pretrained, folder: Path) -> None:
    """Write a folder as the Hugging Face hub keeps timm's networks, model.safetensors and config.json, which
    `timm.create_model("local-dir:FOLDER")` loads.

    Raises:
        UserError: timm has no such network.
        OSError: the folder cannot be written.
    """
    tensors = _backbone(pretrained, "timm") if timm_name(pretrained.arch) is None else _tensors(pretrained)
    config = json.dumps(_timm_config(pretrained), indent=2) + "\n"
    make_folder(folder)
    write_whole(folder / "model.safetensors", lambda out: out.write(to_safetensors(tensors, metadata={"format": "pt"})))
    write_whole(folder / "config.json", lambda out: out.write(config.encode()))


def _timm_config(pretrained: Pretrained) -> dict[str, Any]:
    data = pretrained.data or DataConfig()
    name = timm_name(pretrained.arch)
    if name is None:
        name, own, first, classifier = pretrained.arch, {"global_pool": "avg"}, "conv1", "fc"
    else:  # pools as it does by default
        own, first, classifier = {"model_args": arguments(name)}, first_layer(name), list(classifiers(name))
        classifier = classifier[0] if len(classifier) == 1 else classifier
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": pretrained.width,
        **own,
        "pretrained_cfg": {
            "tag": "pcl",
            "input_size": [3, data.size, data.size],
            "interpolation": "bilinear",
            "crop_pct": data.size / data.shorter_side,
            "crop_mode": "center",
            "mean": [value / 255 for value in MEAN],
            "std": [value / 255 for value in STD],
            "num_classes": 0,
            "first_conv": first,
            "classifier": classifier,
        },
    }


def to_detectron2(pretrained: Pretrained, file: Path) -> None:
    """Write the pickle that Detectron2 takes as MODEL.WEIGHTS of a ResNet. It wants RGB images from 0 to 255, with the
    mean and deviation of ImageNet's channels, and the stride in the 3x3 convolutions (STRIDE_IN_1X1 False).

    Raises:
        UserError: Detectron2 has no such network.
        OSError: the file cannot be written.
    """
    tensors = {
        detectron2_name(name): tensor.numpy()
        for name, tensor in _backbone(pretrained, "Detectron2").items()
        if not name.endswith("num_batches_tracked")  # its batch norm has none
    }
    content = {"model": tensors, "__author__": "pcl_fast", "matching_heuristics": True}
    write_whole(file, lambda out: pickle.dump(content, out))


def detectron2_name(name: str) -> str:
    """Return Detectron2's name of what torchvision's ResNet calls `name`."""
    for theirs, ours in _DETECTRON2.items():
        name = ".".join(("", name, "")).replace(f".{theirs}.", f".{ours}.").strip(".")
    return name if name.startswith("res") else f"stem.{name}"


def _backbone(pretrained: Pretrained, library: str) -> dict[str, torch.Tensor]:
    """Return the backbone's tensors, contiguous on the CPU.

    Raises:
        UserError: the library has no network that takes them.
    """
    reason = None
    if pretrained.arch not in resnet_names():
        reason = f"has no {pretrained.arch}"
    elif pretrained.small_stem:
        reason = f"has no {pretrained.arch} with a stem for small images (--model.small-stem)"
    if reason:
        others = "--to onnx writes" if timm_name(pretrained.arch) is None else "--to timm and --to onnx write"
        raise UserError(f"{library} {reason}; {others} the network itself")
    return _tensors(pretrained)


def _tensors(pretrained: Pretrained) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in pretrained.backbone.state_dict().items()}


class _Outputs(nn.Module):
    """Both outputs of an encoder: the backbone's features, and the unit features of the head, if it has one."""

    def __init__(self, pretrained: Pretrained):
        super().__init__()
        self.backbone, self.head = pretrained.backbone, pretrained.head

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.backbone(images)
        return (features,) if self.head is None else (features, F.normalize(self.head(features), dim=1))


def to_onnx(pretrained: Pretrained, file: Path) -> None:
    """Write the network, which takes `images` float32 [N, 3, H, W], normalised as torchvision's are, and returns
    `features` [N, width] and, with a head, `embedding` [N, dim] of unit length. N, H and W are left open; H and W are
    those of training for one of timm's networks that is made for images of one size.

    Raises:
        MissingPackageError: the package onnx is not installed.
        UserError: the network has an operator that ONNX has not.
        OSError: the file cannot be written.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise MissingPackageError('--to onnx needs the package onnx: pip install "pcl-fast[onnx]"') from error
    size = (pretrained.data or DataConfig()).size
    network, sides = _Outputs(pretrained).cpu().eval(), {0: "N", 2: "H", 3: "W"}
    if (name := timm_name(pretrained.arch)) is not None and has_one_size(name):
        network, sides = _of_one_size(network, size), {0: "N"}
    names = ["features"] if pretrained.head is None else ["features", "embedding"]
    written = io.BytesIO()
    with _quiet(), _refusing():
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, size, size),),
            written,
            input_names=["images"],
            output_names=names,
            dynamic_axes={"images": sides, **{name: {0: "N"} for name in names}},
            opset_version=_OPSET,
            dynamo=False,
        )
    write_whole(file, lambda out: out.write(written.getbuffer()))


def _of_one_size(network: _Outputs, size: int) -> _Outputs:
    """Return a copy with embeddings of positions for images of this size, so that they need not be interpolated, for
    which ONNX has no operator.
    """
    network = copy.deepcopy(network)
    if getattr(network.backbone, "pos_embed", None) is not None and hasattr(network.backbone, "set_input_size"):
        network.backbone.set_input_size(img_size=(size, size))
    return network


@contextlib.contextmanager
def _refusing():
    try:
        yield
    except torch.onnx.errors.UnsupportedOperatorError as error:
        raise UserError(f"--to onnx: {str(error).partition(chr(10))[0]}") from error


@contextlib.contextmanager
def _quiet():
    """The exporter warns that it will be replaced, of which a user can make nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

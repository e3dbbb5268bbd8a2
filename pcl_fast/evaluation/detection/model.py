"""Detectors on a pre-trained ResNet: Faster R-CNN and Mask R-CNN with a feature pyramid."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from pcl_fast.errors import CheckpointError

# Width of the feature pyramid (Lin et al. 2017).
_PYRAMID = 256
_STAGES = {f"layer{stage}": str(stage - 1) for stage in (1, 2, 3, 4)}


class FixedBatchNorm(FrozenBatchNorm2d):
    """Batch norm with fixed statistics and weights, all of which are buffers.

    It does what torchvision's does in one kernel, and leaves activations in half precision, which torchvision's would
    turn into float32.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [N, C, H, W]."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def build_detector(
    backbone: nn.Module, classes: int, *, masks: bool, frozen: bool, min_size: int, max_size: int
) -> FasterRCNN:
    """Build Faster R-CNN (Ren et al. 2015) or Mask R-CNN (He et al. 2017) with a feature pyramid on a copy of a ResNet.

    All other layers are torchvision's and begin at random, from torch's generator. Images are float32 [3, H, W] in
    [0, 1], of any size, and are normalised with ImageNet's mean and deviation.

    Args:
        backbone: a ResNet as torchvision builds it. Its batch norm is fixed: statistics, weights and biases stay as
            they are.
        classes: how many, without the background.
        masks: predict masks too.
        frozen: nothing in the ResNet is trained; otherwise all of its convolutions are.
        min_size, max_size: images are scaled so that the shorter side has min_size pixels, or less where the longer one
            would have more than max_size.

    Raises:
        CheckpointError: the backbone is no such ResNet.
    """
    check_backbone(backbone)
    body = fix_batch_norm(copy.deepcopy(backbone))
    body.requires_grad_(not frozen)
    widths = [body.inplanes >> halvings for halvings in (3, 2, 1, 0)]
    pyramid = BackboneWithFPN(body, _STAGES, widths, _PYRAMID)
    kind = MaskRCNN if masks else FasterRCNN
    detector = kind(pyramid, classes + 1, min_size=min_size, max_size=max_size)
    _keep_boxes_exact(detector)
    return detector


def _keep_boxes_exact(detector: FasterRCNN) -> None:
    """Let a detector compute boxes in float32 under autocast too.

    torchvision gives anchors the type of the feature maps, and boxes that of what the heads predict. In bfloat16 the
    corners of boxes would be multiples of 4 pixels from 512 on.
    """
    detector.rpn.anchor_generator.register_forward_pre_hook(_as_if_float32)
    for head in (detector.rpn.head, detector.roi_heads.box_predictor):
        head.register_forward_hook(_in_float32)


def _as_if_float32(module: nn.Module, inputs: tuple[Any, list[torch.Tensor]]) -> tuple[Any, list[torch.Tensor]]:
    """Of the maps the anchors take nothing but shape, type and device: these have no memory of their own."""
    images, maps = inputs
    return images, [torch.empty((), dtype=torch.float32, device=each.device).expand(each.shape) for each in maps]


def _in_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs.float()
    return type(outputs)(_in_float32(module, inputs, item) for item in outputs)


def check_backbone(backbone: nn.Module) -> None:
    """Refuse what no detector can be built on.

    Raises:
        CheckpointError: the backbone is no ResNet as torchvision builds it.
    """
    if not isinstance(backbone, ResNet):
        raise CheckpointError(
            "detection wants a ResNet with torchvision's layers, such as resnet50; this encoder is another, like those "
            "for images of 32 px (cifar_resnet8, ...) and timm's"
        )
    if not isinstance(backbone.maxpool, nn.MaxPool2d):
        raise CheckpointError(
            "detection wants a ResNet whose stem divides the sides by four; this one has the small stem "
            "(--model.small-stem)"
        )


def fix_batch_norm(module: nn.Module) -> nn.Module:
    """Replace all batch norm below a module by one with the same statistics that never changes, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fixed = FixedBatchNorm(child.num_features, eps=child.eps)
            fixed.load_state_dict(child.state_dict())
            setattr(module, name, fixed.to(child.weight.device))
        else:
            fix_batch_norm(child)
    return module


def check_body(detector: FasterRCNN, backbone: nn.Module) -> int:
    """Check that the ResNet below a detector has the same tensors as another, bit for bit; return how many.

    Raises:
        RuntimeError: one has changed, or is not there: what was measured was not the frozen ResNet.
    """
    body, reference = detector.backbone.body.state_dict(), backbone.state_dict()
    # Counters of batches are of no consequence where nothing is counted any more.
    names = [name for name in reference if not name.endswith("num_batches_tracked")]
    changed = [
        name for name in names if name not in body or not torch.equal(body[name], reference[name].to(body[name].device))
    ]
    if changed:
        raise RuntimeError(
            f"{len(changed)} of {len(names)} tensors of the frozen ResNet have changed, the first is {changed[0]}"
        )
    return len(names)

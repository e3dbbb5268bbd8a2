"""Small detectors for small images."""

from __future__ import annotations

import torch
from coco_sets import picture
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.transforms.functional import pil_to_tensor

from pcl_fast.evaluation.detection.model import build_detector
from pcl_fast.evaluation.detection.training import drawn


def small_resnet() -> nn.Module:
    """A ResNet-18 at random, whose batch norm knows the statistics of such images."""
    torch.manual_seed(0)
    network = resnet18()
    network.fc = nn.Identity()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # takes the statistics of the one batch that it sees
    with torch.no_grad():
        network(torch.stack([pil_to_tensor(picture(number)).float() / 60 - 2 for number in range(4)]))
    return network.eval()


def small_detector(backbone: nn.Module, *, masks: bool = False, frozen: bool = True) -> FasterRCNN:
    """A detector of two classes for small images."""
    with drawn(torch.device("cpu"), 0):
        return shrunk(build_detector(backbone, 2, masks=masks, frozen=frozen, min_size=64, max_size=96))


def shrunk(detector: FasterRCNN, places: int = 24) -> FasterRCNN:
    """Let a detector look at few places, with few features of each."""
    for limits in (detector.rpn._pre_nms_top_n, detector.rpn._post_nms_top_n):
        limits.update(training=places, testing=places)
    heads = detector.roi_heads
    heads.fg_bg_sampler.batch_size_per_image = places
    heads.box_head, predictor = TwoMLPHead(256 * 7 * 7, 32), heads.box_predictor
    predictor.cls_score = nn.Linear(32, predictor.cls_score.out_features)
    predictor.bbox_pred = nn.Linear(32, predictor.bbox_pred.out_features)
    return detector

"""Detectors on a pre-trained ResNet: what they are trained on, how, and how they are scored."""

from pcl_fast.evaluation.detection.coco_ap import CocoAp, coco_average_precision
from pcl_fast.evaluation.detection.data import Annotated
from pcl_fast.evaluation.detection.detecting import Detections, detect
from pcl_fast.evaluation.detection.model import build_detector, check_body
from pcl_fast.evaluation.detection.training import Recipe, train_detector
from pcl_fast.evaluation.detection.voc_ap import Truth, VocAp, voc_average_precision

__all__ = [
    "Annotated",
    "CocoAp",
    "Detections",
    "Recipe",
    "Truth",
    "VocAp",
    "build_detector",
    "check_body",
    "coco_average_precision",
    "detect",
    "train_detector",
    "voc_average_precision",
]

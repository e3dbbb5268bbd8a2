"""The scores that the paper reports (Li et al., ICLR 2021), ResNet-50 pre-trained on ImageNet for 200 epochs.

Accuracies and average precisions are in percent.
"""

from __future__ import annotations

# Table 4: kNN's top-1 accuracy on ImageNet.
KNN = {"InstDisc": (46.5,), "MoCo": (47.1,), "LA": (49.4,), "PCL": (54.5,)}

# Table 5: AMI of 25,000 clusters of ImageNet's training images.
AMI = {"DeepCluster": (0.281,), "MoCo": (0.285,), "PCL": (0.410,)}

# Table 3: top-1 accuracy of the linear classifier.
LINEAR_IMAGENET = {
    "MoCo": (60.6,), "PCL v1": (61.5,), "SimCLR": (61.9,), "MoCo v2": (67.5,), "PCL v2": (67.6,),
}  # fmt: skip
LINEAR_PLACES205 = {"MoCo": (48.9,), "PCL v1": (49.2,), "MoCo v2": (50.1,), "PCL v2": (50.3,)}

# Table 3: mAP of linear SVMs on all of VOC07.
SVM_VOC07 = {"MoCo": (79.2,), "PCL v1": (82.3,), "MoCo v2": (84.0,), "PCL v2": (85.4,)}

# Table 1: SVMs that learn from 1, 2, 4, 8 and 16 images of a class: mAP on VOC07, accuracy on Places205.
LOW_SHOT = (1, 2, 4, 8, 16)
LOW_SHOT_VOC07 = {
    "MoCo": (31.4, 42.0, 49.5, 60.0, 65.9),
    "PCL v1": (46.9, 56.4, 62.8, 70.2, 74.3),
    "SimCLR": (32.7, 43.1, 52.5, 61.0, 67.1),
    "MoCo v2": (46.3, 58.3, 64.9, 72.5, 76.1),
    "PCL v2": (47.9, 59.6, 66.2, 74.5, 78.3),
    "supervised": (54.3, 67.8, 73.9, 79.6, 82.3),
}
LOW_SHOT_PLACES205 = {
    "MoCo": (8.8, 13.2, 18.2, 23.2, 28.0),
    "PCL v1": (11.3, 15.7, 19.5, 24.1, 28.4),
    "SimCLR": (9.4, 14.2, 19.3, 23.7, 28.3),
    "MoCo v2": (10.9, 16.3, 20.8, 26.0, 30.1),
    "PCL v2": (12.5, 17.5, 23.2, 28.1, 32.3),
}

# Table 2: top-5 accuracy on ImageNet after fine-tuning on 1% and 10% of its labels.
SEMI = {
    "MoCo": (56.9, 83.0), "MoCo v2": (66.3, 84.4), "SimCLR": (56.5, 82.7), "PCL v1": (75.3, 85.6),
    "PCL v2": (73.9, 85.0),
}  # fmt: skip

# Table 6: AP of Faster R-CNN on VOC07's test images, body frozen, trained on VOC07 and on VOC07+12.
DETECTION_VOC = {"MoCo": (66.4, 73.5), "PCL": (71.7, 78.5), "supervised": (72.8, 79.3)}
# Mask R-CNN fine-tuned on COCO: AP, AP50 and AP75 of boxes, then of masks.
DETECTION_COCO = {"PCL": (41.0, 60.8, 44.2, 35.6, 57.4, 37.8)}

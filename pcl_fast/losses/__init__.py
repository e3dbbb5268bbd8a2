"""The losses that users call."""

from pcl_fast.losses.byol import byol
from pcl_fast.losses.contrast import (
    ContrastResult,
    ProtoNCEResult,
    info_nce,
    pcl_loss,
    proto_nce,
    protonce,
    sample_negatives,
)
from pcl_fast.losses.nce import estimate_log_partition, nce
from pcl_fast.losses.nt_xent import nt_xent
from pcl_fast.losses.pseudo_labels import pseudo_label_loss
from pcl_fast.losses.siamese import SiameseResult, siamese
from pcl_fast.losses.sinkhorn import sinkhorn
from pcl_fast.losses.swapped_prediction import swapped_prediction

__all__ = [
    "ContrastResult",
    "ProtoNCEResult",
    "SiameseResult",
    "byol",
    "estimate_log_partition",
    "info_nce",
    "nce",
    "nt_xent",
    "pcl_loss",
    "proto_nce",
    "protonce",
    "pseudo_label_loss",
    "sample_negatives",
    "siamese",
    "sinkhorn",
    "swapped_prediction",
]

"""The losses that users call."""

from pcl_fast.losses.contrast import (
    ContrastResult,
    ProtoNCEResult,
    info_nce,
    pcl_loss,
    proto_nce,
    protonce,
    sample_negatives,
)

__all__ = [
    "ContrastResult",
    "ProtoNCEResult",
    "info_nce",
    "pcl_loss",
    "proto_nce",
    "protonce",
    "sample_negatives",
]

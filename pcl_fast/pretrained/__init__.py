"""Encoders out of checkpoints, ours and others'."""

from pcl_fast.pretrained.encoder import THE_ONLY_ONE, Pretrained
from pcl_fast.pretrained.reading import read_pretrained

__all__ = ["THE_ONLY_ONE", "Pretrained", "read_pretrained"]

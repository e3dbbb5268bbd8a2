"""Encoders out of checkpoints, ours and others'."""

from pcl_fast.pretrained.encoder import Pretrained
from pcl_fast.pretrained.reading import read_pretrained

__all__ = ["Pretrained", "read_pretrained"]

"""Data sets, views and loaders."""

from pcl_fast.data.batch import Batch, normalise
from pcl_fast.data.check import check_headers, find_broken, usable
from pcl_fast.data.folder import ImageFolder, find_images
from pcl_fast.data.formats import open_set
from pcl_fast.data.images import ImageSet
from pcl_fast.data.loader import TrainingLoader, clustering_loader, describe_loader, training_loader
from pcl_fast.data.shards import TarShards, find_shards

__all__ = [
    "Batch",
    "ImageFolder",
    "ImageSet",
    "TarShards",
    "TrainingLoader",
    "check_headers",
    "clustering_loader",
    "describe_loader",
    "find_broken",
    "find_images",
    "find_shards",
    "normalise",
    "open_set",
    "training_loader",
    "usable",
]

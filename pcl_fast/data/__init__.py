"""Data sets, views and loaders."""

from pcl_fast.data.batch import Batch, normalise
from pcl_fast.data.loaders.growing import GrowingLoader, GrowingView
from pcl_fast.data.loaders.loader import TrainingLoader, clustering_loader, describe_loader, training_loader
from pcl_fast.data.sources.check import check_headers, find_broken, usable
from pcl_fast.data.sources.folder import ImageFolder, find_images
from pcl_fast.data.sources.formats import open_set
from pcl_fast.data.sources.images import ImageSet
from pcl_fast.data.sources.shards import TarShards, find_shards

__all__ = [
    "Batch",
    "GrowingLoader",
    "GrowingView",
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

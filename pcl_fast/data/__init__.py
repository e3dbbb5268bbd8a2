"""Data sets, views and loaders."""

from pcl_fast.data.folder import ImageFolder, check_headers, find_images
from pcl_fast.data.loader import Batch, TrainingLoader, clustering_loader
from pcl_fast.data.views import normalise

__all__ = [
    "Batch",
    "ImageFolder",
    "TrainingLoader",
    "check_headers",
    "clustering_loader",
    "find_images",
    "normalise",
]

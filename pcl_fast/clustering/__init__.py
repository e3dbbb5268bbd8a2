"""The E-step: features of all images, k-means, concentration and prototypes."""

from pcl_fast.clustering.backends import obstacle, pick_backend
from pcl_fast.clustering.cluster import cluster, cluster_row
from pcl_fast.clustering.concentration import concentration
from pcl_fast.clustering.features import FeatureShard
from pcl_fast.clustering.kmeans import kmeans
from pcl_fast.clustering.types import KMeansResult, PrototypeSet

__all__ = [
    "FeatureShard",
    "KMeansResult",
    "PrototypeSet",
    "cluster",
    "cluster_row",
    "concentration",
    "kmeans",
    "obstacle",
    "pick_backend",
]

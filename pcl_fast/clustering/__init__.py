"""The E-step: features of all images, k-means, concentration and prototypes."""

from pcl_fast.clustering.backends import obstacle, pick_backend
from pcl_fast.clustering.cluster import cluster, cluster_row
from pcl_fast.clustering.concentration import concentration
from pcl_fast.clustering.features import FeatureShard
from pcl_fast.clustering.kmeans import kmeans
from pcl_fast.clustering.pairs import draw_pairs
from pcl_fast.clustering.types import KMeansResult, PrototypeSet
from pcl_fast.clustering.whitening import Whitening, pca_whitening

__all__ = [
    "FeatureShard",
    "KMeansResult",
    "PrototypeSet",
    "Whitening",
    "cluster",
    "cluster_row",
    "concentration",
    "draw_pairs",
    "kmeans",
    "obstacle",
    "pca_whitening",
    "pick_backend",
]

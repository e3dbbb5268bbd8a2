"""How good features are, judged by labels that training never sees."""

from pcl_fast.evaluation.ami import adjusted_mutual_information, expected_mutual_information
from pcl_fast.evaluation.knn import knn_accuracy

__all__ = [
    "adjusted_mutual_information",
    "expected_mutual_information",
    "knn_accuracy",
]

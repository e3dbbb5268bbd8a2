"""Kernels and their plain PyTorch twins. Nothing here knows of the rest of pcl_fast."""

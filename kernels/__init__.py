"""Triton kernels, each beside a plain version in PyTorch (X_plain.py). Nothing here knows of the rest of pcl_fast."""

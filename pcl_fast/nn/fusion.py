"""The ways in which an encoder's passes can be computed. They differ in speed, and in the last bits.

- eager: module by module.
- triton: batch norm, ReLU and residual as one operation, see fused_batch_norm.py.
- compile: by torch.compile.
"""

from __future__ import annotations

from torch import nn

from pcl_fast.nn.fused_batch_norm import fuse_batch_norm, fused_kernels, unfuse_batch_norm
from pcl_fast.nn.sync_batch_norm import SyncBatchNorm2d

WAYS = ("eager", "triton", "compile")


def use(way: str, encoder: nn.Module) -> None:
    """Let an encoder compute in one of `WAYS` from now on, in place; its parameters and their names stay.

    Raises:
        ValueError: it cannot; says why. It computes eagerly then.
    """
    unfuse_batch_norm(encoder)
    encoder._compiled_call_impl = None  # where Module.compile puts its function
    if way == "triton":
        if fused_kernels is None:
            raise ValueError("Triton is not installed")
        if not fuse_batch_norm(encoder):
            raise ValueError("none of the patterns of torchvision's ResNets is found in the encoder")
    elif way == "compile":
        if any(isinstance(module, SyncBatchNorm2d) for module in encoder.modules()):
            raise ValueError("torch.compile does not see through the exchange of --model.sync-bn")
        # A run has few shapes of batches, one for every size of its views: each is compiled by itself.
        encoder.compile(dynamic=False)

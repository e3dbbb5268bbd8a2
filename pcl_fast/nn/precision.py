"""The precision in which a device computes, and whether it always computes the same bits."""

from __future__ import annotations

import os

import torch


def encoder_dtype(device: torch.device) -> torch.dtype:
    """Return the type of images and of the encoder's products: bf16 from sm_80 on, fp16 on older GPUs, which have no
    bf16, and fp32 on CPUs.
    """
    if device.type != "cuda":
        return torch.float32
    return torch.float16 if torch.cuda.get_device_capability(device) < (8, 0) else torch.bfloat16


def loss_dtype(device: torch.device) -> torch.dtype:
    """Return the type of keys and prototypes in the loss: fp32 on CPUs, and fp16 on GPUs, which has three more bits
    than bf16 for the entries of unit features. Queries and their gradient are fp32 on both.
    """
    return torch.float16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Return a context in which an encoder computes in `encoder_dtype`."""
    dtype = encoder_dtype(device)
    if dtype is torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def loss_scaler(device: torch.device) -> torch.amp.GradScaler:
    """Return what scales the loss where gradients are fp16, because small gradients would be 0 in fp16; elsewhere it
    does nothing.
    """
    return torch.amp.GradScaler(device.type, enabled=encoder_dtype(device) is torch.float16)


def make_deterministic() -> None:
    """From now on let PyTorch take algorithms that give the same bits every time. An operation that has none warns of
    it, once, with its name. Call it before the first product on a GPU, and leave `cudnn.benchmark` off, which chooses
    among algorithms by their times.
    """
    # cuBLAS divides its work among streams as it comes, unless its buffers are fixed. It reads this when it begins.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Or all new memory would be filled, to make reads of what nobody wrote alike: nothing here reads that.
    torch.utils.deterministic.fill_uninitialized_memory = False

"""In which precision a device computes."""

from __future__ import annotations

import torch


def encoder_dtype(device: torch.device) -> torch.dtype:
    """The type of images and of the encoder's products: bf16 from sm_80 on, fp16 on older GPUs (which lack bf16), fp32
    on CPUs.
    """
    if device.type != "cuda":
        return torch.float32
    return torch.float16 if torch.cuda.get_device_capability(device) < (8, 0) else torch.bfloat16


def loss_dtype(device: torch.device) -> torch.dtype:
    """The type of keys and prototypes in the loss: on GPUs fp16, which has three bits more than bf16 for unit features.

    Queries stay in fp32, and with them the gradient.
    """
    return torch.float16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """A context in which an encoder computes in `encoder_dtype`."""
    dtype = encoder_dtype(device)
    if dtype is torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def loss_scaler(device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss where gradients are fp16, whose smallest numbers they would fall below; elsewhere it does
    nothing.
    """
    return torch.amp.GradScaler(device.type, enabled=encoder_dtype(device) is torch.float16)

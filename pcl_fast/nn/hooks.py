"""Hooks of modules, which would not be called where something else computes in a module's place."""

from __future__ import annotations

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks of its forward or backward pass."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)

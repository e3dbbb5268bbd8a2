"""Checkpoints as others write them, of small networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import nn

IMAGES = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def resnet(seed: int = 0, *, classes: int = 16, mlp: bool = False) -> nn.Module:
    """A ResNet-18 in eval mode with values of its own in every tensor, which need little room on a disk: kernels are
    the same for all channels that they read, as views of the smaller tensors that are saved in their place.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        network = torchvision.models.resnet18(num_classes=classes)
        if mlp:
            network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), network.fc)

    def values(shape: torch.Size) -> torch.Tensor:
        if len(shape) < 2:
            return 0.5 + torch.rand(shape, generator=generator)
        small = torch.randn(shape[0], 1, *shape[2:], generator=generator) * 3 / shape[1:].numel()
        return small.expand(shape)

    state = {
        name: values(tensor.shape) if tensor.is_floating_point() else torch.tensor(7)
        for name, tensor in network.state_dict().items()
    }
    network.load_state_dict(state, assign=True)
    return network.eval()


@torch.inference_mode()
def pooled(network: nn.Module) -> torch.Tensor:
    """What a ResNet gives to its classifier."""
    seen: list[torch.Tensor] = []
    handle = network.avgpool.register_forward_hook(lambda module, images, output: seen.append(output.flatten(1)))
    network(IMAGES)
    handle.remove()
    return seen[0]


def prefixed(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def without_classifier(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}


def official(query: nn.Module, momentum: nn.Module, path: Path, *, queue: int = 64, **how) -> Path:
    """The file that PCL's and MoCo's training writes; how: as torch.save takes it."""
    state = {
        **prefixed("module.encoder_q.", query.state_dict()),
        **prefixed("module.encoder_k.", momentum.state_dict()),
        "module.queue": torch.randn(16, queue),
        "module.queue_ptr": torch.zeros(1, dtype=torch.int64),
    }
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.03}]}
    content = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": optimizer}
    torch.save(content, path, **how)
    return path

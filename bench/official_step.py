"""A training step as the official code takes it, rebuilt from a description of it: what we measure ourselves against.

Everything is float32, channels first, and one module within DistributedDataParallel, which sends the module's buffers,
the queue included, to the other ranks in every forward pass. A Python loop over the parameters moves the momentum
encoder. For shuffled batch norm every rank gathers the float images of all ranks. The queue's position is read from the
device. The views come from worker processes as normalised floats, and are copied to the device in every step. The
meters wait for the loss. Negative prototypes are chosen on the host, see official.py.

This needs a process group, even for a single rank.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import official
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from pcl_fast.clustering import PrototypeSet
from pcl_fast.config import Config
from pcl_fast.data import ImageSet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORKERS = len(os.sched_getaffinity(0))
AHEAD = 2 * WORKERS  # batches that may be ready: DataLoader has two for every worker
NO_END = 1 << 40  # so many images that an epoch never ends

Views = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query and key views [N, 3, H, W] float32; index [N]


class Contrast(nn.Module):
    """Encoder, momentum encoder (key_encoder) and queue."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.query_encoder, self.key_encoder = encoder(config), encoder(config).requires_grad_(False)
        self.key_encoder.load_state_dict(self.query_encoder.state_dict())
        self.register_buffer("queue", F.normalize(torch.randn(config.model.dim, config.model.queue_size), dim=0))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long))

    def forward(
        self, query_view: torch.Tensor, key_view: torch.Tensor, prototypes: list[PrototypeSet], index: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (logits, labels) of InfoNCE, then of every granularity."""
        key = self.keys(key_view)
        query = F.normalize(self.query_encoder(query_view), dim=1)
        loss = self.config.loss
        options = {"temperature": loss.temperature, "num_negatives": loss.num_negatives}
        parts = official.contrasts(query, key, self.queue.clone().T, prototypes, index, **options)
        self.enqueue(key)
        return parts

    @torch.no_grad()
    def keys(self, view: torch.Tensor) -> torch.Tensor:
        """Update the momentum encoder, and return the keys of a view, from a batch that is shuffled among the ranks."""
        momentum = self.config.model.momentum
        for key, query in zip(self.key_encoder.parameters(), self.query_encoder.parameters(), strict=True):
            key.data = momentum * key.data + (1 - momentum) * query.data
        everyone = gathered(view)
        order = torch.randperm(len(everyone)).to(view.device)
        dist.broadcast(order, src=0)
        shuffled = F.normalize(self.key_encoder(everyone[own_part(order)]), dim=1)
        return gathered(shuffled)[own_part(order.argsort())]

    @torch.no_grad()
    def enqueue(self, key: torch.Tensor) -> None:
        keys = gathered(key)
        start = int(self.position)
        self.queue[:, start : start + len(keys)] = keys.T
        self.position[0] = (start + len(keys)) % self.queue.shape[1]


def encoder(config: Config) -> nn.Module:
    """Return a ResNet whose last layer, or last two layers with a ReLU between them, give the features."""
    network = torchvision.models.get_model(config.model.arch, num_classes=config.model.dim)
    if config.model.head == "mlp":
        width = network.fc.in_features
        network.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), network.fc)
    return network


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks, one rank after another."""
    parts = [torch.ones_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def own_part(order: torch.Tensor) -> torch.Tensor:
    """Return this rank's share of an order of all ranks' rows."""
    return order.view(dist.get_world_size(), -1)[dist.get_rank()]


class Meter:
    """The running sum and count of a metric. A sum of tensors stays on their device."""

    def __init__(self) -> None:
        self.sum, self.count = 0, 0

    def update(self, value: float | torch.Tensor, count: int) -> None:
        self.sum += value * count
        self.count += count


class OfficialStep:
    """The module, its optimiser and the meters of the official code."""

    def __init__(self, config: Config, device: torch.device):
        self.device = device
        self.module = Contrast(config).to(device)
        self.parallel = DistributedDataParallel(self.module, device_ids=[device] if device.type == "cuda" else None)
        self.optimizer = torch.optim.SGD(
            self.parallel.parameters(),
            config.optim.lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
        )
        self.loss, self.accuracy, self.prototype_accuracy = Meter(), Meter(), Meter()

    @torch.no_grad()
    def start_from(self, weights: dict[str, torch.Tensor], queue: torch.Tensor) -> None:
        """Copy in our encoder's weights, for both encoders, and our queue [size, dim]."""
        names = {name: name.removeprefix("backbone.").replace("head.", "fc.") for name in weights}
        for encoder in (self.module.query_encoder, self.module.key_encoder):
            encoder.load_state_dict({names[name]: value for name, value in weights.items()})
        self.module.queue.copy_(queue.T)

    def step(self, views: Views, prototypes: list[PrototypeSet]) -> float:
        """Take a step and return the loss. The views are on the host, in pinned memory if there is a GPU."""
        query_view, key_view = (view.to(self.device, non_blocking=True) for view in views[:2])
        instance, *granularities = self.parallel(query_view, key_view, prototypes, views[2])
        loss, rows = official.total([instance, *granularities]), len(query_view)
        for part in granularities:
            self.prototype_accuracy.update(top1(*part), rows)
        value = loss.item()
        self.loss.update(value, rows)
        self.accuracy.update(top1(*instance), rows)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return value


@torch.no_grad()
def top1(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how often the label has the largest logit, in percent."""
    found = logits.topk(1, dim=1).indices[:, 0]
    return 100 * (found == labels).float().mean()


def loader(images: ImageSet, size: int, batch: int, *, pin: bool) -> Iterator[Views]:
    """Return an endless stream of views of random images, made by one worker process per core. Without epochs there are
    no pauses between them, which would be frequent with so few images.
    """
    sampler = RandomSampler(images, replacement=True, num_samples=NO_END)
    pairs = Pairs(images, augmentation(size))
    return iter(DataLoader(pairs, batch, sampler=sampler, num_workers=WORKERS, pin_memory=pin, drop_last=True))


class Pairs(Dataset):
    """Two views of every image, and its index."""

    def __init__(self, images: ImageSet, transform: transforms.Compose):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        image = self.images.read(index)
        return self.transform(image), self.transform(image), index


def augmentation(size: int) -> transforms.Compose:
    """Return the augmentation of PCL v2, by PIL."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.Lambda(blur)], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

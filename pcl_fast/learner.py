"""One M-step: everything that changes with a batch.

Nothing in here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from pcl_fast.clustering import PrototypeSet
from pcl_fast.config import Config
from pcl_fast.data import Batch, normalise
from pcl_fast.distributed import World, all_gather_rows
from pcl_fast.losses import ProtoNCEResult, protonce
from pcl_fast.nn.batch_norm import average_statistics, fold_batch_norm
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.momentum import MomentumTwin
from pcl_fast.nn.queue import KeyQueue
from pcl_fast.nn.shuffle import BatchShuffle
from pcl_fast.optim import learning_rate
from pcl_fast.seeds import Purpose, mix_seeds


class StepInputs(NamedTuple):
    """All that differs from step to step, on the device.

    query_view, key_view: of the batch, uint8 [N, H, W, 3].
    index: int64 [N], its positions in the data set.
    order: int64 [N], see BatchShuffle.order, or None.
    seed: 0-d int64, of the negatives; on a CPU a plain number, for which the plain loss takes fewer small operations.
    """

    query_view: torch.Tensor
    key_view: torch.Tensor
    index: torch.Tensor
    order: torch.Tensor | None
    seed: torch.Tensor | int


class Learner:
    """Encoder, momentum twin, queue and optimiser."""

    def __init__(self, config: Config, world: World):
        """Initial weights depend on config.seed alone.

        Raises:
            ValueError: an unknown architecture.
        """
        self.config, self.world = config, world
        # Drawn on the CPU, so that every device and rank starts alike.
        torch.manual_seed(config.seed)
        self.encoder = Encoder(config.model).to(world.device, memory_format=torch.channels_last)
        self.queue = KeyQueue(config.model.queue_size, config.model.dim, loss_dtype(world.device)).to(world.device)
        self.twin = MomentumTwin(self.encoder, config.model.momentum)
        self.shuffle = _shuffle(config, world)
        self.dtype = encoder_dtype(world.device)
        self.autocast, self.scaler = precision(world.device)
        # On the device, as everything that changes from step to step.
        self._lr = torch.tensor(learning_rate(config.optim, 0, config.epochs), device=world.device)
        self.optimizer = torch.optim.SGD(
            self.encoder.parameters(),
            self._lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        # The fused optimiser would begin with uninitialised momentum, and keep it if its first step is skipped.
        for parameter in self.encoder.parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self._query = self.encoder if world.group is None else _data_parallel(self.encoder)

    def begin_epoch(self, epoch: int) -> float:
        """Set and return the epoch's learning rate."""
        lr = learning_rate(self.config.optim, epoch, self.config.epochs)
        self._lr.fill_(lr)
        return lr

    def for_loss(self, prototypes: Sequence[PrototypeSet]) -> list[PrototypeSet]:
        """The prototypes of an E-step in the precision in which `step` contrasts with them, see `loss_dtype`."""
        dtype = loss_dtype(self.world.device)
        return [granularity._replace(centroids=granularity.centroids.to(dtype)) for granularity in prototypes]

    def step(self, batch: Batch, prototypes: Sequence[PrototypeSet], number: int) -> dict[str, torch.Tensor]:
        """One optimiser step.

        Args:
            batch: this rank's views.
            prototypes: granularities of the last E-step, see `for_loss`; empty before the first.
            number: of the step in the whole run; seeds the step's draws.

        Returns:
            loss, its parts and accuracies in percent: 0-d tensors on the device, of this rank's batch.
        """
        return self.compute(self.inputs(batch, number), prototypes)

    def inputs(self, batch: Batch, number: int) -> StepInputs:
        """What step `number` computes with; draws from its seeds what is drawn on the host."""
        seed = self._seed(Purpose.NEGATIVES, number)
        order = self.shuffle.order(self._seed(Purpose.SHUFFLE, number))
        if self.world.device.type == "cpu":
            return StepInputs(*batch.views, batch.index, order, seed)
        # In one copy, and without waiting for it.
        parts = [torch.tensor([seed]), batch.index, *([] if order is None else [order])]
        together = torch.cat(parts).pin_memory().to(self.world.device, non_blocking=True)
        seed, index, *order = together.split([len(part) for part in parts])
        return StepInputs(*batch.views, index, order[0] if order else None, seed.squeeze(0))

    def compute(self, inputs: StepInputs, prototypes: Sequence[PrototypeSet]) -> dict[str, torch.Tensor]:
        """`step` after its inputs are there: on the device from end to end, so that a CUDA graph can hold it."""
        arrive = self.shuffle.begin(inputs.key_view, inputs.order)
        # While the key's views travel.
        self.twin.update()
        with self.autocast:
            query = self._query(normalise(inputs.query_view, self.dtype))
        key = self._keys(*arrive())
        result = protonce(
            query,
            key,
            self.queue.keys,
            prototypes,
            inputs.index,
            temperature=self.config.loss.temperature,
            num_negatives=self.config.loss.num_negatives,
            seed=inputs.seed,
            backend=self.config.loss.backend,
        )
        self._descend(result.loss)
        self.queue.enqueue(all_gather_rows(key, self.world.group))
        return _summary(result)

    @torch.no_grad()
    def _keys(self, views: torch.Tensor, restore: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Encode shuffled views with the momentum encoder: [N, dim] in the batch's own order, in `loss_dtype`."""
        with self.autocast:
            key = self.twin.key(normalise(views, self.dtype))
        return restore(key.to(loss_dtype(self.world.device)))

    def feature_encoder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The momentum encoder as it is now, in eval mode: uint8 [N, H, W, 3] -> unit features float32 [N, dim]."""
        folded = fold_batch_norm(self.twin.key).to(self.dtype)
        return lambda images: folded(normalise(images, self.dtype))

    def _descend(self, loss: torch.Tensor) -> None:
        """Backward and update; if any rank's loss is not finite, no rank updates.

        Such a loss sends NaN into its backward pass, so that after the all-reduce every gradient is NaN on every rank;
        the fused optimiser then leaves weights and momentum alone, told so by a flag that stays on the device.
        """
        upstream = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self.scaler.scale(loss).backward(upstream)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            gradient = self.optimizer.param_groups[0]["params"][-1].grad
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = 1.0 - gradient.isfinite().all().float()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _seed(self, purpose: Purpose, number: int) -> int:
        return mix_seeds(self.config.seed, purpose, number, self.world.rank)

    def end_epoch(self) -> None:
        """Give all ranks the same batch-norm statistics."""
        average_statistics((self.encoder, self.twin.key), self.world.group)

    def state(self) -> dict[str, Any]:
        """What all ranks share."""
        return {
            "encoder": self.encoder.state_dict(),
            "momentum_encoder": self.twin.key.state_dict(),
            "queue": self.queue.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def rank_state(self) -> dict[str, Any]:
        """What is this rank's own: batch-norm statistics within an epoch, and random number generators."""
        return {
            "statistics": [buffer.cpu() for buffer in self._buffers()],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.world.device) if self.world.device.type == "cuda" else None,
        }

    def load(self, shared: dict[str, Any], own: dict[str, Any]) -> None:
        """Restore what `state` and `rank_state` returned."""
        self.encoder.load_state_dict(shared["encoder"])
        self.twin.key.load_state_dict(shared["momentum_encoder"])
        self.queue.load_state_dict(shared["queue"])
        self.optimizer.load_state_dict(shared["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr  # which the checkpoint's has replaced
        self.scaler.load_state_dict(shared["scaler"])
        for buffer, saved in zip(self._buffers(), own["statistics"], strict=True):
            buffer.copy_(saved)
        torch.set_rng_state(own["rng"])
        if own["cuda_rng"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.world.device)

    def _buffers(self) -> list[torch.Tensor]:
        return [*self.encoder.buffers(), *self.twin.key.buffers()]


def encoder_dtype(device: torch.device) -> torch.dtype:
    """Of images and products: bf16 from sm_80 on, fp16 on older GPUs (which lack bf16), fp32 on CPUs."""
    if device.type != "cuda":
        return torch.float32
    return torch.float16 if torch.cuda.get_device_capability(device) < (8, 0) else torch.bfloat16


def loss_dtype(device: torch.device) -> torch.dtype:
    """Of keys and prototypes in the loss: on GPUs fp16, which has three bits more than bf16 for unit features.

    Queries stay in fp32, and with them the gradient.
    """
    return torch.float16 if device.type == "cuda" else torch.float32


def precision(device: torch.device) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """Autocast to `encoder_dtype`, and for fp16 loss scaling."""
    dtype = encoder_dtype(device)
    if dtype is torch.float32:
        return torch.autocast(device.type, enabled=False), torch.amp.GradScaler(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype), torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def _shuffle(config: Config, world: World) -> BatchShuffle:
    rows = config.optim.batch_size // world.size
    if not config.model.shuffle_bn:
        return BatchShuffle(rows, None)
    return BatchShuffle(rows, world.group, config.model.bn_splits)


def _data_parallel(encoder: torch.nn.Module) -> DistributedDataParallel:
    # Batch-norm statistics stay each rank's own within an epoch, see average_statistics.
    return DistributedDataParallel(encoder, broadcast_buffers=False, gradient_as_bucket_view=True)


def _summary(result: ProtoNCEResult) -> dict[str, torch.Tensor]:
    summary = {
        "loss": result.loss.detach(),
        "instance_loss": result.instance.loss.detach().mean(),
        "instance_accuracy": 100 * result.instance.correct.float().mean(),
    }
    if result.prototype:
        summary["prototype_loss"] = torch.stack([part.loss.detach() for part in result.prototype]).mean()
        summary["prototype_accuracy"] = 100 * torch.stack([part.correct for part in result.prototype]).float().mean()
    return summary

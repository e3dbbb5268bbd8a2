"""One optimiser step of whatever method: precision, a guard against what is not finite, the learning rate.

Nothing in here waits for the device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from pcl_fast.accumulation import pass_in_parts
from pcl_fast.config import Config
from pcl_fast.data import Batch
from pcl_fast.distributed import World, average_gradients
from pcl_fast.methods import Inputs, Method, Step
from pcl_fast.nn.batch_norm import average_statistics
from pcl_fast.nn.precision import loss_scaler
from pcl_fast.optim import build_optimizer, learning_rate, load_optimizer, set_rate

# The learner's own metric: 1 if the step could be applied, or will be once the loss's scale has come down.
FINITE = "finite"
_NEVER = 2**31 - 1  # steps


class Learner:
    """A method and its optimiser."""

    def __init__(self, method: Method, config: Config, world: World):
        """
        Raises:
            ValueError: a parameter that a gradient may reach is in none of the method's groups, or in several.
        """
        self.method, self.config, self.world = method, config, world
        self.optimizer = build_optimizer(method.groups(), config.optim, world.device)
        self.scaler = loss_scaler(world.device)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        _check_groups(method, self._parameters)
        self._gradients_last = False

    @functools.cached_property
    def _forward(self) -> Method | DistributedDataParallel:
        alone = self.world.group is None or self._gradients_last
        return self.method if alone else _data_parallel(self.method)

    def exchange_gradients_last(self) -> None:
        """Let ranks exchange their gradients after the backward pass, so that CUDA graphs can hold all else.
        DistributedDataParallel, which computes the same up to rounding, does it meanwhile. To be called before the
        first step.
        """
        self._gradients_last = True

    def set_rate(self, epoch: int, step: int = 0, steps: int = 1) -> float:
        """Set and return the learning rate of step `step` out of `steps` of an epoch."""
        rate = learning_rate(self.config.optim, epoch, self.config.epochs, step=step, steps=steps)
        set_rate(self.optimizer, rate)
        return rate

    def step(self, batch: Batch, number: int) -> dict[str, torch.Tensor]:
        """One optimiser step.

        Args:
            batch: this rank's views, of all parts if there are several.
            number: of the step in the whole run; seeds the step's draws.

        Returns:
            The method's metrics and FINITE: 0-d tensors on the device, of this rank's batch.
        """
        return self.compute(self.inputs(batch, number), number)

    def inputs(self, batch: Batch, number: int) -> Inputs:
        """What step `number` computes with. What is drawn on the host goes to the device in one copy, which nobody
        waits for.
        """
        on_host = Inputs(batch.views, batch.index, self.method.draw(batch, number))
        if self.world.device.type == "cpu":
            return on_host
        return on_host.moved(lambda packed: packed.pin_memory().to(self.world.device, non_blocking=True))

    def compute(self, inputs: Inputs, number: int) -> dict[str, torch.Tensor]:
        """`step` after its inputs are there: on the device from end to end, so that CUDA graphs can hold it."""
        loss, metrics, carry = self._pass(inputs)
        applied, fault = self._descend(loss, number)
        self.method.after_update(carry, applied)
        return {**metrics, FINITE: 1.0 - fault.float()}

    def _pass(self, inputs: Inputs) -> Step:
        """The forward pass; where a step has several parts, with the backward passes of all but the last."""
        parts = self.config.optim.accumulate
        return self._forward(inputs) if parts == 1 else pass_in_parts(self._forward, inputs, parts, self._scaled)

    def _scaled(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss as its backward pass begins with it, and the gradient that it begins with: NaN for one that is not
        finite.
        """
        return self.scaler.scale(loss), torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def _descend(self, loss: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Backward and update; if any rank's loss or gradient is not finite, no rank updates.

        A loss that is not finite sends NaN into its backward pass. After the all-reduce what is not finite on one rank
        is so on every rank; the fused optimiser then leaves weights and momentum alone, told so by a flag that stays
        on the device.

        Returns:
            0-d bools: whether the update was applied, and whether that is a fault. In fp16 a gradient that overflows
            is none: the scaler takes a smaller scale for the next step, until there is no smaller one.
        """
        scaled, upstream = self._scaled(loss)
        scaled.backward(upstream)
        if self._gradients_last:
            average_gradients(self._parameters, self.world.group)
        self.method.before_update(number)
        finite = _all_finite(self._parameters)
        fault = ~finite
        if self.scaler.is_enabled():
            fault = fault & (self.scaler._get_scale_async() <= 1)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = 1.0 - finite.float()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite, fault

    def renew(self) -> None:
        """Let the momentum of what the E-step has drawn anew begin at zero: in place, where a captured step has it."""
        for parameter in self.method.renewed():
            self.optimizer.state[parameter]["momentum_buffer"].zero_()

    def end_epoch(self) -> None:
        """Give all ranks the same batch-norm statistics."""
        average_statistics(self.method, self.world.group)

    def state(self) -> dict[str, Any]:
        """What all ranks share. The encoders stand in it a second time, by their names: the same memory and, in a
        file, the same bytes.
        """
        return {
            "method": self.method.state_dict(),
            "encoders": {name: encoder.state_dict() for name, encoder in self.method.encoders().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def own_state(self) -> dict[str, Any]:
        """What is this rank's own: of the method, and random number generators."""
        return {
            "method": self.method.own_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.world.device) if self.world.device.type == "cuda" else None,
        }

    def load(self, shared: dict[str, Any], own: list[dict[str, Any]]) -> None:
        """Restore what `state` returned, and `own_state` on every rank of the run that was saved.

        Raises:
            ValueError: the method cannot go on with what another number of ranks had.
        """
        self.method.load_state_dict(shared["method"])
        self.method.load_own([state["method"] for state in own])
        load_optimizer(self.optimizer, shared["optimizer"])
        # One saved in another precision has none, and begins with a new scale.
        if self.scaler.is_enabled() and shared["scaler"]:
            self.scaler.load_state_dict(shared["scaler"])
        generators = own[self.world.rank % len(own)]
        torch.set_rng_state(generators["rng"])
        if generators["cuda_rng"] is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(generators["cuda_rng"], self.world.device)


def _check_groups(method: Method, parameters: list[torch.nn.Parameter]) -> None:
    """Another parameter's gradient would grow for ever, never looked at."""
    grouped = [id(parameter) for parameter in parameters]
    wrong = [name for name, p in method.named_parameters() if p.requires_grad and grouped.count(id(p)) != 1]
    if wrong:
        raise ValueError(f"{type(method).__name__}.groups must have every trainable parameter once, but not {wrong}")


def _all_finite(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """0-d bool: whether every entry of every gradient is finite, by their norms, which a NaN or an infinity reaches."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    return torch.stack(norms).isfinite().all()


def _data_parallel(method: Method) -> DistributedDataParallel:
    # Buffers stay each rank's own: queue and prototypes are the same anyway, statistics see average_statistics.
    parallel = DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)
    # It times its first ten steps, and would time every hundredth, for which the host waits until the device is idle.
    parallel._set_ddp_runtime_logging_sample_rate(_NEVER)
    return parallel

"""SGD, LARS, LARC, groups of parameters and learning rates.

An optimiser's learning rates lie on the device, one 0-d tensor per group, so that a captured step can be given others;
its momentum is there from the start, so that a first step that is skipped leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.sgd import sgd

from pcl_fast.config import OptimConfig


class Group(NamedTuple):
    """Parameters that are updated by the same rule.

    lr_scale: times the run's learning rate is theirs.
    decay: whether weight decay applies to them.
    adapt: whether LARS and LARC adapt their learning rate to their size.
    """

    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
    decay: bool = True
    adapt: bool = True


def one_group(module: nn.Module) -> list[Group]:
    """All trainable parameters together, in the module's order. Without any there is no group."""
    return _not_empty([Group(_trainable(module))])


def norms_and_biases_apart(module: nn.Module) -> list[Group]:
    """Two groups: weights; and biases and the parameters of norm layers, which neither decay nor adapt (Chen et al.
    2020) and are known by having one dimension. A group without parameters is left out.
    """
    parameters = _trainable(module)
    weights = Group([parameter for parameter in parameters if parameter.ndim > 1])
    others = Group([parameter for parameter in parameters if parameter.ndim <= 1], decay=False, adapt=False)
    return _not_empty([weights, others])


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _not_empty(groups: list[Group]) -> list[Group]:
    return [group for group in groups if group.parameters]


# Of apex's LARC.
_EPSILON = 1e-8


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017): SGD that gives every weight w a learning rate by its norm,

        lambda = trust |w| / (|g| + decay |w|)          (1 where |w| or |g| is 0, and where the group does not adapt)
        v = momentum v + lr lambda (g + decay w)
        w = w - v

    The learning rate is part of the momentum v: a new rate applies to new gradients alone. In LARC it is not.

    A step overwrites the gradients. It does not wait for the device, and like PyTorch's fused SGD it divides the
    gradients by the attribute `grad_scale` and does nothing if the attribute `found_inf` is 1, where they are set.
    """

    # The GradScaler then sets both attributes, and does not look at found_inf on the host.
    _step_supports_amp_scaling = True
    # Whether the learning rate is part of the momentum.
    _rate_inside = True

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ):
        """
        Args:
            params: parameters or dicts of them, as PyTorch's optimisers take. A dict may hold its own lr, momentum,
                weight_decay and trust, and "adapt": False for parameters whose lambda is 1.
            lr: learning rate; as a 0-d tensor it lies on the parameters' device and can be changed in place.
            momentum: share of v that is kept.
            weight_decay: decay, times w is added to the gradient.
            trust: the trust coefficient, called eta in the paper.
        """
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        super().__init__(params, settings)
        _begin_momentum(self)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        if (scale := getattr(self, "grad_scale", None)) is not None:
            torch._foreach_div_(gradients, scale)
        inside, outside = (group["lr"], 1.0) if self._rate_inside else (1.0, group["lr"])
        if group["adapt"]:
            norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, gradients))
            # A list of numbers on the device: one launch for each weight, which PyTorch has no fused operation for.
            inside = (inside * self._ratios(*norms, group)).unbind()
        if group["weight_decay"]:
            torch._foreach_add_(gradients, parameters, alpha=group["weight_decay"])
        if group["adapt"] or self._rate_inside:
            torch._foreach_mul_(gradients, inside)
        # What remains is SGD, and the fused one leaves everything alone if found_inf says so.
        sgd(
            parameters,
            gradients,
            [self.state[parameter]["momentum_buffer"] for parameter in parameters],
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            lr=outside,
            momentum=group["momentum"],
            weight_decay=0.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    @staticmethod
    def _ratios(weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """lambda of every weight, by the norms of the weights and of their gradients: [number of parameters] all."""
        ratio = group["trust"] * weight / (gradient + group["weight_decay"] * weight)
        return torch.where((weight > 0) & (gradient > 0), ratio, 1.0)


class LARC(LARS):
    """Layer-wise adaptive rate control as NVIDIA's apex has it with clip=False, which SwAV is trained with: LARS with
    the learning rate outside of the momentum,

        lambda = trust |w| / (|g| + decay |w| + 1e-8)   (1 where |w| is 0, and where the group does not adapt)
        v = momentum v + lambda (g + decay w)
        w = w - lr v

    A new rate applies to all that the momentum v holds. While the rate is the same both take the same steps. A weight
    whose gradient is 0 does not decay, where LARS has a lambda of 1. All else is as in LARS.
    """

    _rate_inside = False

    @staticmethod
    def _ratios(weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        ratio = group["trust"] * weight / (gradient + group["weight_decay"] * weight + _EPSILON)
        # Of a gradient of 0: 0 times the decay, too. One that is not finite must stay so.
        return torch.where(gradient == 0, 0.0, torch.where(weight > 0, ratio, 1.0))


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros: the fused SGD would begin with uninitialised momentum, and keep it if its first step is skipped."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def build_optimizer(groups: Sequence[Group], optim: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser that the recipe asks for, at the first epoch's learning rate until `set_rate`.

    device: where the parameters are. All optimisers heed `grad_scale` and `found_inf`, see LARS.
    """
    first = learning_rate(optim, 0, 1)
    settings = [
        {
            "params": group.parameters,
            "lr": torch.tensor(first * group.lr_scale, device=device),
            "rate": first * group.lr_scale,  # what lies in lr, for the host
            "lr_scale": group.lr_scale,
            "weight_decay": optim.weight_decay if group.decay else 0.0,
            "adapt": group.adapt,
        }
        for group in groups
    ]
    if optim.optimizer != "sgd":
        kind = {"lars": LARS, "larc": LARC}[optim.optimizer]
        return kind(settings, first, momentum=optim.momentum, trust=optim.trust)
    optimizer = torch.optim.SGD(settings, first, momentum=optim.momentum, fused=True)
    _begin_momentum(optimizer)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Make lr the run's learning rate, which each group of `build_optimizer` scales by its own lr_scale.

    Nothing waits for the device, and nothing is sent to it where the rate is what it was.
    """
    for group in optimizer.param_groups:
        rate = lr * group["lr_scale"]
        if rate != group["rate"]:
            group["lr"].fill_(rate)
            group["rate"] = rate


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up the momentum of another optimiser's state_dict().

    Learning rates and all other settings stay this optimiser's own, the rates in the very tensors where they lie: a
    captured step reads those.

    Raises:
        ValueError: the state is of other groups of parameters.
    """
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def learning_rate(optim: OptimConfig, epoch: int, epochs: int, *, step: int = 0, steps: int = 1) -> float:
    """The run's learning rate in an epoch (from 0) out of `epochs`, at its step (from 0) out of `steps`.

    Within an epoch it changes during warm-up alone, whose last step has all of the schedule's value.
    """
    lr = optim.lr * optim.batch_size / 256 if optim.scale_lr else optim.lr
    if optim.schedule == "cosine":
        lr *= optim.final_share + (1 - optim.final_share) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    else:
        lr *= 0.1 ** sum(epoch >= milestone for milestone in optim.milestones)
    if epoch < optim.warmup_epochs:
        lr *= (epoch * steps + step + 1) / (optim.warmup_epochs * steps)
    return lr

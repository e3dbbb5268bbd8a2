"""What batch_norm.py and batch_norm_plain.py share: five operations make a differentiable batch norm.

Statistics are lines of `line_width(C)` numbers: C means, C biased variances, the number of values of a channel, and
padding to 16 bytes. A line goes with each group of rows that is normalised by itself; in `merge` with each rank.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable


class Exchange(Protocol):
    """What the ranks tell each other, where statistics are those of all ranks' values."""

    def gather(self, line: torch.Tensor) -> torch.Tensor:
        """Return the lines [number of ranks, width] of all ranks; `line` [1, width] is this one's."""

    def add_up(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' `sums`, which may be overwritten."""


class Operations(NamedTuple):
    """How a device does it. Tensors [N, C, H, W] are in channels_last, results in x's dtype.

    statistics(x, *running, momentum, splits) -> [splits, width]: of `splits` parts of the rows
    merge(lines [n, width], *running, momentum) -> [1, width]: of all together
    apply(x, residual, weight, bias, statistics, relu, eps, keep) -> y; and if `keep`, where ReLU is not 0, for `sums`
    sums(dy, second, x, kept, weight, bias, statistics, relu, eps)
        -> [splits, 2 C] of g and of g (x - mean), d_weight, d_bias, g: the sum of both gradients, masked by ReLU. Empty
        if it is dy, but for a mask that x tells: see `stores_gradient`.
    differentiate(g, x, weight, bias, statistics, sums, relu, training, eps) -> dx

    Both first ones move `running`, which is running_mean, running_var and batches: what there is of them.
    """

    statistics: Callable[..., torch.Tensor]
    merge: Callable[..., torch.Tensor]
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    sums: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    differentiate: Callable[..., torch.Tensor]


class Settings(NamedTuple):
    """How a call normalises; see batch_norm.batch_norm_act."""

    relu: bool
    training: bool
    momentum: float
    eps: float
    splits: int
    exchange: Exchange | None
    fork: bool


def line_width(channels: int) -> int:
    """Return the length of a line of statistics."""
    return 2 * channels + 4


def stores_gradient(second: torch.Tensor | None, kept: torch.Tensor | None) -> bool:
    """Return whether `sums` writes the gradient that reaches the residual, for `differentiate` to read it again."""
    return second is not None or kept is not None


def run(
    operations: Operations,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    residual: torch.Tensor | None,
    settings: Settings,
) -> Any:
    """batch_norm_act with these operations; `running` is (running_mean, running_var, batches)."""
    check(x, weight, bias, *running[:2], residual, settings)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        statistics = _statistics(operations, x, running, settings)
    leaves = [x, weight, bias] if residual is None else [x, weight, bias, residual]
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        y = _BatchNormAct.apply(x, residual, weight, bias, statistics, operations, settings)
    else:
        y, _ = operations.apply(x, residual, weight, bias, statistics, settings.relu, settings.eps, False)
    return (y, y) if settings.fork and isinstance(y, torch.Tensor) else y


def check(x, weight, bias, running_mean, running_var, residual, settings: Settings) -> None:
    """
    Raises:
        ValueError: see batch_norm.batch_norm_act.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point [N, C, H, W], not {x.dtype} {list(x.shape)}")
    channels = x.shape[1]
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, tensor in named.items():
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise ValueError(f"{name} must be [{channels}], a number a channel of x, not {list(tensor.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"the residual must be like x, {x.dtype} {list(x.shape)}, not {residual.dtype} {list(residual.shape)}"
        )
    if (running_mean is None) != (running_var is None) or (running_mean is None and not settings.training):
        raise ValueError("running_mean and running_var go together, and without them there is only training=True")
    if settings.exchange is not None and settings.splits > 1:
        raise ValueError(f"either {settings.splits} splits of a rank's batch, or an exchange between ranks, not both")
    if settings.training:
        _check_batch(x, settings)


def _check_batch(x: torch.Tensor, settings: Settings) -> None:
    if len(x) % settings.splits:
        raise ValueError(f"a batch of {len(x)} does not divide into {settings.splits} parts")
    values = x.numel() // x.shape[1] // settings.splits
    if not values or (values == 1 and settings.exchange is None):
        raise ValueError(
            f"batch norm in training needs at least two values of each channel in a part of the batch, not {values}: "
            f"x is {list(x.shape)} in {settings.splits} part(s); take larger batches or images, or fewer parts"
        )


def _statistics(operations, x, running, settings: Settings) -> torch.Tensor:
    if not settings.training:
        running_mean, running_var, _ = running
        padding = running_mean.new_zeros(line_width(len(running_mean)) - 2 * len(running_mean))
        line = torch.cat([running_mean, running_var, padding])[None]
        return line.to(torch.promote_types(torch.float32, x.dtype))
    if settings.exchange is None:
        return operations.statistics(x, *running, settings.momentum, settings.splits)
    own = operations.statistics(x, None, None, None, 0.0, 1)
    return operations.merge(settings.exchange.gather(own), *running, settings.momentum)


class _BatchNormAct(torch.autograd.Function):
    """The statistics come as a constant; backward knows that they are x's."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, statistics, operations: Operations, settings: Settings):
        # Without a residual x tells where ReLU is 0, and with one a bit says it, so that y and it need not be read.
        keep = settings.relu and residual is not None
        y, kept = operations.apply(x, residual, weight, bias, statistics, settings.relu, settings.eps, keep)
        ctx.save_for_backward(x, kept if keep else None, weight, bias, statistics)
        ctx.operations, ctx.settings, ctx.has_residual = operations, settings, residual is not None
        ctx.set_materialize_grads(False)
        # Only beside a residual is g stored anyway, and torch.compile takes no outputs that share memory.
        forks = settings.fork and residual is not None and not torch.compiler.is_compiling()
        return (y, y.detach()) if forks else y

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        if all(flow is None for flow in upstream):
            return (None,) * 7
        x, kept, weight, bias, statistics = ctx.saved_tensors
        dy, second = (*[_like(flow, x) for flow in upstream if flow is not None], None)[:2]
        training, relu, eps = ctx.settings.training, ctx.settings.relu, ctx.settings.eps
        sums, d_weight, d_bias, g = ctx.operations.sums(dy, second, x, kept, weight, bias, statistics, relu, eps)
        if stores_gradient(second, kept):
            relu = False  # is in g
        else:
            g = dy
        needs_x, needs_residual, needs_weight, needs_bias, *rest = ctx.needs_input_grad
        dx = None
        if needs_x:
            if training and ctx.settings.exchange is not None:
                sums = ctx.settings.exchange.add_up(sums)
            dx = ctx.operations.differentiate(g, x, weight, bias, statistics, sums, relu, training, eps)
        d_residual = g if needs_residual else None
        return dx, d_residual, d_weight if needs_weight else None, d_bias if needs_bias else None, *[None] * len(rest)


def _like(flow: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return flow.to(x.dtype).contiguous(memory_format=torch.channels_last)

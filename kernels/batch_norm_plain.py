"""Batch norm, ReLU and residual in one, the plain version of batch_norm.py: for any device, and for float64.

Statistics and sums are float32 as in the kernels, or float64 for float64 values. What is as large as x is rounded where
the kernels round it.
"""

import torch
from pcl_fast.kernels import batch_norm_function
from pcl_fast.kernels.batch_norm_function import Exchange, Operations, Settings, line_width, stores_gradient


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *,
    residual: torch.Tensor | None = None,
    relu: bool = True,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    splits: int = 1,
    exchange: Exchange | None = None,
    fork: bool = False,
    batches: torch.Tensor | None = None,
):
    """Do what batch_norm.batch_norm_act does, up to rounding."""
    settings = Settings(relu, training, momentum, eps, splits, exchange, fork)
    return batch_norm_function.run(
        OPERATIONS, x, weight, bias, (running_mean, running_var, batches), residual, settings
    )


def _rows(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[N, C, H, W] as [groups, rows, C], in the type of statistics."""
    rows = x.permute(0, 2, 3, 1).reshape(groups, -1, x.shape[1])
    return rows.to(torch.promote_types(torch.float32, x.dtype) if x.is_floating_point() else x.dtype)


def _values(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The reverse of `_rows`."""
    n, channels, height, width = x.shape
    return rows.to(x.dtype).reshape(n, height, width, channels).permute(0, 3, 1, 2)


def _track(lines: torch.Tensor, running_mean, running_var, batches, momentum: float) -> None:
    """As PyTorch, with the unbiased variance; of several parts, their mean."""
    if batches is not None:
        batches.add_(1)
    if running_mean is None:
        return
    channels = len(running_mean)
    count = lines[:, 2 * channels, None]
    mean, variance = lines[:, :channels], lines[:, channels : 2 * channels] * (count / (count - 1).clamp(min=1))
    running_mean.lerp_(mean.mean(0).to(running_mean.dtype), momentum)
    running_var.lerp_(variance.mean(0).to(running_var.dtype), momentum)


def _statistics(x, running_mean, running_var, batches, momentum: float, splits: int) -> torch.Tensor:
    rows = _rows(x, splits)
    mean = rows.mean(1)
    variance = (rows - mean[:, None]).square().mean(1)
    lines = _lines(mean, variance, mean.new_full((splits, 1), rows.shape[1]))
    _track(lines, running_mean, running_var, batches, momentum)
    return lines


def _lines(mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    padding = count.new_zeros(len(mean), line_width(mean.shape[1]) - 2 * mean.shape[1] - 1)
    return torch.cat([mean, variance, count, padding], dim=1)


def _merge(lines: torch.Tensor, running_mean, running_var, batches, momentum: float) -> torch.Tensor:
    """Chan et al. 1979: nothing is the difference of large sums."""
    channels = (lines.shape[1] - line_width(0)) // 2
    means, variances, counts, _ = lines.split([channels, channels, 1, line_width(0) - 1], dim=1)
    share = counts / counts.sum()
    mean = means[:1] + (share * (means - means[:1])).sum(0, keepdim=True)
    variance = (share * (variances + (means - mean).square())).sum(0, keepdim=True)
    merged = _lines(mean, variance, counts.sum(0, keepdim=True))
    _track(merged, running_mean, running_var, batches, momentum)
    return merged


def _centred(x: torch.Tensor, statistics: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x - mean as `_rows`, and 1 / deviation [groups, 1, C]."""
    channels = x.shape[1]
    mean, variance = statistics[:, None, :channels], statistics[:, None, channels : 2 * channels]
    return _rows(x, len(statistics)) - mean, 1 / (variance + eps).sqrt()


def _apply(x, residual, weight, bias, statistics, relu: bool, eps: float, keep: bool):
    centred, inverse = _centred(x, statistics, eps)
    value = centred * (inverse * weight) + bias
    if residual is not None:
        value = value + _rows(residual, len(statistics))
    y = _values(value.relu() if relu else value, x)
    return y, ~(y <= 0) if keep else x.new_empty(0, dtype=torch.bool)


def _passes(x, centred, inverse, weight, bias) -> torch.Tensor:
    """Where relu(bn(x)) is not 0, computed and rounded as by `_apply`."""
    return ~((centred * (inverse * weight) + bias).to(x.dtype) <= 0)


def _sums(dy, second, x, kept, weight, bias, statistics, relu: bool, eps: float):
    groups = len(statistics)
    centred, inverse = _centred(x, statistics, eps)
    g = _rows(dy, groups)
    if second is not None:
        g = g + _rows(second, groups)
    if kept is not None:
        g = g.where(_rows(kept, groups) != 0, 0)
    elif relu:
        g = g.where(_passes(x, centred, inverse, weight, bias), 0)
    stored = _values(g, x) if stores_gradient(second, kept) else x.new_empty(0)
    if stored.numel():
        g = _rows(stored, groups)
    total, product = g.sum(1), (g * centred).sum(1)
    d_weight, d_bias = (product * inverse[:, 0]).sum(0).to(weight.dtype), total.sum(0).to(bias.dtype)
    return torch.cat([total, product], dim=1), d_weight, d_bias, stored


def _differentiate(g, x, weight, bias, statistics, sums, relu: bool, training: bool, eps: float) -> torch.Tensor:
    channels = x.shape[1]
    centred, inverse = _centred(x, statistics, eps)
    flow = _rows(g, len(statistics))
    if relu:
        flow = flow.where(_passes(x, centred, inverse, weight, bias), 0)
    if training:
        total, product = (sums[:, None] / statistics[:, None, 2 * channels, None]).split(channels, dim=2)
        flow = flow - total - centred * (product * inverse.square())
    return _values(flow * (inverse * weight), x)


OPERATIONS = Operations(_statistics, _merge, _apply, _sums, _differentiate)

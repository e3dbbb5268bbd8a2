"""Whether the kernels compute on this GPU what their plain twins do: small fixed inputs, looked at when a run starts.

A compiler's or a driver's fault shows on a GPU alone, and need not crash. Each check takes several tiles in every
direction, so that a tile in the midst is there too; inputs that have much in common, so that a tile that is left out,
or wrong in part, moves the result by more than rounding could; and types and widths of the run's own, so that what is
compiled here need not be compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from pcl_fast.clustering import PrototypeSet
from pcl_fast.errors import UserError
from pcl_fast.kernels import (
    assign,
    assign_plain,
    batch_norm,
    batch_norm_plain,
    launch,
    max_pool,
    normalise,
    normalise_plain,
    photometric,
    photometric_plain,
    segment,
    segment_plain,
    stem,
    switches,
)
from pcl_fast.kernels.photometric_plain import Op
from pcl_fast.losses import pcl_loss
from pcl_fast.nn.precision import encoder_dtype

# Of features, keys and prototypes on a GPU, and its unit roundoff.
_HALF, _ROUNDING = torch.float16, 2.0**-11
_TEMPERATURE = 0.1
# Of images, in units of a byte: any would do, and pcl_fast.data needs packages that kernels do not.
_MEAN, _STD = (124.0, 116.0, 104.0), (58.0, 57.0, 56.0)
_SEED = 0


def find_faults(kernels: Sequence[str], device: torch.device, *, dim: int, granularities: int) -> dict[str, str]:
    """Check some of `switches.KERNELS`.

    Args:
        kernels: those that the run uses.
        dim: d, length of the run's features.
        granularities: number of the run's prototype sets.

    Returns:
        What is wrong, to be read behind a kernel's name, by the names of those that are wrong or cannot be launched.

    Raises:
        UserError: after a kernel's failure the GPU takes no more work.
    """
    checks: dict[str, Callable[[], str | None]] = {
        "contrast": lambda: _first(check_contrast(device, dim, sets) for sets in sorted({0, granularities})),
        "assign_held": lambda: check_assign(device, dim),
        "assign": switches.without("assign_held")(lambda: check_assign(device, dim)),
        "segment": lambda: _first(check_segment(device, width, dtype) for width, dtype in ((dim, _HALF), (1, None))),
        "normalise": lambda: check_normalise(device),
        "photometric": lambda: check_photometric(device),
        "batch_norm": lambda: check_batch_norm(device),
        "max_pool": lambda: check_max_pool(device),
        "stem": lambda: check_stem(device),
    }
    found = {name: _fault(name, checks[name], device) for name in kernels}
    return {name: fault for name, fault in found.items() if fault is not None}


def _first(faults) -> str | None:
    return next((fault for fault in faults if fault is not None), None)


def _fault(name: str, check: Callable[[], str | None], device: torch.device) -> str | None:
    try:
        fault = check()
    except Exception as error:  # compilers, drivers and PyTorch raise whatever they like
        fault = f"cannot be launched ({type(error).__name__}: {_line(error)})"
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise UserError(
                f"the kernel {name} failed, and after it {torch.cuda.get_device_name(device)} takes no more work "
                f"({_line(error)}). Plain PyTorch can do without it: --loss.backend torch for contrast, "
                "--cluster.backend torch for assign, --data.loader torchvision for photometric"
            ) from error
    return fault


def _line(error: Exception) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


def _unit(generator: torch.Generator, rows: int, dim: int, device: torch.device) -> torch.Tensor:
    """Unit features, fp16, whose cosines are 0.8 on average: what they have in common is in all entries alike, so that
    none averages out.
    """
    common = 2.0 * (-1.0) ** torch.arange(dim)
    return F.normalize(common + torch.randn(rows, dim, generator=generator), dim=1).to(device, _HALF)


def check_contrast(device: torch.device, dim: int, granularities: int) -> str | None:
    """Loss and gradient of `contrast`, with a queue and so many prototype sets, against the plain loss in float64.

    Every product of d terms in float32 that a matrix unit truncates is off by d 2^-23 at most, and the softmax by twice
    as much, relatively; its exponentials are rounded to fp16. The largest weight multiplies both. A tile of a bank of T
    tiles moves its loss by some 1/T, with T below 100 here.
    """
    generator = torch.Generator().manual_seed(_SEED)
    tile, blocks = launch.tile_for(launch.capability(device), 2, dim), -(-dim // launch.BLOCK_D)
    rows = 2 * tile.rows + 5
    parts = max(2, launch.multiprocessors(device) * tile.programs // (3 * blocks))
    # Two tiles and a bit in each part of a bank, at least three tiles a bank.
    columns = max(3, -(-2 * parts // (1 + granularities))) * tile.columns + 7
    query, key, queue = (_unit(generator, count, dim, device) for count in (rows, rows, columns))
    images, k = 2 * rows, columns + columns // 4
    sets = [
        PrototypeSet(
            _unit(generator, k, dim, device),
            (_TEMPERATURE * (1 + torch.rand(k, generator=generator))).to(device),
            torch.randint(0, k, (images,), generator=generator, dtype=torch.int32).to(device),
        )
        for _ in range(granularities)
    ]
    index = torch.randperm(images, generator=generator)[:rows].to(device)

    def run(dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [banks, rows], and the gradient of what each row adds to their weighted mean [rows, d]."""
        leaf = query.to(dtype).requires_grad_()
        result = pcl_loss(
            leaf, key, queue, sets, index,
            temperature=_TEMPERATURE, num_negatives=columns, seed=_SEED, backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(result.loss, leaf)
        losses = torch.stack([part.loss for part in (result.instance, *result.prototype)])
        return losses.detach().double(), rows * gradient.double()

    with torch.enable_grad():
        (loss, gradient), (exact_loss, exact_gradient) = run(torch.float32, "triton"), run(torch.float64, "torch")
    weight, product = 1 / _TEMPERATURE, dim * 2.0**-23
    shares = 1 + (granularities > 0)
    return _first(
        [
            _differs("losses", (loss - exact_loss).abs(), 2 * weight * product),
            _differs("gradients", (gradient - exact_gradient).norm(dim=1), shares * weight * (_ROUNDING + 2 * product)),
        ]
    )


def check_assign(device: torch.device, dim: int) -> str | None:
    """`assign`'s nearest centroids against the plain search. Every centroid is the nearest of some points.

    The kernels take centroids that are rounded to fp16: these are off by 2^-11 of their length, so that a point may go
    to a centroid that is farther by twice as much. To that the float32 of the scores is added.
    """
    generator = torch.Generator().manual_seed(_SEED)
    tiles = launch.nearest_tile(launch.capability(device), 2)
    tile = tiles[min(width for width in tiles if width >= dim)]
    n, k = 3 * tile.rows + 5, 5 * tile.columns + 7
    centroids = _unit(generator, k, dim, device).float()
    points = centroids[torch.arange(n, device=device) % k]
    points = (points + 0.02 * torch.randn(n, dim, generator=generator).to(device) / dim**0.5).to(_HALF)
    found = assign.nearest(points, centroids).long()
    if not ((found >= 0) & (found < k)).all():
        return "is wrong: it names centroids that there are not"
    plain = assign_plain.nearest(points, centroids)
    chosen, nearest = ((points.double() - centroids[ids].double()).norm(dim=1) for ids in (found, plain))
    return _differs("distances", (chosen - nearest).clamp(min=0), 2 * _ROUNDING + (dim * 2.0**-22) ** 0.5)


def check_segment(device: torch.device, width: int, dtype: torch.dtype | None) -> str | None:
    """`segment`'s sums and counts against the plain ones in float64, with a cluster of half the points and empty ones.

    A sum of Z numbers in float32 is off by Z 2^-24 of the sum of their absolute values.

    dtype: of the points; None for float32.
    """
    generator = torch.Generator().manual_seed(_SEED)
    n, k = 773, 48
    values = (1 + torch.rand(n, width, generator=generator)).to(device, dtype or torch.float32)
    clusters = torch.randint(3, k, (n,), generator=generator)
    clusters[torch.rand(n, generator=generator) < 0.5] = 1
    clusters = clusters.int().to(device)
    sums, counts = segment.segment_sums(values, clusters, k)
    exact = torch.zeros(k, width, dtype=torch.float64, device=device).index_add_(0, clusters, values.double())
    if not torch.equal(counts, segment_plain.segment_sums(values, clusters, k)[1]):
        return "is wrong: it counts other points in a cluster"
    return _differs("sums", (sums - exact).abs() / exact.clamp(min=1), float(counts.max()) * 2.0**-24)


def check_normalise(device: torch.device) -> str | None:
    """`normalise` against its plain twin; the last unit may differ."""
    generator = torch.Generator().manual_seed(_SEED)
    images = torch.randint(0, 256, (3, 19, 23, 3), generator=generator, dtype=torch.uint8).to(device)
    options = {"mean": _MEAN, "std": _STD, "dtype": encoder_dtype(device)}
    found = normalise.normalise(images, **options).double()
    plain = normalise_plain.normalise(images, **options).double()
    return _differs("values", (found - plain).abs() / plain.abs().clamp(min=0.01), torch.finfo(options["dtype"]).eps)


def check_photometric(device: torch.device) -> str | None:
    """`photometric` against its plain twin, whose bytes it makes."""
    generator = torch.Generator().manual_seed(_SEED)
    images = torch.randint(0, 256, (2, 23, 23, 3), generator=generator, dtype=torch.uint8)
    images = (images // 4 + torch.arange(23, dtype=torch.uint8)[:, None] * 8).contiguous()
    jitter = [Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION, Op.HUE]
    ops = torch.tensor([[*jitter, Op.NONE], [*jitter[::-1], Op.GRAYSCALE]], dtype=torch.int32)
    factors = 0.6 + 0.8 * torch.rand(ops.shape, generator=generator)
    factors[ops == Op.HUE] -= 1.0
    factors[ops == Op.HUE] *= 0.5
    slots = ops, factors, torch.tensor([1.7, 0.0])
    found = photometric.photometric(images.to(device), *(slot.to(device) for slot in slots)).cpu()
    wrong = int((found != photometric_plain.photometric(images, *slots)).sum())
    # A rounding that lies between two bytes is no fault.
    return f"is wrong: {wrong} of {found.numel()} bytes differ" if wrong > found.numel() // 1000 else None


def check_batch_norm(device: torch.device) -> str | None:
    """`batch_norm`'s results and gradients against the plain ones in float64, with and without a residual.

    A gradient is rounded once or twice, to the type of the activations; of sums over the rows, every term is. Where
    ReLU starts, rounding decides what it lets through: these gradients are left out.
    """
    generator, dtype = torch.Generator().manual_seed(_SEED), encoder_dtype(device)
    shape = 3, batch_norm.MAPPED + batch_norm.SUMMED, 9, 13

    def values() -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        return (noise + 0.5).to(device, dtype).to(memory_format=torch.channels_last)

    x, residual = values(), values()
    parameters = [(0.5 + torch.rand(shape[1], generator=generator)).to(device) for _ in range(2)]
    upstream = [(1 + 0.5 * (x + noise)).to(dtype) for noise in (values(), values())]

    def run(function, of: torch.dtype | None, added: torch.Tensor | None, relu: bool = True) -> list[torch.Tensor]:
        """Result, gradients, running statistics."""
        tensors = [x, *parameters] if added is None else [x, *parameters, added]
        leaves = [tensor.to(of or tensor.dtype, copy=True).requires_grad_() for tensor in tensors]
        running = [torch.ones_like(leaves[1], requires_grad=False) for _ in range(2)]
        ys = function(*leaves[:3], *running, residual=None if added is None else leaves[3], relu=relu, fork=True)
        gradients = torch.autograd.grad(ys, leaves, [flow.to(of or dtype) for flow in upstream])
        return [tensor.detach().double() for tensor in (ys[0], *gradients, *running)]

    def compare(added: torch.Tensor | None) -> str | None:
        clear = run(batch_norm_plain.batch_norm_act, torch.float64, added, relu=False)[0].abs() > 1e-4
        found, exact = (
            run(batch_norm.batch_norm_act, None, added),
            run(batch_norm_plain.batch_norm_act, torch.float64, added),
        )
        names = "results", "gradients", "gradients of weights", "gradients of biases", "gradients of the residual"
        faults = []
        for name, ours, theirs in zip(names, found, exact, strict=False):
            whole = ours.ndim == 4
            rounding = 4 * torch.finfo(dtype).eps * (1 if whole else x[:, 0].numel()) + 1e-5
            error = (ours - theirs).abs() / (2 + theirs.abs() * whole)
            faults.append(_differs(name, error * clear if whole else error, rounding))
        moved = zip(found[-2:], exact[-2:], strict=True)
        faults += [_differs("running statistics", (ours - theirs).abs(), 1e-5) for ours, theirs in moved]
        return _first(faults)

    with torch.enable_grad():
        return _first(compare(added) for added in (None, residual))


def check_max_pool(device: torch.device) -> str | None:
    """`max_pool` with a ResNet's window against PyTorch's own: the same values; gradients are rounded once, with it in
    float64. Where ReLU was 0 the window's first value takes the gradient.
    """
    generator, dtype, window = torch.Generator().manual_seed(_SEED), encoder_dtype(device), (3, 2, 1)
    x = torch.randn(2, max_pool.COLUMNS + 16, 21, 23, generator=generator).relu()
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    with torch.enable_grad():
        leaf, exact = x.requires_grad_(), x.detach().double().requires_grad_()
        found, expected = max_pool.max_pool(leaf, *window), F.max_pool2d(exact, *window)
        upstream = torch.randn(found.shape, generator=generator).to(device, dtype)
        (gradient,) = torch.autograd.grad(found, leaf, upstream)
        (of_exact,) = torch.autograd.grad(expected, exact, upstream.double())
    return _first(
        [
            _differs("values", (found.double() - expected).detach().abs(), 0.0),
            _differs("gradients", (gradient.double() - of_exact).abs() / (2 + of_exact.abs()), torch.finfo(dtype).eps),
        ]
    )


def check_stem(device: torch.device) -> str | None:
    """`stem` and its filters' gradient against PyTorch's convolution in float64. Entries are -1, 0 and 1, and sums so
    small that half precision holds them: whatever the order of the sums, nothing is rounded.
    """
    generator, dtype = torch.Generator().manual_seed(_SEED), encoder_dtype(device)

    def whole(*shape: int) -> torch.Tensor:
        numbers = torch.randint(-1, 2, shape, generator=generator).to(device, dtype)
        return numbers.contiguous(memory_format=torch.channels_last)

    x, weight = whole(3, 3, 61, 38), whole(64, 3, 7, 7).float()
    with torch.enable_grad():
        leaf, exact = weight.requires_grad_(), weight.detach().double().requires_grad_()
        found, expected = stem.stem(x, leaf), F.conv2d(x.double(), exact, stride=2, padding=3)
        upstream = whole(*expected.shape)
        (gradient,) = torch.autograd.grad(found, leaf, upstream)
        (of_exact,) = torch.autograd.grad(expected, exact, upstream.double())
    pairs = {"values": (found.detach(), expected.detach()), "gradients": (gradient, of_exact)}
    return _first(_differs(name, (ours - theirs).abs(), 0.0) for name, (ours, theirs) in pairs.items())


def _differs(what: str, error: torch.Tensor, tolerance: float) -> str | None:
    """What to say of errors that are larger than rounding explains, or not finite."""
    wrong = int((~(error <= tolerance)).sum())
    if not wrong:
        return None
    return f"is wrong: {wrong} of {error.numel()} {what} differ by up to {float(error.max()):.2g}, not {tolerance:.2g}"

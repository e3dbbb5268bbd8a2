"""Batch norm, residual and ReLU in one, against PyTorch in float64.

A kernel may be off by what PyTorch is off in the same type, which rounds oftener, and by a little more.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from pcl_fast.kernels import batch_norm, batch_norm_kernels, batch_norm_plain
from pcl_fast.kernels.batch_norm import bytes_moved, divide

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter cuts bfloat16 off where it should be rounded. That is an error of the same sign each time, which
# sums do not lose as they lose rounding.
ROUNDED = DTYPES if DEVICE.type == "cuda" else DTYPES[:2]
EPS = 1e-5
both = pytest.mark.parametrize(
    "run", [batch_norm.batch_norm_act, batch_norm_plain.batch_norm_act], ids=["kernel", "plain"]
)


@pytest.fixture(autouse=True)
def few_lines_at_a_time(monkeypatch):
    """So that there are more of them than the second kernels take at once."""
    if DEVICE.type != "cuda":
        monkeypatch.setattr(batch_norm, "MERGED", {"PARTS": 4, "COLUMNS": 64})


class Problem:
    """Values that images of a batch and channels have in common, parameters, and random upstream gradients.

    fork: whether y goes to two consumers.
    """

    def __init__(self, shape, dtype, *, residual=True, relu=True, fork=False, scale=1.0, mean=0.0):
        n, channels, *_ = shape
        common = torch.randn(1, channels, 1, 1) + 0.3 * torch.randn(n, 1, *shape[2:])
        self.x = self._values(mean + scale * (torch.randn(shape) + common), dtype)
        self.residual = self._values(torch.randn(shape) + 0.5 * common, dtype) if residual else None
        self.weight, self.bias = torch.randn(2, channels, device=DEVICE)
        self.running = torch.randn(channels, device=DEVICE), torch.rand(channels, device=DEVICE) + 0.5
        self.upstream = [self._values(torch.randn(shape) + 0.1, dtype) for _ in range(1 + fork)]
        self.options = {"relu": relu, "fork": fork}

    @staticmethod
    def _values(tensor, dtype):
        return tensor.to(DEVICE, dtype).to(memory_format=torch.channels_last)

    def leaves(self, dtype=None):
        tensors = [self.x, self.weight, self.bias, *([] if self.residual is None else [self.residual])]
        return [tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]

    def run(self, run, **options) -> dict[str, torch.Tensor]:
        leaves, running = self.leaves(), [tensor.clone() for tensor in self.running]
        residual = leaves[3] if self.residual is not None else None
        y = run(*leaves[:3], *running, residual=residual, eps=EPS, **self.options, **options)
        return self._results(y if self.options["fork"] else (y,), leaves, running, self.upstream)

    def pytorch(self, dtype=None, training=True) -> dict[str, torch.Tensor]:
        leaves = self.leaves(dtype)
        running = [tensor.to(dtype or tensor.dtype, copy=True) for tensor in self.running]
        y = F.batch_norm(leaves[0], *running, *leaves[1:3], training, 0.1, EPS)
        y = y if self.residual is None else y + leaves[3]
        y = y.relu() if self.options["relu"] else y
        return self._results([y] * len(self.upstream), leaves, running, [flow.to(y.dtype) for flow in self.upstream])

    @staticmethod
    def _results(ys, leaves, running, upstream):
        gradients = torch.autograd.grad(ys, leaves, upstream)
        names = ("y", "dx", "d_weight", "d_bias", "d_residual")
        named = dict(zip(names, [ys[0].detach(), *gradients], strict=False))
        return named | {"running_mean": running[0], "running_var": running[1]}

    def assert_as_good_as_pytorch(self, found, training=True) -> None:
        exact, usual = self.pytorch(torch.float64, training), self.pytorch(training=training)
        x = self.x.double()
        ratio = x.mean((0, 2, 3)).abs() / (x.var((0, 2, 3), correction=0) + EPS).sqrt() if training else x.new_zeros(1)
        # The mean is rounded to float32, which shows where it is large beside the deviation. PyTorch sums in float64 on
        # a CPU.
        rounding = 8 * 2.0**-24 * (1 + float(ratio.max())) + 2.0**-24 * math.sqrt(self.x.numel())
        for name, value in found.items():
            assert torch.isfinite(value).all()
            error, usual_error = ((other.double() - exact[name]).abs().max() for other in (value, usual[name]))
            little = rounding + (torch.finfo(value.dtype).eps if value.dtype != torch.float32 else 0.0)
            assert error <= usual_error + little * (1 + exact[name].abs().max()), (name, float(error))


# Rows and channels below, at and across the edges of tiles and blocks: of 64 and 256 channels, and 4 to 512 rows.
SHAPES = [(2, 3, 1, 1), (3, 8, 5, 7), (3, 16, 16, 16), (5, 64, 8, 8), (2, 65, 9, 11), (2, 300, 3, 3)]
KINDS = [(False, False), (False, True), (True, False), (True, True)]


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "kind"), zip(SHAPES, itertools.cycle(KINDS)), ids=str)
def test_training(run, dtype, shape, kind):
    residual, relu = kind
    problem = Problem(shape, dtype, residual=residual, relu=relu)
    problem.assert_as_good_as_pytorch(problem.run(run))


@both
@pytest.mark.parametrize("relu", [True, False])
def test_two_consumers(run, relu):
    """Their gradients meet in the backward pass, and are rounded once added, as PyTorch does."""
    for dtype in ROUNDED:
        problem = Problem((3, 72, 6, 7), dtype, relu=relu, fork=True)
        problem.assert_as_good_as_pytorch(problem.run(run))
    without = Problem((3, 9, 2, 2), torch.float32, residual=False, fork=True)
    without.assert_as_good_as_pytorch(without.run(run))


@both
def test_one_of_two_consumers(run):
    """The other has no gradient to give."""
    problem = Problem((3, 9, 4, 5), torch.float32)
    expected = problem.run(run)
    problem.options["fork"] = True
    for consumer in (0, 1):
        leaves, running = problem.leaves(), [tensor.clone() for tensor in problem.running]
        ys = run(*leaves[:3], *running, residual=leaves[3], eps=EPS, fork=True)
        assert ys[0].data_ptr() == ys[1].data_ptr()
        found = torch.autograd.grad(ys[consumer], leaves, problem.upstream[0])
        for ours, name in zip(found, ("dx", "d_weight", "d_bias", "d_residual"), strict=True):
            assert torch.equal(ours, expected[name])


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_running_statistics(run, dtype):
    """In evaluation, of one row too."""
    for shape, kind in zip([(1, 5, 1, 1), (4, 65, 5, 7)], KINDS[1::2], strict=True):
        problem = Problem(shape, dtype, residual=kind[0], relu=kind[1])
        before = [tensor.clone() for tensor in problem.running]
        found = problem.run(run, training=False)
        problem.assert_as_good_as_pytorch(found, training=False)
        assert torch.equal(found["running_mean"], before[0])
        assert torch.equal(found["running_var"], before[1])


@both
@pytest.mark.parametrize(("dtype", "mean", "scale"), [(torch.float32, 1e4, 0.1), (torch.float16, 3e3, 2.0)], ids=str)
def test_a_huge_mean_does_not_swallow_the_variance(run, dtype, mean, scale):
    """Sums of squares would: of 1e8 float32 keeps steps of 8, for a variance of 0.01."""
    # Without ReLU: what is 0 but for rounding may lie on either side of it.
    problem = Problem((5, 65, 7, 8), dtype, relu=False, mean=mean, scale=scale)
    found = problem.run(run)
    problem.assert_as_good_as_pytorch(found)
    variance = problem.x.double().var((0, 2, 3))
    expected = problem.running[1].double() * 0.9 + 0.1 * variance
    torch.testing.assert_close(found["running_var"].double(), expected, rtol=1e-5, atol=1e-4 * float(variance.mean()))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channels(run, dtype):
    """Without a deviation bn(x) is the bias, and what x does to it is up to eps."""
    problem = Problem((4, 9, 5, 5), dtype, residual=False, relu=False)
    problem.x[:, ::2] = problem.x[:1, ::2, :1, :1]
    found = problem.run(run)
    problem.assert_as_good_as_pytorch(found)
    bias = problem.bias[::2].to(dtype)[None, :, None, None]
    # The mean may be off by some last bits.
    rounding = 4 * 2.0**-24 / EPS**0.5 * problem.x.abs().max() * problem.weight.abs().max()
    assert (found["y"][:, ::2] - bias).abs().max() <= rounding + torch.finfo(dtype).eps * bias.abs().max()


@both
def test_half_precision_near_its_end(run):
    """Values up to 65504, whose squares and sums are far beyond it."""
    problem = Problem((4, 9, 8, 8), torch.float16, scale=1e4)
    problem.x.clamp_(-65504.0, 65504.0)
    problem.x[0, :, 0, 0] = 65504.0
    problem.assert_as_good_as_pytorch(problem.run(run))
    # What does not fit is infinite, as in PyTorch.
    problem.weight.fill_(65504.0)
    y, exact = problem.run(run)["y"].double(), problem.pytorch(torch.float64)["y"]
    assert y[exact > 65536].isinf().all()
    assert y[exact < 65000].isfinite().all()


@both
def test_what_is_not_a_number_stays_so(run):
    problem = Problem((4, 9, 3, 3), torch.float32, fork=False)
    problem.x[1, 2, 1, 1] = torch.nan
    found = problem.run(run)
    for name in ("y", "dx"):
        assert found[name][:, 2].isnan().all()
        assert found[name][:, :2].isfinite().all()
    assert found["running_mean"].isnan().nonzero().flatten().tolist() == [2]


@both
def test_running_statistics_are_pytorch_s(run):
    problem = Problem((3, 20, 4, 4), torch.float32, residual=False)
    running = [tensor.clone() for tensor in problem.running]
    norm = torch.nn.BatchNorm2d(20, momentum=0.3).to(DEVICE)
    norm.running_mean.copy_(running[0])
    norm.running_var.copy_(running[1])
    for shift in range(3):
        run(problem.x + shift, problem.weight, problem.bias, *running, momentum=0.3)
        norm(problem.x + shift)
    torch.testing.assert_close(running[0], norm.running_mean)
    torch.testing.assert_close(running[1], norm.running_var)
    without = run(problem.x, problem.weight, problem.bias, None, None)
    assert torch.equal(without, run(problem.x, problem.weight, problem.bias, *running))


# --- parts of a batch, and ranks ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("splits", [2, 3])
def test_every_part_is_normalised_by_itself(run, splits):
    problem = Problem((6, 66, 3, 7), torch.float32)
    found = problem.run(run, splits=splits)
    leaves = problem.leaves()
    rows = [tensor.chunk(splits) for tensor in (leaves[0], leaves[3], problem.upstream[0])]
    running = [[tensor.clone() for tensor in problem.running] for _ in range(splits)]
    parts = [
        run(part, *leaves[1:3], *own, residual=residual) for part, residual, own in zip(*rows[:2], running, strict=True)
    ]
    assert torch.equal(found["y"], torch.cat(parts))
    gradients = torch.autograd.grad(parts, leaves, rows[2])
    assert torch.equal(found["dx"], gradients[0])
    assert torch.equal(found["d_residual"], gradients[3])
    for name, gradient in zip(("d_weight", "d_bias"), gradients[1:3], strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-4)
    for i, name in enumerate(("running_mean", "running_var")):
        torch.testing.assert_close(found[name], torch.stack([own[i] for own in running]).mean(0))


class Twins:
    """As if another rank had the very same rows."""

    def gather(self, line):
        return torch.cat([line, line])

    def add_up(self, sums):
        return 2 * sums


@both
def test_ranks_are_one_batch(run):
    problem = Problem((3, 20, 4, 5), torch.float32)
    found = problem.run(run, exchange=Twins())
    whole = Problem((6, 20, 4, 5), torch.float32)
    for name in ("x", "residual"):
        setattr(whole, name, torch.cat([getattr(problem, name)] * 2))
    whole.upstream = [torch.cat(problem.upstream * 2)]
    whole.weight, whole.bias, whole.running = problem.weight, problem.bias, problem.running
    expected = whole.run(run)
    for name in ("y", "dx", "d_residual"):
        torch.testing.assert_close(torch.cat([found[name]] * 2), expected[name])
    for name in ("d_weight", "d_bias"):
        torch.testing.assert_close(2 * found[name], expected[name])
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("operations", [batch_norm.OPERATIONS, batch_norm_plain.OPERATIONS], ids=["kernel", "plain"])
def test_ranks_of_different_sizes(operations):
    """One row on one of them."""
    x = (torch.randn(9, 20, 1, 1, device=DEVICE) * 0.1 + 1e3).to(memory_format=torch.channels_last)
    lines = [operations.statistics(part, None, None, None, 0.0, 1) for part in x.split([1, 5, 3])]
    running = torch.zeros(20, device=DEVICE), torch.zeros(20, device=DEVICE)
    merged = operations.merge(torch.cat(lines), *running, None, 1.0)
    assert merged[0, 40] == 9
    for found, expected in (
        (merged[0, :20], x.double().mean((0, 2, 3))),
        (running[0], x.double().mean((0, 2, 3))),
        (merged[0, 20:40], x.double().var((0, 2, 3), correction=0)),
        (running[1], x.double().var((0, 2, 3))),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=3e-3, atol=0)


@both
@pytest.mark.parametrize("options", [{}, {"splits": 2}, {"exchange": Twins()}], ids=["whole", "splits", "ranks"])
def test_batches_are_counted_in_training_alone(run, options):
    problem, batches = Problem((4, 70, 2, 2), torch.float32), torch.full((), 2**40, dtype=torch.int64, device=DEVICE)
    arguments = problem.x, problem.weight, problem.bias, *problem.running
    run(*arguments, **options, batches=batches)
    run(*arguments, **options, batches=batches)
    run(*arguments, training=False, batches=batches)
    assert batches == 2**40 + 2


# --- as an operation ------------------------------------------------------------------------------------------------


def test_the_plain_version_s_gradients_are_right():
    """By finite differences, in float64."""
    x, residual = torch.randn(2, 3, 4, 2, 2).double().requires_grad_().unbind()
    weight, bias = torch.rand(2, 4).double().requires_grad_().unbind()
    for training, splits in ((True, 1), (True, 3), (False, 1)):
        running = [torch.rand(4).double() for _ in range(2)]

        def function(*leaves, training=training, splits=splits, running=running):
            own = [tensor.clone() for tensor in running]
            options = {"training": training, "splits": splits, "fork": True}
            return batch_norm_plain.batch_norm_act(*leaves[:3], *own, residual=leaves[3], **options)

        assert torch.autograd.gradcheck(function, (x, weight, bias, residual), fast_mode=True)


def test_same_bits_every_time():
    problem = Problem((5, 72, 6, 7), torch.float16, fork=True)
    first, second = (problem.run(batch_norm.batch_norm_act) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@both
def test_a_bit_a_value_is_kept_and_nothing_without_gradients(run):
    problem, kept = Problem((2, 64, 4, 4), torch.float16), []
    own = {tensor.data_ptr() for tensor in (problem.x, problem.weight, problem.bias)}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        leaves = [tensor.requires_grad_() for tensor in (problem.x, problem.weight, problem.bias)]
        run(*leaves, None, None, residual=problem.residual)
        sizes = [tensor.nbytes for tensor in kept if tensor.dtype != torch.float32]
        bits = problem.x.numel() // 8 if run is batch_norm.batch_norm_act else problem.x.numel()
        assert sizes == [bits]
        kept.clear()
        run(*leaves, None, None)
        assert all(tensor.dtype == torch.float32 for tensor in kept)
        kept.clear()
        with torch.no_grad():
            run(*leaves, None, None, residual=problem.residual)
        assert not kept


@both
def test_other_memory_formats(run):
    """Are copied: of x, of the residual, and of the gradient that comes back, expanded as by a mean over pixels."""
    problem = Problem((2, 9, 4, 5), torch.float32)
    problem.upstream = [problem.upstream[0][:, :, :1, :1].expand(2, 9, 4, 5)]
    expected = problem.run(run)
    problem.x, problem.residual = problem.x.contiguous(), problem.residual.contiguous()
    found = problem.run(run)
    assert found["y"].is_contiguous(memory_format=torch.channels_last)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3)}, r"x must be floating-point \[N, C, H, W\]"),
        ({"x": torch.zeros(4, 3, 2, 2, dtype=torch.int32)}, "x must be floating-point"),
        ({"weight": torch.ones(4)}, r"weight must be \[3\]"),
        ({"residual": torch.zeros(4, 3, 2, 1)}, "residual must be like x"),
        ({"residual": torch.zeros(4, 3, 2, 2).half()}, "residual must be like x"),
        ({"running_mean": None}, "go together"),
        ({"running_mean": None, "running_var": None, "training": False}, "only training=True"),
        ({"x": torch.zeros(1, 3, 1, 1)}, "at least two values of each channel"),
        ({"x": torch.zeros(0, 3, 1, 1)}, "at least two values of each channel"),
        ({"x": torch.zeros(4, 3, 1, 1), "splits": 4}, "at least two values of each channel in a part"),
        ({"splits": 3}, "a batch of 4 does not divide into 3 parts"),
        ({"splits": 2, "exchange": Twins()}, "not both"),
    ],
)
def test_wrong_arguments(run, change, message):
    arguments = {
        "x": torch.zeros(4, 3, 2, 2), "weight": torch.ones(3), "bias": torch.zeros(3),
        "running_mean": torch.zeros(3), "running_var": torch.ones(3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        run(**arguments | change)


def test_operators_are_sound():
    """Their schema, what they change and their fake tensors are right, and torch.compile can trace them."""
    problem, operators = Problem((4, 9, 2, 2), torch.float16), torch.ops.pcl_fast
    parameters = problem.weight, problem.bias
    batches = torch.zeros((), dtype=torch.int64, device=DEVICE)
    first = (problem.x, *problem.running, batches, 0.1, 2)
    torch.library.opcheck(operators.batch_norm_statistics.default, first)
    lines = operators.batch_norm_statistics(*first)
    torch.library.opcheck(operators.batch_norm_merge.default, (lines, *problem.running, batches, 0.1))
    for residual in (None, problem.residual):
        rest = (*parameters, lines, True, EPS)
        forward = (problem.x, residual, *rest, residual is not None)
        torch.library.opcheck(operators.batch_norm_apply.default, forward)
        kept = operators.batch_norm_apply(*forward)[1] if residual is not None else None
        backward = (problem.upstream[0], None, problem.x, kept, *rest)
        torch.library.opcheck(operators.batch_norm_sums.default, backward)
    sums, _, _, g = operators.batch_norm_sums(*backward)
    last = (g, problem.x, *parameters, lines, sums, False, True, EPS)
    torch.library.opcheck(operators.batch_norm_differentiate.default, last)


@pytest.mark.slow
def test_under_torch_compile():
    problem = Problem((4, 9, 3, 3), torch.float32, fork=True)
    expected = problem.run(batch_norm.batch_norm_act)
    torch.compiler.reset()
    compiled = torch.compile(batch_norm.batch_norm_act, fullgraph=True, backend="aot_eager")
    found = problem.run(compiled)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU has graphs")
def test_in_a_graph():
    problem = Problem((5, 72, 6, 7), torch.float16, fork=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.run(batch_norm.batch_norm_act)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run(batch_norm.batch_norm_act)
    for _ in range(2):
        problem.x.copy_(torch.randn_like(problem.x))
        graph.replay()
        for name, value in problem.run(batch_norm.batch_norm_act).items():
            assert torch.equal(captured[name], value), name


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """Bytes that every kernel loads and stores in the interpreter."""
    from triton.runtime import interpreter

    counts, running = Counter(), [""]
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, ptrs, mask, *rest):
        found = load(self, ptrs, mask, *rest)
        counts[running[0]] += int(mask.data.sum()) * found.data.dtype.itemsize
        return found

    def counted_store(self, ptrs, value, mask, *rest):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        counts[running[0]] += int(mask.data.sum()) * size
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    for name in vars(batch_norm_kernels):
        kernel = getattr(batch_norm, name, None)
        if hasattr(kernel, "run"):
            monkeypatch.setattr(batch_norm, name, Named(name, kernel, running))
    return counts


class Named:
    """A kernel that says that it is running."""

    def __init__(self, name, kernel, running):
        self.name, self.kernel, self.running = name, kernel, running

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.running[0] = self.name
            self.kernel[grid](*args, **options)

        return launch


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only the interpreter can count; resources.py counts compiled code")
@pytest.mark.parametrize("kind", [(False, False, False), (False, True, False), (True, True, False), (True, True, True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_bytes_moved_are_the_formula_s(kind, dtype, counted):
    residual, relu, fork = kind
    shape = (3, 72, 6, 7)
    problem = Problem(shape, dtype, residual=residual, relu=relu, fork=fork)
    problem.run(batch_norm.batch_norm_act)
    sizes = {"rows": 3 * 6 * 7, "channels": 72, "itemsize": dtype.itemsize, "multiprocessors": 6}
    assert counted == bytes_moved(**sizes, residual=residual, relu=relu, fork=fork)
    counted.clear()
    with torch.no_grad():
        problem.options["fork"] = False
        arguments = problem.x, problem.weight, problem.bias, *problem.running
        batch_norm.batch_norm_act(*arguments, residual=problem.residual, relu=relu)
    assert counted == bytes_moved(**sizes, residual=residual, relu=relu, gradient=False)


def resnet50() -> list[tuple[int, int, bool, bool, bool]]:
    """Of each batch norm: pixels, channels, whether there is a ReLU, a residual, and another block after it."""
    layers = [(112 * 112, 64, True, False, False)]
    for side, width, blocks in ((56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3)):
        for block in range(blocks):
            pixels, wider = side * side, 4 if block == 0 and width > 64 else 1
            layers += [(wider * pixels, width, True, False, False), (pixels, width, True, False, False)]
            layers += [(pixels, 4 * width, False, False, False)] * (block == 0)
            layers.append((pixels, 4 * width, True, True, (side, block) != (7, 2)))
    return layers


def test_of_a_resnet50():
    """MB an image and step in float16, on a V100 and in batches of 64; in eager mode there are 476."""
    assert sum(pixels * channels for pixels, channels, *_ in resnet50()) == pytest.approx(11.11e6, rel=1e-3)

    def megabytes(forks: bool, **options) -> float:
        moved = [
            bytes_moved(
                64 * pixels,
                channels,
                2,
                relu=relu,
                residual=residual,
                fork=forks and fork,
                multiprocessors=80,
                **options,
            )
            for pixels, channels, relu, residual, fork in resnet50()
        ]
        return sum(sum(layer.values()) for layer in moved) / 64 / 1e6

    convolutions, pooling = 44 + 87, 6
    # Where autograd adds two gradients it reads both and writes the sum: before each block, the first one included.
    added = 6 * sum(pixels * channels for pixels, channels, *_, fork in resnet50() if fork) / 1e6
    first = 6 * 56 * 56 * 64 / 1e6
    assert convolutions + pooling + megabytes(False) + added + first == pytest.approx(373, rel=0.01)
    assert convolutions + pooling + megabytes(True) + first == pytest.approx(353, rel=0.01)
    assert megabytes(False, gradient=False) == pytest.approx(123 - 44, rel=0.01)


def test_programs_share_the_rows_alike():
    for rows, channels, columns in itertools.product((1, 63, 3136, 802816), (3, 64, 300, 2048), (64, 256)):
        launch = divide(rows, channels, columns, 2, 80)
        assert (launch.parts - 1) * launch.part_rows < rows <= launch.parts * launch.part_rows
        assert launch.part_rows % (batch_norm.UNROLL * launch.rows) == 0
        assert launch.blocks * launch.columns >= channels
        assert launch.parts * launch.blocks <= max(launch.blocks, 80 * batch_norm.PROGRAMS)
    assert divide(802816, 64, 64, 2, 80).parts >= 0.9 * 80 * batch_norm.PROGRAMS

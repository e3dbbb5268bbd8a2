"""The kernels' loss and gradient against float64; plain PyTorch's own error is the measure of what is exact enough.

They run in Triton's interpreter, or on a GPU if there is one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pcl_fast.kernels import contrast as kernels
from pcl_fast.kernels import contrast_plain, sampling_plain
from pcl_fast.kernels.contrast import PrototypeBank, contrast
from pcl_fast.kernels.launch import divide, multiprocessors, tile_for
from pcl_fast.kernels.tiles import LOWEST

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMAGES = 400


class Problem:
    """Random inputs of the kinds that training meets.

    kind: "random"; "correlated" features; "confident", with positives close to their queries and negatives far away;
    "collapsed", with all cosines nearly the same.
    """

    def __init__(self, rows, d, negatives, queue, ks, dtype=torch.float32, kind="random", seed=0, temperature=0.1):
        self.generator = torch.Generator().manual_seed(seed)
        self.temperature, self.negatives, self.seed = temperature, negatives, seed
        self.common = {"random": 0.0, "correlated": 2.0, "confident": 0.3, "collapsed": 30.0}[kind] * self.normal(1, d)
        self.query = self.unit(rows, d, dtype)
        self.key = self.unit(rows, d, dtype)
        self.queue = self.unit(queue, d, dtype) if queue else None
        self.index = torch.randint(0, IMAGES, (rows,), generator=self.generator).to(DEVICE)
        self.sets = [
            PrototypeBank(
                self.unit(k, d, dtype),
                (0.05 + 0.2 * torch.rand(k, generator=self.generator)).to(DEVICE),
                torch.randint(0, k, (IMAGES,), generator=self.generator, dtype=torch.int32).to(DEVICE),
            )
            for k in ks
        ]
        if kind == "confident":
            self.make_confident()
        self.upstream = self.normal(len(ks) + bool(queue), rows).float().to(DEVICE)

    def make_confident(self) -> None:
        """Make positives the query itself, up to a little noise, and negatives its opposite."""
        noisy = self.query.double().cpu() + 0.05 * self.normal(*self.query.shape)
        self.key = F.normalize(noisy, dim=1).to(self.key)
        for centroids, _, assignment in self.sets:
            centroids.copy_(-self.query[torch.arange(len(centroids)) % len(self.query)])
            centroids[assignment[self.index].long()] = self.key
        if self.queue is not None:
            self.queue.copy_(-self.query[torch.arange(len(self.queue)) % len(self.query)])

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def unit(self, rows: int, d: int, dtype: torch.dtype) -> torch.Tensor:
        return F.normalize(self.normal(rows, d) + self.common, dim=1).to(DEVICE, dtype)

    def fused(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return loss, correct and gradient of the kernels."""
        query = self.query.clone().requires_grad_()
        sets, index = self.sets, self.index if self.sets else None
        key = None if self.queue is None else self.key
        _, loss, correct = contrast(query, key, self.queue, self.temperature, sets, index, self.negatives, self.seed)
        return loss.detach(), correct, torch.autograd.grad(loss, query, self.upstream)[0]

    def plain(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the same from plain PyTorch, with inputs converted to dtype if one is given."""

        def cast(x: torch.Tensor) -> torch.Tensor:
            return x if dtype is None else x.to(dtype)

        query = cast(self.query).clone().requires_grad_()
        results = []
        if self.queue is not None:
            weight = 1 / self.temperature
            results.append(contrast_plain.contrast(query, cast(self.key), weight, cast(self.queue), weight))
        for m, (centroids, concentration, assignment) in enumerate(self.sets):
            positives = assignment[self.index].long()
            ids, there = sampling_plain.negative_columns(len(centroids), self.negatives, positives, self.seed + m)
            columns, weight = torch.cat([positives, ids]), 1 / cast(concentration)
            hidden = positives[:, None] == positives
            own, bank = cast(centroids[positives]), cast(centroids[columns])
            results.append(contrast_plain.contrast(query, own, weight[positives], bank, weight[columns], hidden, there))
        loss = torch.stack([loss for loss, _ in results])
        gradient = torch.autograd.grad(loss, query, self.upstream.to(loss.dtype))[0]
        return loss.detach(), torch.stack([correct for _, correct in results]), gradient

    def largest_score(self) -> float:
        least = min([self.temperature, *(float(bank.concentration.min()) for bank in self.sets)])
        return 1 / least

    def largest_term(self) -> float:
        """Return the largest entry of w c."""
        terms = [bank.centroids.abs().amax(1) / bank.concentration for bank in self.sets]
        terms += [] if self.queue is None else [self.queue.abs().amax(1) / self.temperature]
        return float(torch.cat(terms).max())


def skip_what_the_gpu_lacks(d: int, dtype: torch.dtype) -> None:
    if d > kernels.widest(DEVICE) or not kernels.takes(dtype, DEVICE):
        pytest.skip("not on this GPU")


def row_errors(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return the largest error of each row."""
    return (found.double() - exact).abs().amax(-1)


def check(problem: Problem) -> None:
    """Check that every row is as near to float64 as PyTorch's float32, up to some units in the last place.

    A score of size s has an absolute error of some s * 1e-7, which is the relative error of its exponential, and so of
    losses and gradients.
    """
    loss, correct, gradient = problem.fused()
    plain_loss, _, plain_gradient = problem.plain()
    exact_loss, exact_correct, exact_gradient = problem.plain(torch.float64)
    assert loss.dtype == torch.float32
    assert gradient.dtype == problem.query.dtype
    unit = 2.4e-7 * problem.largest_score()
    margin = unit * exact_loss.abs().clamp(max=1)
    assert ((loss - exact_loss).abs() <= (plain_loss - exact_loss).abs() + margin).all()
    margin = unit * exact_gradient.abs().amax(-1) + torch.finfo(gradient.dtype).smallest_normal
    operand = problem.query.dtype if problem.queue is None else problem.queue.dtype
    if operand != torch.float32:
        # The exponentials are rounded before they are multiplied. The error is relative to the terms of the gradient,
        # sigmoid(z) w c; where these cancel, it is larger relative to what is left.
        terms = (problem.upstream.abs() * (1 - torch.exp(-exact_loss))).sum(0)
        margin += torch.finfo(operand).eps * terms * problem.largest_term()
    assert (row_errors(gradient, exact_gradient) <= row_errors(plain_gradient, exact_gradient) + margin).all()
    # Where positive and best negative differ by less than rounding, either answer is right.
    assert (correct == exact_correct).float().mean() > 0.99


SHAPES = [
    # rows, d, negatives, queue, prototypes of each set
    (1, 8, 3, 1, (5,)),
    (3, 24, 30, 33, (40, 70)),
    (63, 40, 100, 128, (300,)),
    (64, 128, 129, 127, (500, 200)),
    (65, 200, None, 129, (150,)),
    (16, 512, 40, 70, (90,)),
    (2, 128, 1200, 1600, (2000,)),  # several tiles in a part
    (20, 16, 200, None, (10, 230)),  # fewer prototypes than rows; more negatives than are free
    (5, 16, None, 257, ()),
    (4, 32, 10, 20, (30, 40, 50, 60, 70)),  # more banks than a launch has slots
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_pytorch(shape, dtype):
    skip_what_the_gpu_lacks(shape[1], dtype)
    check(Problem(*shape, dtype=dtype, seed=len(str(shape))))


@pytest.mark.slow
def test_many_rows():
    check(Problem(256, 16, 20, 30, (60,), dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["correlated", "confident", "collapsed"])
@pytest.mark.parametrize("seed", [1, 2])
def test_as_exact_on_hard_features(kind, dtype, seed):
    skip_what_the_gpu_lacks(64, dtype)
    check(Problem(9, 64, 150, 140, (180,), dtype=dtype, kind=kind, seed=seed, temperature=0.05))


def test_confident_rows_keep_their_gradient():
    """Losses are around e^-28, where 1 - softmax is 0 in float32."""
    problem = Problem(9, 64, 150, 140, (180,), kind="confident", temperature=0.03)
    loss, _, gradient = problem.fused()
    _, _, exact = problem.plain(torch.float64)
    assert 0 < loss[0].max() < 1e-9
    assert (row_errors(gradient, exact) < 1e-5 * exact.abs().amax(1)).all()


def test_fp16_keeps_a_long_tail():
    """One negative has the exponential e^18, the others 1. Unless scaled, their shares are below half of fp16's
    smallest number.
    """
    problem = Problem(1, 16, None, 30, (), dtype=torch.float16, temperature=1 / 18)
    problem.query.zero_()[0, 0] = 1
    problem.key.copy_(problem.query)
    problem.queue.zero_()[:, 1] = 1
    problem.queue[7, 0], problem.queue[7, 1] = 1, 0
    problem.upstream.fill_(65536)  # as loss scaling does, so that the gradient is not rounded to 0
    _, _, gradient = problem.fused()
    _, _, exact = problem.plain(torch.float64)
    torch.testing.assert_close(gradient[0, 1].double(), exact[0, 1], rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_concentrations_of_any_size(dtype):
    skip_what_the_gpu_lacks(16, dtype)
    problem = Problem(6, 16, 50, 40, (80,), dtype=dtype)
    problem.sets[0].concentration.copy_(torch.logspace(-4, 4, 80))
    check(problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 1e4, 1e10])
def test_hidden_columns_add_nothing_with_small_weights(dtype, temperature, monkeypatch):
    """All rows have the only prototype, so that a tile is hidden whole before any score was seen. A hidden score that
    lay above the maximum of no scores would count as an exponential of 1.
    """
    skip_what_the_gpu_lacks(16, dtype)
    problem = Problem(5, 16, None, None, (1,), dtype=dtype)
    problem.sets[0].concentration.fill_(temperature)
    states, launch = [], kernels._stream
    monkeypatch.setattr(kernels, "_stream", lambda *arguments: (launch(*arguments), states.append(arguments[-1])))
    loss, correct, gradient = problem.fused()
    for written in (states[0].sums, states[0].numerators, loss, gradient):
        assert (written == 0).all()
    assert (states[0].maxima == LOWEST.value).all()
    assert correct.all()


def test_types_may_be_mixed():
    """Queries are in half precision, one set's centroids in float32, and its assignment in int64; the sets then need
    separate launches.
    """
    skip_what_the_gpu_lacks(24, torch.bfloat16)
    problem = Problem(6, 24, 30, 50, (60, 70), dtype=torch.float16)
    first, second = problem.sets
    problem.sets[0] = PrototypeBank(first.centroids.float(), first.concentration.half(), first.assignment.long())
    problem.sets[1] = second._replace(centroids=second.centroids.bfloat16())
    check(problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "confident"])
def test_a_query_in_float32_against_banks_in_half_precision(dtype, kind):
    """This is the case in training: products are in half precision, and the gradient is never rounded to it."""
    skip_what_the_gpu_lacks(24, dtype)
    problem = Problem(6, 24, 30, 50, (60,), dtype=dtype, kind=kind)
    half, _, rounded_gradient = problem.fused()
    problem.query = problem.query.float()
    check(problem)
    loss, _, gradient = problem.fused()
    assert torch.equal(loss, half)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, rounded_gradient.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not torch.equal(gradient, rounded_gradient.float())
    # A change of the query below the banks' resolution changes nothing.
    problem.query = problem.query * (1 + torch.finfo(dtype).eps / 8)
    assert torch.equal(problem.fused()[0], half)


def test_inputs_need_not_be_contiguous():
    problem = Problem(6, 24, 30, 50, (60,))
    expected = problem.fused()
    problem.index = torch.stack([problem.index, torch.zeros_like(problem.index)], dim=1)[:, 0]
    problem.query, problem.key, problem.queue = (
        x.T.contiguous().T for x in (problem.query, problem.key, problem.queue)
    )
    for one, other in zip(problem.fused(), expected, strict=True):
        assert torch.equal(one, other)


def test_no_second_derivative_is_a_wrong_one():
    problem = Problem(3, 16, 10, 20, (30,))
    query = problem.query.clone().requires_grad_()
    mean, _, _ = contrast(query, problem.key, problem.queue, 0.1, problem.sets, problem.index, 10, 0)
    (gradient,) = torch.autograd.grad(mean, query, torch.ones_like(mean, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.slow
def test_far_rows_of_a_large_bank():
    """Rows lie beyond 2^31 entries of a bank. Pages of it that are never written take no memory on a CPU."""
    k, d = 16_900_000, 128
    centroids = torch.empty(k, d, dtype=torch.float16, device=DEVICE)
    assignment = torch.tensor([k - 1, k - 2, 5], dtype=torch.int32, device=DEVICE)
    problem = Problem(3, d, 4, None, (8,), dtype=torch.float16)
    problem.sets = [PrototypeBank(centroids, torch.full((k,), 0.1, device=DEVICE), assignment)]
    problem.index = torch.arange(3, device=DEVICE)
    ids, _ = sampling_plain.negative_columns(k, 4, assignment.long(), 0)
    used = torch.cat([ids, assignment.long()])
    assert (used * d > 2**31).sum() >= 2
    centroids[used] = problem.unit(len(used), d, torch.float16)
    check(problem)


def test_same_bits_every_time():
    problem = Problem(5, 32, 300, 500, (700, 400), dtype=torch.float16)
    for one, other in zip(problem.fused(), problem.fused(), strict=True):
        assert torch.equal(one, other)


def test_collapse_is_not_correct():
    problem = Problem(5, 48, 20, 30, (40,))
    for rows in (problem.query, problem.key, problem.queue, problem.sets[0].centroids):
        rows.copy_(problem.query[0].clone())
    problem.sets[0].concentration.fill_(0.1)
    assert not problem.fused()[1].any()


def test_nan_stays_in_its_row():
    problem = Problem(4, 16, 10, 20, (30,))
    problem.query[2, 3] = torch.nan
    loss, correct, gradient = problem.fused()
    assert loss[:, 2].isnan().all()
    assert gradient[2].isnan().all()
    assert not correct[:, 2].any()
    others = torch.tensor([0, 1, 3], device=DEVICE)
    assert loss[:, others].isfinite().all()
    assert gradient[others].isfinite().all()


def test_nan_temperature_is_not_hidden():
    problem = Problem(4, 16, None, 20, (30,))
    problem.sets[0].concentration[3] = torch.nan
    assert problem.fused()[0][1].isnan().sum() >= 3


@pytest.mark.parametrize("queue", [None, 20])
def test_upstream_into_mean_and_rows(queue):
    problem = Problem(7, 16, 10, queue, (30, 40))
    _, _, exact_rows = problem.plain(torch.float64)
    exact = {"rows": exact_rows}
    shares = torch.full_like(problem.upstream, 1 / (2 * 7))
    if queue:
        shares[0] = 1 / 7
    rows, problem.upstream = problem.upstream, 3 * shares
    exact["mean"] = problem.plain(torch.float64)[2]
    query = problem.query.clone().requires_grad_()
    key = None if queue is None else problem.key
    mean, loss, _ = contrast(query, key, problem.queue, 0.1, problem.sets, problem.index, 10, problem.seed)
    torch.testing.assert_close(mean, (loss * shares).sum())
    flows = {"rows": (loss * rows).sum(), "mean": 3 * mean, "both": (loss * rows).sum() + 3 * mean}
    exact["both"] = exact["rows"] + exact["mean"]
    for name, scalar in flows.items():
        found = torch.autograd.grad(scalar, query, retain_graph=True)[0]
        torch.testing.assert_close(found.double(), exact[name], rtol=1e-4, atol=1e-6)


def test_operators_are_sound():
    """Their schema and fake tensors are right, and torch.compile can trace them."""
    problem = Problem(3, 16, 10, 20, (30,))
    sets = [[field] for field in problem.sets[0]]
    seed = torch.tensor(3, device=DEVICE)
    forward = (problem.query, problem.key, problem.queue, 0.1, *sets, problem.index, None, 10)
    torch.library.opcheck(torch.ops.pcl_fast.contrast.default, (*forward, 3, None))
    torch.library.opcheck(torch.ops.pcl_fast.contrast.default, (*forward, 0, seed))
    mean, _, _, gradient = torch.ops.pcl_fast.contrast(*forward, 3, None)
    backward = (gradient, torch.ones_like(mean), None, True, torch.float16)
    torch.library.opcheck(torch.ops.pcl_fast.contrast_backward.default, backward)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU has graphs")
def test_graph_draws_afresh_at_every_replay():
    problem = Problem(8, 32, 50, 60, (400,))
    seed = torch.tensor(0, device=DEVICE)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        query = problem.query.clone().requires_grad_()
        arguments = problem.key, problem.queue, 0.1, problem.sets, problem.index, 50, seed
        mean, loss, _ = contrast(query, *arguments)
        return loss, torch.autograd.grad(mean, query)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number in (5, 6):
        seed.fill_(number)
        graph.replay()
        for replayed, launched in zip(captured, step(), strict=True):
            assert torch.equal(replayed, launched)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU can be waited for")
def test_nothing_waits_for_the_gpu():
    problem = Problem(8, 32, 50, 60, (400,))
    problem.fused()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.fused()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("capability", "types"), [(70, {torch.float16}), (80, set(DTYPES)), (90, set(DTYPES))])
def test_banks_for_which_the_kernels_pay(capability, types, monkeypatch):
    """A float32 query against banks in half precision, as in training, is not asked about."""
    monkeypatch.setattr(kernels, "capability", lambda device: capability)
    assert {dtype for dtype in DTYPES if kernels.takes(dtype, DEVICE) and kernels.pays(dtype, DEVICE)} == types


# --- launches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [(1,), (16384,) * 4, (16384, 25000, 50000, 100000), (5, 100000), (64,) * 4])
@pytest.mark.parametrize("programs", [1, 8, 80, 132])
def test_parts_cover_every_bank_and_fit_the_gpu(columns, programs):
    size, parts = divide(columns, 128, programs)
    assert size % 128 == 0
    assert all((part - 1) * size < count <= part * size for count, part in zip(columns, parts, strict=True))
    assert sum(parts) <= max(programs, len(columns))
    assert sum(parts) > 0.8 * min(programs, sum(-(-count // 128) for count in columns)) or size == 128


def test_the_interpreter_meets_parts_of_several_tiles():
    """The shapes above are meant to give parts of several tiles; this fails if launch parameters change so that they do
    not.
    """
    if kernels.INTERPRETED:
        tile = tile_for(90, 2, 128)
        size, parts = divide((1600, 1202), tile.columns, multiprocessors(DEVICE) * tile.programs)
        assert size >= 2 * tile.columns
        assert min(parts) >= 2

"""InfoNCE and ProtoNCE against a literal transcription of their definitions in float64."""

from __future__ import annotations

from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F

from pcl_fast.clustering import PrototypeSet
from pcl_fast.losses import contrast as losses_of_contrast
from pcl_fast.losses import info_nce, pcl_loss, proto_nce, protonce, sample_negatives

D = 24
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def unit(rows: int, generator: torch.Generator, common: float = 0.0, dtype=torch.float64) -> torch.Tensor:
    """Return unit rows [rows, D], which `common` > 0 makes correlated."""
    shared = torch.randn(1, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    return F.normalize(noise + common * shared, dim=1).to(dtype)


def prototype_set(k: int, n: int, generator: torch.Generator, common: float = 0.0) -> PrototypeSet:
    concentration = 0.05 + 0.3 * torch.rand(k, generator=generator)
    assignment = torch.randint(0, k, (n,), generator=generator, dtype=torch.int32)
    return PrototypeSet(unit(k, generator, common).float(), concentration, assignment)


@pytest.fixture(params=[0, 1, 2])
def generator(request) -> torch.Generator:
    return torch.Generator().manual_seed(request.param)


@pytest.mark.parametrize(("rows", "queue_size"), [(1, 1), (3, 50), (16, 200)])
@pytest.mark.parametrize("common", [0.0, 3.0])
def test_info_nce_is_the_literal_formula(generator, rows, queue_size, common):
    query, key = unit(rows, generator, common), unit(rows, generator, common)
    queue = unit(queue_size, generator, common)
    result = info_nce(query, key, queue, 0.07)
    assert result.loss.tolist() == pytest.approx(oracle.info_nce_rows(query, key, queue, 0.07), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("rows", "k", "negatives"), [(1, 5, 3), (7, 40, 12), (16, 30, None), (12, 4, None)])
@pytest.mark.parametrize("common", [0.0, 3.0])
def test_proto_nce_is_the_literal_formula(generator, rows, k, negatives, common):
    prototypes = prototype_set(k, 100, generator, common)
    query, index = unit(rows, generator, common), torch.randint(0, 100, (rows,), generator=generator)
    positives = prototypes.assignment[index].long()
    result = proto_nce(query, prototypes, index, negatives, seed=5)
    drawn = sample_negatives(k, negatives, positives, seed=5)
    expected = oracle.proto_nce_rows(query, prototypes.centroids, prototypes.concentration, positives, drawn)
    assert result.loss.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("common", [0.0, 3.0])
def test_low_precision_stays_near_float64(generator, dtype, common):
    """Sums are taken in float32, so on equal inputs the result differs from float64 by the rounding of float32 only."""
    query = unit(32, generator, common, dtype)
    key, queue = unit(32, generator, common).float(), unit(500, generator, common).float()
    upstream = torch.randn(32, generator=generator, dtype=torch.float64)

    def loss_and_gradient(leaf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = leaf.clone().requires_grad_()
        loss = info_nce(leaf, key, queue, 0.1).loss
        loss.backward(upstream.to(loss.dtype))
        return loss.detach(), leaf.grad

    loss, gradient = loss_and_gradient(query)
    exact_loss, exact_gradient = loss_and_gradient(query.double())
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=2e-6)
    resolution = torch.finfo(dtype).eps
    scale = exact_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=resolution, atol=1e-5 * scale)


def test_gradients_by_finite_differences_with_random_upstream(generator):
    prototypes = [prototype_set(k, 60, generator) for k in (6, 20)]
    query = unit(5, generator).requires_grad_()
    key, queue, index = unit(5, generator), unit(30, generator), torch.randint(0, 60, (5,), generator=generator)
    double = [PrototypeSet(p.centroids.double(), p.concentration.double(), p.assignment) for p in prototypes]

    def rows(leaf: torch.Tensor) -> torch.Tensor:
        result = pcl_loss(leaf, key, queue, double, index, temperature=0.2, num_negatives=8, seed=3)
        return torch.stack([result.instance.loss, *(part.loss for part in result.prototype)])

    assert torch.autograd.gradcheck(rows, query)


def test_confident_rows_keep_their_gradient():
    """At z = -40, 1 - softmax would be 0 in float32; the gradient is exp(-40) times a difference of vectors."""
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    key, queue = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    result = info_nce(query, key, queue, 0.05)
    result.loss.sum().backward()
    expected = torch.exp(torch.tensor(-40.0)) * torch.tensor([-1.0, 0.0]) * 2 / 0.05
    torch.testing.assert_close(query.grad[0], expected, rtol=1e-5, atol=0)
    assert result.loss.item() == pytest.approx(4.248354e-18, rel=1e-5)


def test_only_the_query_gets_a_gradient(generator):
    prototypes = prototype_set(10, 40, generator)
    prototypes.centroids.requires_grad_()
    tensors = [unit(4, generator).requires_grad_() for _ in range(2)] + [unit(9, generator).requires_grad_()]
    index = torch.arange(4)
    result = pcl_loss(*tensors, [prototypes], index, temperature=0.1, num_negatives=3, seed=0)
    result.loss.backward()
    assert tensors[0].grad is not None
    assert [t.grad for t in (*tensors[1:], prototypes.centroids)] == [None] * 3


def test_twins_are_not_each_others_negatives(generator):
    """Rows 0 and 1 have the same prototype, so they are twins. Without the mask each would see its own prototype among
    its negatives.
    """
    prototypes = prototype_set(6, 4, generator)._replace(assignment=torch.tensor([2, 2, 5, 0], dtype=torch.int32))
    query = unit(3, generator)
    twins = proto_nce(query, prototypes, torch.tensor([0, 1, 2]), None, seed=0)
    alone = proto_nce(query[:1], prototypes, torch.tensor([0]), None, seed=0)
    # A row alone, with all negatives, sees every other prototype once. With its twin and row 2 beside it, it does too.
    torch.testing.assert_close(twins.loss[0], alone.loss[0])
    # Row 2 sees the twins' prototype twice, one column per other row.
    scores = (query[2] @ prototypes.centroids.T.double()) / prototypes.concentration
    columns = scores[torch.tensor([5, 2, 2, 0, 1, 3, 4])]
    torch.testing.assert_close(twins.loss[2], torch.logsumexp(columns, 0) - scores[5])


def test_a_prototype_without_negatives_costs_nothing(generator):
    prototypes = PrototypeSet(unit(1, generator).float(), torch.tensor([0.1]), torch.zeros(5, dtype=torch.int32))
    query = unit(3, generator, dtype=torch.float32).requires_grad_()
    result = proto_nce(query, prototypes, torch.arange(3), 10, seed=0)
    result.loss.sum().backward()
    assert result.loss.tolist() == [0, 0, 0]
    assert query.grad.abs().max() == 0
    assert result.correct.all()


def test_mixed_rows_with_and_without_negatives(generator):
    """Of two prototypes both are somebody's positive, so none is left to sample, and two of three rows are twins."""
    prototypes = PrototypeSet(
        unit(2, generator).float(), torch.tensor([0.1, 0.2]), torch.tensor([0, 0, 1], dtype=torch.int32)
    )
    query = unit(3, generator, dtype=torch.float32).requires_grad_()
    result = proto_nce(query, prototypes, torch.arange(3), 10, seed=0)
    positives = prototypes.assignment.long()
    expected = oracle.proto_nce_rows(query.detach(), *prototypes[:2], positives, [])
    assert result.loss.tolist() == pytest.approx(expected, rel=1e-5)
    result.loss.sum().backward()
    assert query.grad.isfinite().all()


def test_collapse_is_not_correct():
    same = F.normalize(torch.ones(4, D), dim=1)
    assert not info_nce(same, same, same, 0.1).correct.any()


def test_correct_is_the_argmax(generator):
    query, key, queue = unit(64, generator), unit(64, generator), unit(3, generator)
    scores = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1)
    correct = info_nce(query, key, queue, 0.1).correct
    assert torch.equal(correct, scores.argmax(1) == 0)
    assert 0 < correct.sum() < 64


def test_the_total_is_instance_plus_mean_over_granularities(generator):
    prototypes = [prototype_set(k, 50, generator) for k in (7, 30)]
    query, key, queue = unit(6, generator), unit(6, generator), unit(20, generator)
    index = torch.randint(0, 50, (6,), generator=generator)
    result = pcl_loss(query, key, queue, prototypes, index, temperature=0.1, num_negatives=5, seed=11)
    parts = [proto_nce(query, p, index, 5, seed=11 + m).loss.mean() for m, p in enumerate(prototypes)]
    torch.testing.assert_close(result.loss, info_nce(query, key, queue, 0.1).loss.mean() + sum(parts) / 2)
    warm = pcl_loss(query, key, queue, [], index, temperature=0.1, num_negatives=5, seed=11)
    torch.testing.assert_close(warm.loss, warm.instance.loss.mean())


def test_the_paper_s_name_for_the_whole_loss():
    assert protonce is pcl_loss


def test_autocast_does_not_round_the_products(generator):
    query, key, queue = (unit(n, generator).float() for n in (4, 4, 30))
    plain = info_nce(query, key, queue, 0.05).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(query, key, queue, 0.05).loss, plain)


# --- the fused kernels (in Triton's interpreter where there is no GPU) --------------------------------------------


def fused_case(generator: torch.Generator, rows: int = 6) -> dict:
    """Return the arguments of pcl_loss, except query and backend, on the device that the kernels run on."""
    prototypes = [
        PrototypeSet(*(field.to(DEVICE) for field in prototype_set(k, 50, generator, common=0.5))) for k in (20, 40)
    ]
    return {
        "key": unit(rows, generator).float().to(DEVICE),
        "queue": unit(30, generator).float().to(DEVICE),
        "prototypes": prototypes,
        "index": torch.randint(0, 50, (rows,), generator=generator).to(DEVICE),
        "temperature": 0.1,
        "num_negatives": 12,
        "seed": 17,
    }


def test_backends_agree(generator):
    query, case = unit(6, generator).float().to(DEVICE), fused_case(generator)
    results, gradients = [], []
    for backend in ("torch", "triton"):
        leaf = query.clone().requires_grad_()
        results.append(pcl_loss(leaf, **case, backend=backend))
        results[-1].loss.backward()
        gradients.append(leaf.grad)
    torch_one, fused = results
    torch.testing.assert_close(fused.loss, torch_one.loss)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    for mine, other in zip([fused.instance, *fused.prototype], [torch_one.instance, *torch_one.prototype], strict=True):
        torch.testing.assert_close(mine.loss, other.loss, rtol=1e-5, atol=1e-5)
        assert torch.equal(mine.correct, other.correct)


def test_parts_are_what_the_whole_is_made_of(generator):
    query, case = unit(6, generator).float().to(DEVICE), fused_case(generator)
    whole = pcl_loss(query, **case, backend="triton")
    instance = info_nce(query, case["key"], case["queue"], 0.1, backend="triton")
    assert torch.equal(instance.loss, whole.instance.loss)
    for m, (granularity, part) in enumerate(zip(case["prototypes"], whole.prototype, strict=True)):
        alone = proto_nce(query, granularity, case["index"], 12, seed=17 + m, backend="triton")
        torch.testing.assert_close(alone.loss, part.loss)
        assert torch.equal(alone.correct, part.correct)
    warm = pcl_loss(query, **{**case, "prototypes": []}, backend="triton")
    torch.testing.assert_close(warm.loss, instance.loss.mean())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("negatives", [7, None])
def test_parts_of_a_batch_have_the_losses_of_the_whole(generator, backend, negatives):
    """Told of the whole batch: prototypes of other parts' rows are columns too, and are not drawn. Gradients with a
    random upstream.
    """
    query = unit(9, generator).float().to(DEVICE)
    case = fused_case(generator, rows=9) | {"query": query, "num_negatives": negatives, "backend": backend}
    upstream = torch.randn(9, generator=generator).to(DEVICE)

    def losses(rows: slice, batch: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        given = case | {name: case[name][rows] for name in ("query", "key", "index")}
        given["query"] = given["query"].detach().requires_grad_()
        result = pcl_loss(**given, batch=batch)
        loss = torch.stack([each.loss for each in (result.instance, *result.prototype)])
        (gradient,) = torch.autograd.grad((loss * upstream[rows]).sum(), given["query"])
        return loss.detach(), torch.stack([each.correct for each in result.prototype]), gradient

    whole = losses(slice(None), None)
    parts = [losses(slice(start, start + 3), case["index"]) for start in (0, 3, 6)]
    for found, expected, dim in zip(zip(*parts, strict=True), whole, (1, 1, 0), strict=True):
        torch.testing.assert_close(torch.cat(found, dim), expected, rtol=1e-5, atol=1e-6)
    alone = losses(slice(0, 3), None)[0]
    assert not torch.allclose(alone[1:], whole[0][1:, :3])


def test_a_batch_that_cannot_hold_the_rows_is_refused(generator):
    case = fused_case(generator) | {"query": unit(6, generator).float().to(DEVICE)}
    with pytest.raises(
        ValueError, match=r"batch must be int64 \[B\] with B >= 6, the rows among them, got .*int64 \[5\]"
    ):
        pcl_loss(**case, batch=case["index"][:5])


def test_a_seed_on_the_device(generator):
    query, case = unit(6, generator).float().to(DEVICE), fused_case(generator)
    on_device = {**case, "seed": torch.tensor(17, device=DEVICE)}
    for backend in ("torch", "triton"):
        given, read = (pcl_loss(query, **arguments, backend=backend).loss for arguments in (case, on_device))
        assert torch.equal(given, read)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_loss_compiles_as_one_graph(backend):
    """The seed is a tensor, because PyTorch 2.5 cannot trace what the plain draw does with the bits of an int."""
    generator = torch.Generator().manual_seed(0)
    query, case = unit(6, generator).float().to(DEVICE), fused_case(generator)
    compiled = torch.compile(pcl_loss, fullgraph=True, backend="aot_eager")
    for number in (1, 2, 2**40 + 3):
        case["seed"] = torch.tensor(number, device=DEVICE)
        plain, traced = (query.clone().requires_grad_() for _ in range(2))
        pcl_loss(plain, **case, backend=backend).loss.backward()
        compiled(traced, **case, backend=backend).loss.backward()
        torch.testing.assert_close(traced.grad, plain.grad)


def test_fused_kernels_leave_other_inputs_without_gradient(generator):
    query, case = unit(6, generator).float().to(DEVICE).requires_grad_(), fused_case(generator)
    case["queue"].requires_grad_()
    pcl_loss(query, **case, backend="triton").loss.backward()
    assert query.grad is not None
    assert case["queue"].grad is None


def test_fused_kernels_are_refused_with_the_reason(generator, monkeypatch):
    wide = torch.nn.functional.normalize(torch.ones(4, 600, device=DEVICE), dim=1)
    with pytest.raises(ValueError, match=r'backend "triton" takes d up to 512 .*got 600; use backend "torch"'):
        info_nce(wide, wide, wide, 0.1, backend="triton")
    monkeypatch.setattr("pcl_fast.losses.contrast.fused_kernels.INTERPRETED", False)
    query = unit(4, generator).float()
    with pytest.raises(ValueError, match=r"needs CUDA tensors, query is on cpu .*TRITON_INTERPRET=1"):
        info_nce(query, query, query, 0.1, backend="triton")
    monkeypatch.setattr("pcl_fast.losses.contrast.fused_kernels", None)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        info_nce(query, query, query, 0.1, backend="triton")


# --- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "wanted"), [(50, 10), (50, 45), (50, 46), (50, 100), (50, None)])
def test_negatives_are_distinct_and_nobodys_positive(k, wanted):
    positives = torch.tensor([3, 3, 7, 49, 0])
    for seed in range(20):
        drawn = sample_negatives(k, wanted, positives, seed=seed)
        assert len(drawn) == min(wanted or k, k - 4)
        assert len(set(drawn.tolist())) == len(drawn)
        assert not set(drawn.tolist()) & {0, 3, 7, 49}


def test_negatives_are_uniform_in_marginals_and_pairs():
    """The 18 ids, their 153 pairs and the first id are within 5 standard deviations of chi-squared."""
    k, r, draws, positives = 20, 6, 6000, torch.tensor([4, 4, 11])
    free = [c for c in range(k) if c not in (4, 11)]
    hits, pairs, first = torch.zeros(k), torch.zeros(k, k), torch.zeros(k)
    for seed in range(draws):
        drawn = sample_negatives(k, r, positives, seed=seed)
        hits[drawn] += 1
        first[drawn[0]] += 1
        pairs[drawn[:, None], drawn] += 1
    n = len(free)
    pair_counts = torch.stack([pairs[a, b] for i, a in enumerate(free) for b in free[:i]])
    for counts, chance in ((hits[free], r / n), (pair_counts, r * (r - 1) / (n * (n - 1))), (first[free], 1 / n)):
        expected = draws * chance
        chi2 = ((counts - expected) ** 2 / (expected * (1 - chance))).sum().item()
        assert abs(chi2 - len(counts)) < 5 * (2 * len(counts)) ** 0.5


def test_the_draw_depends_on_the_seed_alone():
    positives = torch.tensor([1, 2])
    once = sample_negatives(1000, 50, positives, seed=9)
    assert torch.equal(once, sample_negatives(1000, 50, positives, seed=torch.tensor(9)))
    assert not torch.equal(once, sample_negatives(1000, 50, positives, seed=10))


# --- bad input ----------------------------------------------------------------------------------------------------


def test_errors_name_argument_and_value(generator):
    q, queue = unit(4, generator), unit(9, generator)
    prototypes, index = prototype_set(10, 40, generator), torch.arange(4)
    cases = [
        (lambda: info_nce(q[0], q, queue, 0.1), r"query must be \[N, d\].*\[24\]"),
        (lambda: info_nce(q.int(), q, queue, 0.1), "query must be .*int32"),
        (lambda: info_nce(q, q[:2], queue, 0.1), r"key must be \[4, 24\].*\[2, 24\]"),
        (lambda: info_nce(q, q, queue[:, :5], 0.1), r"queue must be \[R, 24\].*\[9, 5\]"),
        (lambda: info_nce(q, q, queue, 0.0), "temperature must be positive, got 0.0"),
        (lambda: info_nce(q, q, queue, 0.1, backend="cuda"), "backends .*'cuda'"),
        (lambda: info_nce(q, q, queue[:0], 0.1), "queue is empty"),
        (
            lambda: info_nce(*(features.to(DEVICE) for features in (q, q, queue)), 0.1, backend="triton"),
            "takes float32, float16 and.* bfloat16, got torch.float64",
        ),
        (lambda: proto_nce(q, prototypes, index[:2], 5, seed=0), r"index must be int64 \[4\]"),
        (lambda: proto_nce(q, prototypes, index.int(), 5, seed=0), "index must be int64.*int32"),
        (lambda: proto_nce(q, prototypes, index + 37, 5, seed=0), r"index must lie in \[0, 40\).*37 to 40"),
        (lambda: proto_nce(q, prototypes, index - 1, 5, seed=0), r"index must lie in \[0, 40\).*-1 to 2"),
        (lambda: proto_nce(q, prototypes, index, 0, seed=0), "num_negatives must be positive.*got 0"),
        (
            lambda: proto_nce(q, prototypes._replace(concentration=torch.ones(3)), index, 5, seed=0),
            r"prototypes.concentration must be \[K\].*\[3\]",
        ),
        (
            lambda: proto_nce(q, prototypes._replace(concentration=torch.zeros(10)), index, 5, seed=0),
            "prototypes.concentration must be positive, got 0.0",
        ),
        (
            lambda: proto_nce(q, prototypes._replace(centroids=q[:0], concentration=torch.ones(0)), index, 5, seed=0),
            "with K >= 1",
        ),
        (
            lambda: proto_nce(q, prototypes._replace(assignment=torch.full((40,), 10)), index, 5, seed=0),
            r"prototypes.assignment of the batch must lie in \[0, 10\).*10 to 10",
        ),
        (
            lambda: proto_nce(q, prototypes._replace(assignment=torch.zeros(40)), index, 5, seed=0),
            "assignment must be .* int32 or int64.*float32",
        ),
        (lambda: proto_nce(q, prototypes, index, 5, seed=2**63), "seed must fit into 64 bits, got 9223372036854775808"),
        (lambda: proto_nce(q, prototypes, index, 5, seed=torch.tensor([1])), r"0-d int64 tensor on cpu, got .*\[1\]"),
        (lambda: sample_negatives(10, 5, index, seed=torch.tensor(1.0)), "seed must be .* got torch.float32"),
        (lambda: sample_negatives(0, 5, index, seed=0), "num_prototypes must be positive"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("capability", "bank", "fused"), [(70, torch.float32, False), (70, torch.float16, True), (80, torch.float32, True)]
)
def test_auto_takes_the_kernels_where_they_pay(capability, bank, fused, monkeypatch):
    kernels = losses_of_contrast.fused_kernels
    monkeypatch.setattr(kernels, "capability", lambda device: capability)
    monkeypatch.setattr(kernels, "widest", lambda device: 512)  # for Volta 0, without Triton 3.1
    query, rows = (
        SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=(4, 128))
        for dtype in (torch.float32, bank)
    )
    assert losses_of_contrast._fused("auto", query, rows) is (kernels if fused else None)
    assert losses_of_contrast._fused("triton", query, rows) is kernels

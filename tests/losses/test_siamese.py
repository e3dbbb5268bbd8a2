"""The siamese metric loss against its formula, row by row in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pcl_fast.losses import siamese


def rows(n: int, d: int = 24, *, distance: float = 0.3) -> tuple[torch.Tensor, ...]:
    """Correlated features that are not negative, as a backbone's are, a metric and answers, other ones every time;
    float64.
    """
    generator = torch.Generator()
    generator.seed()
    a = torch.rand(d, generator=generator, dtype=torch.float64) + 0.3 * torch.rand(n, d, generator=generator).double()
    b = a + distance * torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(d, generator=generator, dtype=torch.float64)
    return (
        a,
        b,
        weight,
        torch.randn(1, generator=generator, dtype=torch.float64),
        torch.rand(n, generator=generator) < 0.5,
    )


def formula(a, b, weight, bias, same) -> list[float]:
    losses = []
    for x, y, alike in zip(a.tolist(), b.tolist(), same.tolist(), strict=True):
        logit = math.fsum(w * abs(u - v) for w, u, v in zip(weight.tolist(), x, y, strict=True)) + bias.item()
        chance = 1 / (1 + math.exp(-logit))
        losses.append(-math.log(chance if alike else 1 - chance))
    return losses


def naive(a, b, weight, bias, same) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits((a - b).abs() @ weight + bias, same.to(a.dtype), reduction="none")


def gradients(loss, a, b, weight, bias, same, upstream) -> tuple[torch.Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in (a, b, weight, bias)]
    return torch.autograd.grad(loss(*leaves, same), leaves, upstream)


@pytest.mark.parametrize("n", [1, 2, 33])
def test_equals_the_formula(n):
    given = rows(n)
    result = siamese(*given)
    assert result.loss.tolist() == pytest.approx(formula(*given), rel=1e-10, abs=1e-12)
    assert result.correct.tolist() == [loss < math.log(2) for loss in formula(*given)]


def test_gradients_in_float64():
    given = rows(17)
    upstream = torch.randn(17, dtype=torch.float64)
    found = gradients(lambda *inputs: siamese(*inputs).loss, *given, upstream)
    for ours, theirs in zip(found, gradients(naive, *given, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_pytorch_in_the_same_type(dtype):
    a, b, weight, bias, same = rows(40)
    low, upstream = (a.to(dtype), b.to(dtype), weight.float(), bias.float(), same), torch.randn(40, dtype=torch.float64)
    high, plain = [part.double() for part in low[:4]], [part.to(dtype) for part in low[:4]]
    exact, ours, theirs = naive(*high, same), siamese(*low).loss, naive(*plain, same)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + 1e-6
    exact = gradients(naive, *high, same, upstream)
    found = gradients(lambda *inputs: siamese(*inputs).loss, *low, upstream.float())
    others = gradients(naive, *plain, same, upstream.to(dtype))
    # Of a and b the gradient is rounded to their type at the end, which is not more than it was.
    for e, f, t in zip(exact, found, others, strict=True):
        assert (f.double() - e).abs().max() <= (t.double() - e).abs().max() + 1e-5


def test_confident_rows_keep_their_gradient():
    """sigmoid(30) - 1 is 0 in float32."""
    a, b = torch.tensor([[3.0], [3.0]]), torch.zeros(2, 1)
    given = a, b, torch.tensor([10.0]), torch.zeros(1), torch.tensor([True, False])
    found = gradients(lambda *inputs: siamese(*inputs).loss, *given, torch.tensor([1.0, 0.0]))
    assert found[0][0].item() == pytest.approx(-10 * math.exp(-30), rel=1e-5)
    assert siamese(*given).loss.tolist() == pytest.approx([math.exp(-30), 30.0], rel=1e-5)


def test_autocast_leaves_logits_alone():
    given = [part.float() if part.is_floating_point() else part for part in rows(8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = siamese(*given).loss
    assert torch.equal(found, siamese(*given).loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.ones(3)}, r"a must be \[N, d\] floating point"),
        ({"a": torch.ones(0, 2), "b": torch.ones(0, 2)}, "N >= 1"),
        ({"b": torch.ones(2, 2)}, r"must be alike, got \[3, 2\].*\[2, 2\]"),
        ({"b": torch.ones(3, 2).half()}, "must be alike.*float16"),
        ({"weight": torch.ones(1, 2)}, r"weight must be \[2\]"),
        ({"bias": torch.ones(2)}, "bias a single number"),
        ({"same": torch.ones(3)}, r"same must be \[3\] bool"),
    ],
)
def test_bad_input_is_refused(changes, message):
    given = {"a": torch.ones(3, 2), "b": torch.ones(3, 2), "weight": torch.ones(2), "bias": torch.ones(1)}
    given["same"] = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        siamese(**{**given, **changes})

"""Cross-entropy of pseudo-labels against its formula, row by row in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pcl_fast.losses import pseudo_label_loss

TEMPERATURE = 0.1


def drawn(n: int, k: int, d: int = 16, *, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings near the prototypes of their labels, of which every third row has none; all have much in common for a
    small spread. In float64, with a fresh seed.
    """
    middle = torch.randn(d, dtype=torch.float64)
    centroids = F.normalize(middle + spread * torch.randn(k, d, dtype=torch.float64), dim=1)
    labels = torch.randint(k, (n,))
    embedding = F.normalize(centroids[labels] + 0.3 * spread * torch.randn(n, d, dtype=torch.float64), dim=1)
    labels[::3] = -1 - torch.randint(200, (len(labels[::3]),))
    return embedding, centroids, labels


def rows(embedding: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], list[bool]]:
    """The formula in Python."""
    losses, correct = [], []
    for z, label in zip(embedding.double().tolist(), labels.tolist(), strict=True):
        scores = [math.fsum(map(math.prod, zip(z, c, strict=True))) / TEMPERATURE for c in centroids.double().tolist()]
        top = max(scores)
        total = top + math.log(math.fsum(math.exp(score - top) for score in scores))
        losses.append(0.0 if label < 0 else total - scores[label])
        correct.append(label >= 0 and scores[label] == top)
    return losses, correct


def naive(embedding: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    labels = torch.where(labels < 0, -100, labels)
    return F.cross_entropy(embedding @ centroids.T / TEMPERATURE, labels, reduction="none")


def gradient(loss, embedding: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    embedding = embedding.clone().requires_grad_()
    losses = loss(embedding)
    return torch.autograd.grad(losses, embedding, upstream.to(losses.dtype))[0]


@pytest.mark.parametrize("spread", [1.0, 0.05])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (7, 5), (24, 33)])
def test_equals_the_formula(n, k, spread):
    embedding, centroids, labels = drawn(n, k, spread=spread)
    losses, correct = rows(embedding, centroids, labels)
    for label in (labels, labels.int()):
        found = pseudo_label_loss(embedding, centroids, label, TEMPERATURE)
        assert found.loss.tolist() == pytest.approx(losses, rel=1e-11, abs=1e-13)
        assert found.correct.tolist() == correct


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_is_as_exact_as_pytorch_in_the_same_type(dtype, spread):
    embedding, centroids, labels = drawn(40, 30, spread=spread)
    embedding, centroids = embedding.to(dtype), centroids.float()
    upstream = torch.randn(40, dtype=torch.float64)
    exact = naive(embedding.double(), centroids.double(), labels)
    plain = naive(embedding, centroids.to(dtype), labels)
    found = pseudo_label_loss(embedding, centroids, labels, TEMPERATURE).loss
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= (plain - exact).abs().max() + 2e-6
    expected = gradient(lambda z: naive(z, centroids.double(), labels), embedding.double(), upstream)
    theirs = gradient(lambda z: naive(z, centroids.to(dtype), labels), embedding, upstream)
    ours = gradient(lambda z: pseudo_label_loss(z, centroids, labels, TEMPERATURE).loss, embedding, upstream)
    assert (ours.double() - expected).abs().max() <= (theirs.double() - expected).abs().max() + 1e-5


def test_gradients_in_float64():
    embedding, centroids, labels = drawn(20, 11)
    upstream = torch.randn(20, dtype=torch.float64)
    found = gradient(lambda z: pseudo_label_loss(z, centroids, labels, TEMPERATURE).loss, embedding, upstream)
    torch.testing.assert_close(found, gradient(lambda z: naive(z, centroids, labels), embedding, upstream))
    assert found[labels < 0].eq(0).all()
    assert found[labels >= 0].any(1).all()


def test_only_the_embedding_gets_a_gradient():
    embedding, centroids, labels = (x.requires_grad_() if x.is_floating_point() else x for x in drawn(6, 4))
    pseudo_label_loss(embedding, centroids, labels, TEMPERATURE).loss.sum().backward()
    assert embedding.grad is not None
    assert centroids.grad is None


def test_confident_rows_keep_their_gradient():
    """At a low temperature 1 - softmax is 0 in float32."""
    centroids = F.normalize(torch.tensor([[1.0, 0.1], [-1, 0.2], [-1, -0.3]]), dim=1)
    embedding, labels = F.normalize(torch.tensor([[1.0, 0.0], [-1, 0.9]]), dim=1), torch.tensor([0, 1])

    def found(dtype: torch.dtype) -> torch.Tensor:
        rows = pseudo_label_loss(embedding.to(dtype), centroids.to(dtype), labels, 0.05).loss
        assert rows.min() > 0
        return gradient(
            lambda z: pseudo_label_loss(z, centroids.to(dtype), labels, 0.05).loss, embedding.to(dtype), torch.ones(2)
        )

    expected = found(torch.float64)
    assert expected.any(1).all()
    torch.testing.assert_close(found(torch.float32), expected.float(), rtol=1e-4, atol=0)


def test_no_image_has_a_label():
    embedding, centroids, labels = drawn(5, 4)
    found = pseudo_label_loss(embedding, centroids, torch.full_like(labels, -1), TEMPERATURE)
    assert not found.loss.any()
    assert not found.correct.any()


def test_autocast_leaves_scores_alone():
    embedding, centroids, labels = drawn(8, 5)
    given = embedding.float(), centroids.float(), labels, TEMPERATURE
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pseudo_label_loss(*given)
    assert torch.equal(found.loss, pseudo_label_loss(*given).loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.ones(4)}, r"embedding must be \[n, d\] floating point with n >= 1, got \[4\]"),
        ({0: torch.ones(0, 2)}, "embedding must be .* with n >= 1"),
        ({1: torch.ones(3, 2).long()}, "centroids must be .* floating point .*int64"),
        ({1: torch.ones(3, 5)}, "must be of one length, got 2 and 5"),
        ({2: torch.zeros(3).long()}, r"label must be int32 or int64 \[4\], got torch.int64 \[3\]"),
        ({2: torch.zeros(4)}, "label must be int32 or int64 .*float32"),
        ({2: torch.tensor([0, 1, 3, 0])}, "label must be below the 3 centroids, got 3"),
        ({2: torch.zeros(4, device="meta").long()}, "must be on one device, got cpu, cpu and meta"),
        ({3: 0.0}, "temperature must be positive and finite, got 0.0"),
        ({3: math.nan}, "temperature must be positive and finite, got nan"),
    ],
)
def test_bad_input_is_refused(changes, message):
    given = {0: torch.ones(4, 2), 1: torch.ones(3, 2), 2: torch.zeros(4).long(), 3: TEMPERATURE} | changes
    with pytest.raises(ValueError, match=message):
        pseudo_label_loss(*given.values())

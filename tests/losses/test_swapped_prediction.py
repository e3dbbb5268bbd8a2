"""Swapped prediction against the paper's formula, term by term in Python."""

from __future__ import annotations

import math

import pytest
import torch

from pcl_fast.losses import swapped_prediction


def draw(crops: int, coded: int, images: int = 5, prototypes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    scores = 2 * torch.rand(crops, images, prototypes, dtype=torch.float64) - 1
    return scores, torch.randn(coded, images, prototypes, dtype=torch.float64).mul(3).softmax(2)


def on_paper(scores: torch.Tensor, codes: torch.Tensor, temperature: float) -> list[float]:
    crops, images, prototypes = scores.shape
    s, q = scores.tolist(), codes.tolist()
    losses = []
    for n in range(images):
        total = 0.0
        for a in range(len(codes)):
            for v in range(crops):
                if v == a:
                    continue
                top = max(s[v][n]) / temperature
                partition = top + math.log(math.fsum(math.exp(x / temperature - top) for x in s[v][n]))
                terms = (q[a][n][k] * (partition - s[v][n][k] / temperature) for k in range(prototypes))
                total += math.fsum(terms) / (crops - 1)
        losses.append(total / len(codes))
    return losses


@pytest.mark.parametrize(("crops", "coded"), [(2, 2), (8, 2), (3, 1), (3, 3)])
def test_equals_the_paper_s_formula(crops, coded):
    scores, codes = draw(crops, coded)
    found = swapped_prediction(scores, codes, 0.1)
    assert found.tolist() == pytest.approx(on_paper(scores, codes, 0.1), rel=1e-11)
    assert torch.equal(found, swapped_prediction(scores.transpose(0, 1).contiguous().transpose(0, 1), codes, 0.1))


def test_the_gradient_is_that_of_the_formula_and_codes_have_none():
    scores, codes = draw(4, 2)
    upstream = torch.randn(5, dtype=torch.float64)
    scores.requires_grad_()
    codes.requires_grad_()
    (found,) = torch.autograd.grad(swapped_prediction(scores, codes, 0.2), scores, upstream, retain_graph=True)
    p, expected = (scores.detach() / 0.2).softmax(2), torch.zeros_like(found)
    for a in range(2):
        for v in range(4):
            if v != a:
                expected[v] += (p[v] - codes[a].detach()) / 0.2 / 3 / 2 * upstream[:, None]
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(swapped_prediction(scores, codes, 0.2).sum(), codes, allow_unused=True) == (None,)


def test_half_precision_is_computed_in_float32():
    scores, codes = (tensor.bfloat16() for tensor in draw(3, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = swapped_prediction(scores, codes, 0.1)
    assert torch.equal(found, swapped_prediction(scores.float(), codes.float(), 0.1))


@pytest.mark.parametrize(
    ("shapes", "temperature", "message"),
    [
        (((1, 3, 2), (1, 3, 2)), 0.1, r"V >= 2 crops, got \[1, 3, 2\]"),
        (((3, 2), (3, 2)), 0.1, r"scores must be \[V, N, K\]"),
        (((2, 3, 4), (2, 3, 5)), 0.1, r"codes must be \[A, 3, 4\] with A from 1 to 2"),
        (((2, 3, 4), (3, 3, 4)), 0.1, "with A from 1 to 2"),
        (((2, 3, 4), (2, 3, 4)), 0.0, r"temperature must be positive and finite, got 0\.0"),
    ],
)
def test_bad_input_is_refused(shapes, temperature, message):
    with pytest.raises(ValueError, match=message):
        swapped_prediction(*map(torch.zeros, shapes), temperature)

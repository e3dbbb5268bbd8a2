"""Logistic regression against scikit-learn's, on two ranks, and by chance."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import pcl_fast.evaluation.logistic
from pcl_fast.evaluation.logistic import Bank, fit_chosen, fit_logistic, linear_accuracy

CLASSES, WIDTH = 5, 10
EXACT = {"tolerance": 1e-7, "iterations": 1000}


def labelled(n: int = 400, noise: float = 1.5) -> Bank:
    """Features of very different sizes and places, the last of which never changes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    middle = torch.randn(CLASSES, WIDTH, generator=generator)
    features = middle[labels] + noise * torch.randn(n, WIDTH, generator=generator)
    features = features * torch.logspace(-2, 1, WIDTH) + torch.linspace(-1, 3, WIDTH)
    features[:, -1] = 4.0
    return Bank(features, labels)


def scikit_learn(bank: Bank, decay: float) -> torch.Tensor:
    """Return its log probabilities [n, C]."""
    features = StandardScaler().fit_transform(bank.features.double().numpy())
    model = LogisticRegression(C=1 / (decay * len(features)), tol=1e-9, max_iter=5000).fit(
        features, bank.labels.numpy()
    )
    return torch.from_numpy(model.predict_log_proba(features)).float()


def log_shares(found, features: torch.Tensor, place: int = 0) -> torch.Tensor:
    return found.logits(features)[:, place].log_softmax(1)


@pytest.mark.parametrize("chunk", [1 << 25, 1300])
def test_it_is_scikit_learn_s(chunk, monkeypatch):
    monkeypatch.setattr(pcl_fast.evaluation.logistic, "_CHUNK", chunk)
    bank, decays = labelled(), (1e-3, 1.0, 1e-1)  # in no order
    found = fit_logistic(bank, CLASSES, decays, **EXACT)
    for place, decay in enumerate(decays):
        torch.testing.assert_close(
            log_shares(found, bank.features, place), scikit_learn(bank, decay), rtol=1e-3, atol=2e-3
        )


def test_rows_are_all_that_is_fitted():
    bank, rows = labelled(), torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.7
    part = Bank(bank.features[rows], bank.labels[rows])
    some, alone = fit_logistic(bank, CLASSES, [0.01], rows=rows), fit_logistic(part, CLASSES, [0.01])
    torch.testing.assert_close(log_shares(some, bank.features), log_shares(alone, bank.features), rtol=1e-3, atol=2e-3)


def test_half_precision_features():
    """A GPU's bank is float16."""
    bank = labelled()
    half = fit_logistic(Bank(bank.features.half(), bank.labels), CLASSES, [0.01])
    expected = log_shares(fit_logistic(bank, CLASSES, [0.01]), bank.features)
    torch.testing.assert_close(log_shares(half, bank.features), expected, rtol=0.02, atol=0.02)


def test_going_on_from_a_solution_stays_there():
    bank = labelled()
    first = fit_logistic(bank, CLASSES, [0.01], **EXACT)
    again = fit_logistic(bank, CLASSES, [0.01], start=first, iterations=1)
    torch.testing.assert_close(log_shares(again, bank.features), log_shares(first, bank.features), rtol=1e-3, atol=1e-3)


def fit_shard(world, bank, rows, decays):
    part = slice(0, 90) if world.rank == 0 else slice(90, 400)
    mine = Bank(bank.features[part], bank.labels[part])
    held = Bank(mine.features[~rows[part]], mine.labels[~rows[part]])
    return fit_chosen(mine, held, CLASSES, decays, rows=rows[part], group=world.group)


def test_two_ranks_equal_one():
    bank, rows = labelled(), torch.arange(400) % 4 > 0
    decays = (1e-3, 1e-2, 1e-1)
    whole = fit_chosen(bank, Bank(bank.features[~rows], bank.labels[~rows]), CLASSES, decays, rows=rows)
    one, other = run_ranks(2, fit_shard, bank, rows, decays)
    assert torch.equal(one.classifier.weight, other.classifier.weight)
    assert one.held_out == whole.held_out
    expected = log_shares(whole.classifier, bank.features)
    torch.testing.assert_close(log_shares(one.classifier, bank.features), expected, rtol=1e-3, atol=2e-3)


def test_the_choice_is_the_held_out_images_alone():
    """Held-out images that are all said to be of the most frequent class are best told by a decay that leaves nothing
    but how frequent the classes are.
    """
    everything = labelled(noise=0.5)
    kept = (everything.labels == 0) | (torch.arange(400) % 2 == 0)
    bank = Bank(everything.features[kept], everything.labels[kept])
    rows = torch.arange(len(bank.labels)) % 4 > 0
    held = Bank(bank.features[~rows], bank.labels[~rows])
    right = fit_chosen(bank, held, CLASSES, (1e-3, 1e3), rows=rows)
    wrong = fit_chosen(bank, held._replace(labels=torch.zeros_like(held.labels)), CLASSES, (1e-3, 1e3), rows=rows)
    assert (right.winner, wrong.winner) == (0, 1)
    assert right.held_out[0].top1 > 0.9 > 0.5 > right.held_out[1].top1


def test_accuracy_of_classes_and_of_shuffled_ones():
    bank = labelled(n=1000, noise=0.7)
    train, test = slice(0, 700), slice(700, 1000)
    right = linear_accuracy(bank.features[train], bank.labels[train], bank.features[test], bank.labels[test])
    assert right.top1 > 0.9
    assert right.top5 == 1
    shuffled = bank.labels[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    chance = linear_accuracy(bank.features[train], shuffled[train], bank.features[test], shuffled[test])
    assert chance.top1 == pytest.approx(1 / CLASSES, abs=0.08)

"""Heads of a grid against heads that torch.optim.SGD trains alone, and their accuracies against a slow count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

import pcl_fast.evaluation.classifiers
from pcl_fast.evaluation.classifiers import Accuracy, Classifiers, best
from pcl_fast.evaluation.heads import Heads, Setting

CPU = torch.device("cpu")
# Powers of two, which float32 holds exactly.
SETTINGS = [Setting(lr, decay) for lr in (0.125, 2.0, 32.0) for decay in (0.0, 2.0**-7)]
WIDTH, CLASSES = 12, 7


def batches(count: int = 25) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(CLASSES, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (count, 16), generator=generator)
    return [(middle[found] + torch.randn(16, WIDTH, generator=generator), found) for found in labels]


def factor(step: int) -> float:
    return 0.5 ** (step // 10)


def in_float64(settings) -> Heads:
    """Return heads whose rounding does not add up, for large learning rates multiply it."""
    heads = Heads(settings, WIDTH, CLASSES, seed=3, device=CPU)
    heads.classifiers, heads.momenta = (
        Classifiers(*(tensor.double() for tensor in tensors)) for tensors in (heads.classifiers, heads.momenta)
    )
    return heads


def alone(setting: Setting, heads: Heads) -> tuple[nn.Linear, list[float]]:
    """Train one head as anybody would, from the grid's first weights."""
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(heads.classifiers.weight[0])
        head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0, momentum=0.9, weight_decay=setting.weight_decay)
    losses = []
    for step, (features, labels) in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = setting.lr * factor(step)
        loss = F.cross_entropy(head(features.double()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return head, losses


def test_each_head_is_what_sgd_makes_of_it_alone():
    heads = in_float64(SETTINGS)
    expected = [alone(setting, heads) for setting in SETTINGS]
    losses = [heads.step(features.double(), labels, factor(step)) for step, (features, labels) in enumerate(batches())]
    for number, (head, values) in enumerate(expected):
        weight, bias = (tensor[number] for tensor in heads.classifiers)
        torch.testing.assert_close(weight, head.weight.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(bias, head.bias.detach(), rtol=1e-9, atol=1e-9)
        expected_losses = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(torch.stack(losses)[:, number], expected_losses, rtol=1e-9, atol=1e-9)


def test_first_weights():
    """They are those of N(0, 0.01), the same in all heads, and others with another seed."""
    weight, bias = Heads(SETTINGS[:2], 200, 50, seed=0, device=CPU).classifiers
    assert torch.equal(weight[0], weight[1])
    assert not bias.any()
    assert weight[0].std().item() == pytest.approx(0.01, rel=0.05)
    assert abs(weight[0].mean().item()) < 3e-4
    assert not torch.equal(weight, Heads(SETTINGS[:2], 200, 50, seed=1, device=CPU).classifiers.weight)


def test_a_head_that_diverges_leaves_the_others_alone():
    settings = [Setting(0.1, 0.0), Setting(1e38, 1.0), Setting(2.0, 0.0)]
    heads, others = (
        Heads(settings, WIDTH, CLASSES, seed=0, device=CPU),
        Heads(settings[::2], WIDTH, CLASSES, seed=0, device=CPU),
    )
    for batch in batches():
        heads.step(*batch)
        others.step(*batch)
    assert heads.classifiers.finite().tolist() == [True, False, True]
    torch.testing.assert_close(heads.classifiers.weight[::2], others.classifiers.weight)
    features, labels = batches(1)[0]
    found = heads.classifiers.accuracies(features, labels)
    assert found[1] is None
    assert best(found) in (0, 2)


def test_a_rank_without_heads():
    heads = Heads([], WIDTH, CLASSES, seed=0, device=CPU)
    assert heads.step(*batches(1)[0]).shape == (0,)


def test_best_is_the_first_of_equals():
    found = [None, Accuracy(0.3, 0.9), Accuracy(0.5, 0.6), Accuracy(0.5, 0.8), None]
    assert best(found) == 2
    assert best([None, Accuracy(0.0, 0.0)]) == 1


def scored() -> tuple[Classifiers, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    classifiers = Classifiers(torch.randn(3, CLASSES, WIDTH, generator=generator), torch.randn(3, CLASSES))
    return classifiers, torch.randn(41, WIDTH, generator=generator), torch.randint(CLASSES, (41,), generator=generator)


def slow(classifiers: Classifiers, features: torch.Tensor, labels: torch.Tensor, head: int, k: int) -> float:
    correct = 0
    for feature, label in zip(features, labels.tolist(), strict=True):
        logits = classifiers.weight[head] @ feature + classifiers.bias[head]
        correct += label in sorted(range(CLASSES), key=logits.tolist().__getitem__)[-k:]
    return correct / len(labels)


@pytest.mark.parametrize("chunk", [1 << 26, 100])
def test_accuracies_are_those_of_a_slow_count(chunk, monkeypatch):
    monkeypatch.setattr(pcl_fast.evaluation.classifiers, "_CHUNK", chunk)
    classifiers, features, labels = scored()
    for head, found in enumerate(classifiers.accuracies(features, labels)):
        assert found.top1 == pytest.approx(slow(classifiers, features, labels, head, 1))
        assert found.top5 == pytest.approx(slow(classifiers, features, labels, head, 5))


def test_fewer_than_five_classes():
    found = Classifiers(torch.ones(1, 3, 2), torch.tensor([[0.0, 1.0, 2.0]])).accuracies(
        torch.ones(4, 2), torch.arange(4) % 3
    )
    assert found == [Accuracy(0.25, 1.0)]


def accuracies_of_shard(world, classifiers, features, labels):
    part = slice(0, 30) if world.rank == 0 else slice(30, 41)
    return classifiers.accuracies(features[part], labels[part], world.group)


def test_ranks_count_together():
    classifiers, features, labels = scored()
    whole = classifiers.accuracies(features, labels)
    assert run_ranks(2, accuracies_of_shard, classifiers, features, labels) == [whole, whole]

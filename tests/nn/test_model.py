"""The encoder, the momentum encoder and the queue."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pcl_fast.config import ModelConfig
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.momentum import MovingAverage, momentum_copy
from pcl_fast.nn.queue import KeyQueue


@pytest.mark.parametrize("head", ["linear", "mlp", "mlp_bn", "mlp_inner_bn", "mlp_unbiased_bn"])
@pytest.mark.parametrize(("arch", "small_stem"), [("resnet18", False), ("resnet18", True), ("cifar_resnet8", False)])
def test_features_are_unit_vectors(arch, small_stem, head):
    encoder = Encoder(ModelConfig(arch=arch, small_stem=small_stem, head=head, dim=40))
    features = encoder(torch.randn(3, 3, 32, 32))
    assert features.shape == (3, 40)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_the_paper_s_encoder_has_the_right_size():
    """It has a ResNet-50 without classifier (23,508,032 parameters) and one of the two heads."""
    linear = sum(p.numel() for p in Encoder(ModelConfig()).parameters())
    mlp = sum(p.numel() for p in Encoder(ModelConfig(head="mlp")).parameters())
    assert linear == 23_508_032 + 2048 * 128 + 128
    assert mlp == linear + 2048 * 2048 + 2048


def test_small_stem_keeps_the_side():
    encoder = Encoder(ModelConfig(arch="resnet18", small_stem=True))
    backbone = encoder.backbone
    assert backbone.maxpool(backbone.conv1(torch.zeros(1, 3, 32, 32))).shape == (1, 64, 32, 32)


@pytest.mark.parametrize("arch", ["vit_b_16", "resnet49", "cifar_resnet9", "cifar_resnet2"])
def test_unknown_architectures_are_named(arch):
    with pytest.raises(ValueError, match=arch):
        Encoder(ModelConfig(arch=arch))


def test_momentum_moves_parameters_only():
    query = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    follower = momentum_copy(query)
    average = MovingAverage(follower, query, momentum=0.9)
    before = [p.clone() for p in follower.parameters()]
    with torch.no_grad():
        for p in query.parameters():
            p.add_(1.0)
        query[1].running_mean.fill_(5)
    average.update()
    for now, old, target in zip(follower.parameters(), before, query.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * target)
    assert follower[1].running_mean.abs().max() == 0
    assert not any(p.requires_grad for p in follower.parameters())


@pytest.mark.parametrize("batches", [[3, 3, 3], [10], [4, 10, 1], [23], [1] * 12, [7, 7, 7]])
def test_queue_keeps_the_last_keys_for_any_batch(batches):
    """The queue must hold what a list holds that drops the oldest keys."""
    queue = KeyQueue(10, 2)
    history = list(queue.keys.clone())
    for number, size in enumerate(batches):
        keys = torch.randn(size, 2) + 10 * (number + 1)
        queue.enqueue(keys)
        history = (history + list(keys))[-10:]
    ring = torch.roll(queue.keys, -int(queue.position), dims=0)
    torch.testing.assert_close(ring, torch.stack(history))


def test_queue_starts_with_unit_vectors():
    torch.testing.assert_close(KeyQueue(50, 8).keys.norm(dim=1), torch.ones(50))


def test_a_queue_in_half_precision_takes_any_keys():
    queue = KeyQueue(4, 2, torch.float16)
    queue.enqueue(torch.tensor([[0.6, 0.8]]))
    assert queue.keys.dtype == torch.float16
    torch.testing.assert_close(queue.keys[0].float(), torch.tensor([0.6, 0.8]), atol=5e-4, rtol=0)

"""Ours beside the official way and beside the encoder alone, step for step."""

from __future__ import annotations

from collections.abc import Iterator

import agreement
import pytest
import torch
import torch.distributed as dist

from pcl_fast.data import Batch, normalise


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone, for the official step."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.usefixtures("process_group")
def test_two_steps_learn_what_the_official_way_learns(seed):
    torch.manual_seed(seed)
    agreement.check_agreement()


def test_the_encoder_alone_has_the_step_s_gradient(alone, monkeypatch):
    """What the benchmark calls encoder-only, a backward pass from a constant gradient of the features, is the step's
    own pass: given the loss's gradient it finds the step's.
    """
    learner, encoder_only = agreement.small_learner(alone), agreement.small_learner(alone).method.encoder
    seen: dict[str, list[torch.Tensor]] = {"upstream": [], "gradients": []}
    zero_grad = learner.optimizer.zero_grad

    def keep_gradients(**options) -> None:
        seen["gradients"] = [parameter.grad.clone() for parameter in learner.method.encoder.parameters()]
        zero_grad(**options)

    monkeypatch.setattr(learner.optimizer, "zero_grad", keep_gradients)

    def keep_upstream(*call) -> None:
        call[-1].register_hook(seen["upstream"].append)

    learner.method.encoder.register_forward_hook(keep_upstream)
    views = agreement.random_views()
    learner.step(Batch(tuple(views), torch.arange(len(views[0]))), 0)
    encoder_only(normalise(views[0], torch.float32)).backward(seen["upstream"][0])
    for found, expected in zip(encoder_only.parameters(), seen["gradients"], strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found.grad, expected, rtol=1e-5, atol=1e-8)

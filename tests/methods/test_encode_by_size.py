"""Views of several sizes, encoded in one batch per size."""

from __future__ import annotations

import torch
from steps import small_config

from pcl_fast.distributed import World
from pcl_fast.methods import build
from pcl_fast.nn.batch_norm import batch_norm_buffers

ROWS = 3
CPU = World(0, 1, torch.device("cpu"), None)


def method_of():
    return build(small_config(method="simclr"), CPU, 60).train()


def views_of(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (ROWS, side, side, 3), generator=generator, dtype=torch.uint8) for side in sizes]


class Passes(list):
    """The shapes of the batches that an encoder gets."""

    def of(self, encoder):
        def encode(images):
            self.append(tuple(images.shape))
            return encoder(images)

        return encode


def test_two_views_of_one_size_are_encoded_as_their_concatenation():
    """To the last bit, and batch norm's statistics too."""
    views, methods = views_of(12, 12), [method_of(), method_of()]
    found = methods[0].encode_by_size(methods[0].encoder, views)
    expected = methods[1].encode(methods[1].encoder, torch.cat(views)).chunk(2)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    buffers = [dict(batch_norm_buffers(method)) for method in methods]
    assert all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())


def test_every_size_is_one_batch_and_features_come_in_the_views_order():
    """Also where views of a size do not stand together; in eval mode each is what it is by itself."""
    method, passes, views = method_of().eval(), Passes(), views_of(12, 8, 12, 8, 8, 5)
    found = method.encode_by_size(passes.of(method.encoder), views)
    assert passes == [(2 * ROWS, 3, 12, 12), (3 * ROWS, 3, 8, 8), (ROWS, 3, 5, 5)]
    assert len(found) == len(views)
    for ours, view in zip(found, views, strict=True):
        torch.testing.assert_close(ours, method.encode(method.encoder, view), atol=1e-6, rtol=1e-5)


def test_gradients_of_all_sizes_reach_the_encoder():
    """They are the sum of the sizes' own."""
    method, views = method_of().eval(), views_of(12, 8, 12)
    weights = [torch.linspace(-1, 1, 8) * (1 + place) for place in range(3)]

    def gradient(places) -> torch.Tensor:
        method.zero_grad()
        found = method.encode_by_size(method.encoder, [views[place] for place in places])
        sum((features @ weights[place]).sum() for features, place in zip(found, places, strict=True)).backward()
        return torch.cat([p.grad.flatten() for p in method.encoder.parameters()])

    torch.testing.assert_close(gradient([0, 1, 2]), gradient([0, 2]) + gradient([1]), atol=1e-5, rtol=1e-4)

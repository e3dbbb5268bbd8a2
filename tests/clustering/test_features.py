"""The features of a data set, on one rank and on several."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ranks import run_ranks

from pcl_fast.clustering import FeatureShard
from pcl_fast.config import DataConfig, ModelConfig
from pcl_fast.data import clustering_loader, find_images, normalise
from pcl_fast.distributed import shard_bounds
from pcl_fast.nn.encoder import Encoder

CONFIG = DataConfig(size=16, resize=20, workers=0)


def encoder() -> Callable[[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(arch="cifar_resnet8", dim=16)).eval()
    return lambda images: encoder(normalise(images, torch.float32))


def features_of(world, root) -> torch.Tensor:
    encode = encoder()
    folder = find_images(root)
    begin, end = shard_bounds(len(folder), world.rank, world.size)
    shard = FeatureShard(end - begin, 16, world.device)
    loader = clustering_loader(folder, CONFIG, batch_size=8, world=world)
    address = shard.features.data_ptr()
    features, rate = shard.fill(encode, loader)
    again, _ = shard.fill(encode, loader)
    assert rate > 0
    assert features.data_ptr() == again.data_ptr() == address
    return features


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_of_all_ranks_equal_the_features_of_one(alone, image_folder, ranks):
    """53 images divide neither by 2 nor by 3."""
    whole = features_of(alone, image_folder)
    assert len(whole) == 53
    shards = run_ranks(ranks, features_of, image_folder)
    assert len({len(shard) for shard in shards}) == 2
    torch.testing.assert_close(torch.cat(shards), whole, rtol=1e-5, atol=1e-6)


def test_features_do_not_depend_on_the_batches(alone, image_folder):
    folder = find_images(image_folder)
    results = []
    for batch_size in (5, 53):
        loader = clustering_loader(folder, CONFIG, batch_size=batch_size, world=alone)
        results.append(FeatureShard(53, 16, alone.device).fill(encoder(), loader)[0].clone())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "sizes"), [(1, [5, 5, 5, 5, 3]), (5, [5, 5, 5, 5, 3]), (8, [10, 10, 3]), (99, [23])])
def test_batches_are_encoded_together(alone, rows, sizes):
    images, seen = torch.randint(0, 256, (23, 16, 16, 3), dtype=torch.uint8), []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return batch.flatten(1)[:, :16].float()

    features, _ = FeatureShard(23, 16, alone.device).fill(encode, images.split(5), rows=rows)
    assert seen == sizes
    assert torch.equal(features, images.flatten(1)[:, :16].float())


@pytest.mark.parametrize("images", [7, 9])
def test_a_loader_of_another_length_is_refused(alone, images):
    batches = torch.zeros(images, 16, 16, 3, dtype=torch.uint8).split(4)
    with pytest.raises(RuntimeError, match=f"{images} images for a shard of 8"):
        FeatureShard(8, 16, alone.device).fill(encoder(), batches)

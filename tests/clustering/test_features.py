"""Features of the data set, on one rank and several."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from pcl_fast.clustering import FeatureShard
from pcl_fast.config import DataConfig, ModelConfig
from pcl_fast.data import clustering_loader, find_images
from pcl_fast.distributed import shard_bounds
from pcl_fast.model import Encoder

CONFIG = DataConfig(size=16, resize=20, workers=0)


def features_of(world, root) -> torch.Tensor:
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(arch="cifar_resnet8", dim=16)).train()
    folder = find_images(root)
    begin, end = shard_bounds(len(folder), world.rank, world.size)
    shard = FeatureShard(end - begin, 16, world.device)
    loader = clustering_loader(folder, CONFIG, batch_size=8, world=world)
    autocast = torch.autocast("cpu", enabled=False)
    address = shard.features.data_ptr()
    features, rate = shard.fill(encoder, loader, autocast)
    again, _ = shard.fill(encoder, loader, autocast)
    assert rate > 0
    assert features.data_ptr() == again.data_ptr() == address
    assert encoder.training
    return features


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_of_all_ranks_equal_the_features_of_one(alone, image_folder, ranks):
    """53 images divide neither by 2 nor by 3."""
    whole = features_of(alone, image_folder)
    assert len(whole) == 53
    shards = run_ranks(ranks, features_of, image_folder)
    assert len({len(shard) for shard in shards}) == 2
    torch.testing.assert_close(torch.cat(shards), whole, rtol=1e-5, atol=1e-6)


def test_training_mode_and_its_batch_statistics_are_left_alone(alone, image_folder):
    """In eval mode an image's features do not depend on the batch it comes in."""
    encoder = Encoder(ModelConfig(arch="cifar_resnet8", dim=16)).train()
    folder = find_images(image_folder)
    results = []
    for batch_size in (5, 53):
        loader = clustering_loader(folder, CONFIG, batch_size=batch_size, world=alone)
        shard = FeatureShard(53, 16, alone.device)
        results.append(shard.fill(encoder, loader, torch.autocast("cpu", enabled=False))[0].clone())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert all(module.num_batches_tracked == 0 for module in encoder.modules() if hasattr(module, "running_mean"))


@pytest.mark.parametrize("images", [7, 9])
def test_a_loader_of_another_length_is_refused(alone, images):
    encoder = Encoder(ModelConfig(arch="cifar_resnet8", dim=16))
    batches = torch.zeros(images, 3, 16, 16).split(4)
    with pytest.raises(RuntimeError, match=f"{images} images for a shard of 8"):
        FeatureShard(8, 16, alone.device).fill(encoder, batches, torch.autocast("cpu", enabled=False))

"""PCL's own decisions, step by step and between epochs. Whole runs are in test_train.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from steps import batch, learner_of, momenta, part, same, small_config, weights

from pcl_fast.clustering import PrototypeSet, cluster, kmeans
from pcl_fast.clustering.prototypes import prototypes_in
from pcl_fast.config import PRESETS
from pcl_fast.data import Batch, normalise
from pcl_fast.distributed import shard_bounds
from pcl_fast.learner import Learner
from pcl_fast.losses import proto_nce
from pcl_fast.methods import build
from pcl_fast.methods import pcl as module
from pcl_fast.nn.batch_norm import batch_norm_buffers


def test_order_within_a_step(alone, monkeypatch):
    """The momentum encoder moves before the keys are computed; the loss sees the queue without this batch's keys."""
    learner = learner_of(small_config(), alone)
    method = learner.method
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(0.01)
    queue_before = method.queue.keys.clone()
    moved = [
        torch.lerp(k, q, 1 - method.average.momentum)
        for k, q in zip(method.momentum_encoder.parameters(), method.encoder.parameters(), strict=True)
    ]
    seen = {}

    def spy(query, key, queue, *args, **kwargs):
        momentum = [p.clone() for p in method.momentum_encoder.parameters()]
        seen.update(key=key.clone(), queue=queue.clone(), momentum=momentum)
        return original(query, key, queue, *args, **kwargs)

    original = module.pcl_loss
    monkeypatch.setattr(module, "pcl_loss", spy)
    learner.step(batch(), 0)
    assert torch.equal(seen["queue"], queue_before)
    for ours, expected in zip(seen["momentum"], moved, strict=True):
        torch.testing.assert_close(ours, expected)
    assert torch.equal(method.queue.keys[:6], seen["key"])
    assert torch.equal(method.queue.keys[6:], queue_before[6:])


def test_training_pulls_images_to_their_prototypes(alone):
    generator = torch.Generator().manual_seed(0)
    centroids = F.normalize(torch.randn(9, 8, generator=generator), dim=1)
    prototypes = [PrototypeSet(centroids, torch.full((9,), 0.2), torch.arange(6, dtype=torch.int32))]
    learner = learner_of(small_config(), alone, prototypes)
    losses = [learner.step(batch(), number)["prototype_loss"].item() for number in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def one_step(world, config, whole: Batch):
    """A step on this rank's half of a batch, the key encoder in eval mode so that a key depends on its image alone."""
    learner = learner_of(config, world)
    learner.method.momentum_encoder.eval()
    before = weights(learner)
    learner.step(part(whole, slice(0, 3) if world.rank == 0 else slice(3, 6)), 0)
    return before, weights(learner), momenta(learner), learner.method.queue.keys.clone()


def test_ranks_take_the_same_step_and_queue_all_keys_in_order(alone):
    config, whole = small_config(), batch()
    (before, one, momentum, queue), (_, other, other_momentum, other_queue) = run_ranks(2, one_step, config, whole)
    assert same([*one, *momentum, queue], [*other, *other_momentum, other_queue])
    assert not same(before, one)
    encoder = learner_of(config, alone).method.momentum_encoder.eval()
    keys = encoder(normalise(whole.views[1], torch.float32))
    torch.testing.assert_close(queue[:6], keys, rtol=1e-5, atol=1e-6)


class Exactly(module.PCL, name="pcl in float64"):
    """In float32 rounding decides on which side of zero some activations are."""

    settings = ()

    def encode(self, encoder: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        backbone = encoder.backbone(normalise(images, torch.float32).double())
        return F.normalize(encoder.head(backbone), dim=1)


def steps_of(world, config, whole: Batch, number_of_steps: int):
    learner = Learner(build(replace(config, method=Exactly.name), world, 6).double(), config, world)
    learner.set_rate(0)
    rows = slice(*shard_bounds(len(whole.index), world.rank, world.size))
    for number in range(number_of_steps):
        learner.step(part(whole, rows, rolled=number), number)
    learner.end_epoch()
    statistics = [buffer for _, buffer in batch_norm_buffers(learner.method) if buffer.is_floating_point()]
    return weights(learner), statistics, learner.method.queue.keys


def test_parts_of_one_rank_s_batch_train_like_so_many_ranks(alone):
    """Unshuffled, for ranks and parts do not draw the same permutations."""
    config = small_config(model=replace(small_config().model, shuffle_bn=False))
    split = replace(config, model=replace(config.model, bn_splits=2))
    whole = batch(rows=6)
    expected = run_ranks(2, steps_of, config, whole, 3)[0]
    for ours, theirs in zip(steps_of(alone, split, whole, 3), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    undivided = steps_of(alone, config, whole, 3)[0]
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(undivided, expected[0], strict=True))


def test_keys_are_shuffled_among_the_parts_of_a_batch(alone):
    """Else a key would be normalised with its query's part."""
    config = small_config(model=replace(small_config().model, bn_splits=2))
    unshuffled = replace(config, model=replace(config.model, shuffle_bn=False))
    shuffled, other = (steps_of(alone, each, batch(rows=6), 1)[2] for each in (config, unshuffled))
    assert (shuffled[:6] - other[:6]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn_splits": 4}, r"--model\.bn-splits 4 does not divide a rank's batch of 6"),
        (
            {"bn_splits": 2, "head": "mlp_bn"},
            r"--model\.bn-splits does not split the batch norm of --model\.head mlp_bn",
        ),
    ],
)
def test_splits_that_cannot_be_are_refused(changes, message):
    config = small_config()
    with pytest.raises(ValueError, match=message):
        module.PCL.check(replace(config, model=replace(config.model, **changes)), 100, 1)


def test_encoders_are_channels_last(alone):
    method = build(small_config(), alone, 6)
    kernels = [p for p in method.parameters() if p.ndim == 4 and p.shape[2] > 1 and p.shape[1] > 1]
    assert len(kernels) > 10
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_features_are_the_momentum_encoder_s_in_eval_mode(alone):
    learner = learner_of(small_config(), alone)
    learner.step(batch(), 0)
    images = batch(rows=4).views[0]
    found = learner.method.feature_encoder()(images)
    assert learner.method.momentum_encoder.training
    expected = learner.method.momentum_encoder.eval()(normalise(images, torch.float32))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- the E-step -------------------------------------------------------------------------------------------------------


def clusterings(alone, init: str, monkeypatch, prune_starts: bool = False) -> list[dict]:
    """Arguments of the k-means of three E-steps in a row."""
    calls = []

    def recorded(*arguments, **options):
        calls.append(options)
        return cluster(*arguments, **options)

    monkeypatch.setattr(module, "cluster", recorded)
    config = small_config()
    changes = {"ks": (3, 5), "redo": 2, "init": init, "warm_iterations": 4, "alpha": 7.0, "split_by": "size"}
    changes["prune_starts"] = prune_starts
    config = replace(config, cluster=replace(config.cluster, **changes))
    method = build(config, alone, 60)
    features = F.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    for epoch in (4, 5, 6):
        before = [centroids.clone() for centroids, _, _ in method.prototypes.sets()]
        rows = method.expect(features, epoch)
        assert [row["k"] for row in rows] == [3, 5]
        assert (calls[-1]["alpha"], calls[-1]["temperature"]) == (7.0, config.loss.temperature)
        assert (calls[-1]["split_by"], calls[-1]["prune_after"]) == ("size", 5 if prune_starts else None)
        if calls[-1]["init"] is not None:
            expected = kmeans(features, 5, iterations=4, init=before[1], seed=calls[-1]["seed"] + 1, split_by="size")
            assert torch.equal(method.clusterings()["5"], expected.assignment)
            calls[-1]["init"] = before
    return calls


def test_kmeans_starts_at_random_by_default(alone, monkeypatch):
    assert [name for name, (_, config) in PRESETS.items() if config.cluster.init != "random"] == ["pcl_v2_fast"]
    for call in clusterings(alone, "random", monkeypatch):
        assert (call["init"], call["redo"], call["iterations"]) == (None, 2, PRESETS["demo"][1].cluster.iterations)


def test_starts_of_kmeans_can_be_left_early(alone, monkeypatch):
    clusterings(alone, "random", monkeypatch, prune_starts=True)


def test_kmeans_can_start_from_the_last_prototypes(alone, monkeypatch):
    first, *others = clusterings(alone, "previous", monkeypatch)
    assert (first["init"], first["redo"]) == (None, 2)
    for call in others:
        assert (call["redo"], call["iterations"]) == (1, 4)
        assert [len(centroids) for centroids in call["init"]] == [3, 5]


def test_fixed_concentration_makes_it_the_loss_with_one_temperature(alone):
    """All prototypes have tau, and are otherwise those of the estimate."""
    config = replace(small_config(), loss=replace(small_config().loss, temperature=0.3))
    features = F.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    estimated, fixed = (
        build(replace(config, cluster=replace(config.cluster, ks=(20,), fixed_concentration=choice)), alone, 60)
        for choice in (False, True)
    )
    for method in (estimated, fixed):
        method.expect(features, 4)
    (expected,), (found,) = estimated.prototypes.sets(), fixed.prototypes.sets()
    assert torch.equal(found.centroids, expected.centroids)
    assert torch.equal(found.assignment, expected.assignment)
    assert len(expected.concentration.unique()) > 1
    assert torch.equal(found.concentration, torch.full((20,), 0.3))

    # Images of five different prototypes, against all others: cross-entropy at one temperature.
    index = torch.tensor([found.assignment.tolist().index(c) for c in range(5)])
    query = F.normalize(torch.randn(5, 8), dim=1)
    ours = proto_nce(query, found, index, None, seed=0).loss
    slow = F.cross_entropy(query @ found.centroids.T / 0.3, torch.arange(5), reduction="none")
    torch.testing.assert_close(ours, slow)
    assert (ours - proto_nce(query, expected, index, None, seed=0).loss).abs().max() > 1e-3


@pytest.mark.parametrize("init", ["random", "previous"])
def test_seeds_differ_by_epoch(alone, init, monkeypatch):
    assert len({call["seed"] for call in clusterings(alone, init, monkeypatch)}) == 3


def test_prototypes_stay_where_they_are(alone):
    """A captured step reads them by their addresses."""
    config = small_config()
    method = build(replace(config, cluster=replace(config.cluster, ks=(3, 5))), alone, 60)
    assert method.prototypes.for_loss() == []
    features = F.normalize(torch.randn(60, 8), dim=1)
    method.expect(features, 4)
    first = method.prototypes.for_loss()
    addresses = [tensor.data_ptr() for granularity in first for tensor in granularity]
    values = [granularity.centroids.clone() for granularity in first]
    method.expect(-features, 5)
    second = method.prototypes.for_loss()
    assert [tensor.data_ptr() for granularity in second for tensor in granularity] == addresses
    assert not same(values, [granularity.centroids for granularity in second])


def test_a_checkpoint_holds_the_prototypes_in_both_precisions(alone):
    """The loss reads half-precision ones on a GPU; a checkpoint has float32 alone."""
    config = small_config()
    method = build(replace(config, cluster=replace(config.cluster, ks=(3,))), alone, 60)
    method.expect(F.normalize(torch.randn(60, 8), dim=1), 4)
    halves = module.Prototypes((3,), 8, 60, torch.float16)
    halves.load_state_dict(method.prototypes.state_dict())
    (expected,), (found,) = method.prototypes.sets(), halves.for_loss()
    assert found.centroids.dtype is torch.float16
    assert torch.equal(found.centroids, expected.centroids.half())
    assert torch.equal(found.assignment, expected.assignment)
    assert prototypes_in(method.state_dict())[0].assignment.tolist() == expected.assignment.tolist()


def test_a_checkpoint_before_the_first_e_step_has_no_prototypes(alone):
    config = small_config()
    assert prototypes_in(build(config, alone, 60).state_dict()) == ()
    method = build(replace(config, cluster=replace(config.cluster, ks=(3, 5))), alone, 60)
    assert prototypes_in(method.state_dict()) == ()
    method.expect(F.normalize(torch.randn(60, 8), dim=1), 4)
    assert [list(found.centroids.shape) for found in prototypes_in(method.state_dict())] == [[3, 8], [5, 8]]

"""Siamese PCL: its pairs and pseudo-labels, its loss, two ranks against one, and whole runs."""

from __future__ import annotations

import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launches import same_rows, same_state, train
from ranks import run_ranks

from pcl_fast.config import PRESETS, Config, with_settings
from pcl_fast.data import Batch, find_images, normalise
from pcl_fast.data.loaders.order import EpochOrder
from pcl_fast.demo import small
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.learner import Learner
from pcl_fast.methods import build, method_class
from pcl_fast.nn.batch_norm import batch_norm_buffers
from pcl_fast.nn.encoder import Encoder
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import StepMetrics, read_rows
from pcl_fast.trainer import Trainer

FLAGS = shlex.split("""
    --data.views digits --data.size 16 --data.resize 20 --data.workers 0 --epochs 3 --optim.batch-size 12 --log-every 1
    --model.arch cifar_resnet8 --model.dim 16 --optim.warmup-epochs 1 --cluster.ks 5 --siamese.components 8
    --evaluation.every 1 --evaluation.neighbours 5
""")
OPTIONS = {"ranks": 2, "preset": "siamese_pcl", "tiny": FLAGS}
IMAGES = 40


def tiny(**changes) -> Config:
    settings = {"model.dim": 8, "optim.batch_size": 8, "cluster.ks": (5,), "siamese.components": 6, "optim.lr": 0.5}
    return replace(with_settings(small("siamese_pcl"), settings), **changes)


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (IMAGES, 3, 3, 3), generator=generator).float()
    return F.interpolate(coarse, size=12, mode="bilinear").permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def views_of(index: np.ndarray, number: int) -> Batch:
    """Two noisy views."""
    generator = torch.Generator().manual_seed(number)
    index = torch.from_numpy(np.ascontiguousarray(index))
    noise = torch.randint(0, 40, (2, IMAGES, 12, 12, 3), generator=generator)
    views = (pictures()[index].int() + noise[:, index]).clamp(max=255).to(torch.uint8)
    return Batch((views[0], views[1]), index)


def after_an_e_step(world: World, config: Config, epoch: int = 0) -> Learner:
    """A learner with the clusters of its shard of the pictures."""
    learner = Learner(build(config, world, IMAGES), config, world)
    shard = pictures()[slice(*shard_bounds(IMAGES, world.rank, world.size))]
    with torch.no_grad():
        features = learner.method.eval().feature_encoder()(shard)
    learner.method.train().expect(features.float(), epoch)
    learner.renew()
    return learner


def batches(learner: Learner, epoch: int = 0) -> list[np.ndarray]:
    method = learner.method
    rows = method.config.optim.batch_size // method.world.size
    order = EpochOrder(IMAGES, batch_size=rows, seed=0, world=method.world, given=method.order)
    return list(order.batches(epoch))


def test_the_preset_is_the_published_recipe_at_a_batch_of_256():
    config = PRESETS["siamese_pcl"][1]
    assert (config.loss.temperature, config.model.head, config.model.dim) == (0.5, "mlp_bn", 128)
    assert (config.cluster.ks, config.cluster.iterations, config.cluster.redo) == ((512,), 20, 1)
    assert config.siamese.components == 256
    assert (config.optim.optimizer, config.optim.weight_decay, config.optim.warmup_epochs) == ("lars", 1e-6, 10)
    # 1.0 for 512 pairs.
    assert config.optim.lr == 1.0 * config.optim.batch_size / (2 * 512)


def test_pairs_lie_together_on_a_rank_and_do_not_depend_on_the_number_of_ranks(alone):
    config = tiny()
    learner = after_an_e_step(alone, config)
    assignment = learner.method.assignment.numpy()
    whole = [batch.reshape(-1, 2) for batch in batches(learner)]
    assert len(whole) == IMAGES // 8
    for pairs in whole:
        assert (assignment[pairs[:, 0]] == assignment[pairs[:, 1]]).sum() == 2
    parts = []
    for rank in range(2):
        learner.method.world = World(rank, 2, alone.device, None)
        parts.append([batch.reshape(-1, 2) for batch in batches(learner)])
    for pairs, one, other in zip(whole, *parts, strict=True):
        assert np.array_equal(np.stack([one, other], axis=1).reshape(-1, 2), pairs)
    learner.method.world = alone
    assert not np.array_equal(batches(learner, epoch=1), batches(learner))


def test_pseudo_labels_are_those_of_their_images(alone):
    """By the index in the data set, in whatever order images come: the nearest centroid's is that of equal pictures."""
    learner = after_an_e_step(alone, tiny())
    method, index = learner.method, np.array([7, 3, 0, 39, 21, 12, 3, 9])
    seen = []
    method.classifier.register_forward_hook(lambda module, inputs, scores: seen.append(inputs[0].detach()))
    step = method(learner.inputs(views_of(index, 0), 0))
    labels = method.assignment[torch.from_numpy(index)].long().repeat(2)
    expected = 4 * F.cross_entropy(method.classifier(seen[0]), labels)
    torch.testing.assert_close(step.metrics["cluster_loss"], expected.detach())
    # Twins of a picture are in one cluster, and labels stand where the pictures stand.
    twins = torch.cat([pictures()[:20], pictures()[:20].flip(0)])
    with torch.no_grad():
        features = method.eval().feature_encoder()(twins)
    method.expect(features, 1)
    assert torch.equal(method.assignment[:20], method.assignment[20:].flip(0))


class Exactly(method_class("siamese_pcl"), name="siamese_pcl in float64"):
    """In float32 rounding decides on which side of zero some activations are."""

    settings = ()

    def encode(self, encoder, images: torch.Tensor):
        pooled = self.encoder.backbone(normalise(images, torch.float32).double())
        return pooled, F.normalize(self.encoder.head(pooled), dim=1)


def test_loss_and_gradient_are_those_of_the_formulas(alone):
    """Written out term by term in float64."""
    config = tiny(method=Exactly.name)
    learner = after_an_e_step(alone, config)
    method = learner.method.double()
    inputs = learner.inputs(views_of(batches(learner)[0], 0), 0)
    step = method(inputs)
    found = torch.autograd.grad(step.loss, list(method.parameters()))

    pooled, unit = method.encode(method.encoder.both, torch.cat(inputs.views))
    (h_i, v_i), (h_j, v_j) = ((half[0::2], half[1::2]) for half in pooled.chunk(2))
    (zh_i, zv_i), (zh_j, zv_j) = ((half[0::2], half[1::2]) for half in unit.chunk(2))
    first, second = method.assignment[inputs.index].long().view(-1, 2).T

    def contrast(a, b):
        rows = torch.cat([a, b])
        scores = (rows @ rows.T / 0.5).masked_fill(torch.eye(len(rows), dtype=torch.bool), -torch.inf)
        return F.cross_entropy(scores, torch.arange(len(rows)).roll(len(a)))

    def metric(a, b, answer):
        return F.binary_cross_entropy_with_logits(method.metric((a - b).abs())[:, 0], answer.double())

    alike, always = first == second, torch.ones(len(first))
    expected = contrast(zh_i, zh_j) + contrast(zv_i, zv_j) + metric(h_i, h_j, always) + metric(v_i, v_j, always)
    expected += sum(metric(a, b, alike) for a in (h_i, h_j) for b in (v_i, v_j))
    expected += sum(F.cross_entropy(method.classifier(h), first) for h in (h_i, h_j))
    expected += sum(F.cross_entropy(method.classifier(v), second) for v in (v_i, v_j))
    torch.testing.assert_close(step.loss, expected, rtol=1e-11, atol=0)
    for ours, theirs in zip(found, torch.autograd.grad(expected, list(method.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    parts = [step.metrics[name] for name in ("instance_loss", "siamese_loss", "cluster_loss")]
    torch.testing.assert_close(sum(parts), step.loss.detach())


def test_every_bias_moves_and_the_classifier_begins_anew(alone):
    learner = after_an_e_step(alone, tiny())
    method = learner.method
    learner.set_rate(5)
    for number, index in enumerate(batches(learner)):
        learner.step(views_of(index, number), number)
    biases = {name: bias for name, bias in method.named_parameters() if name.endswith("bias")}
    assert {"metric.bias", "classifier.bias"} <= set(biases)
    assert all(bias.abs().min() > 0 for bias in biases.values())

    momentum = [learner.optimizer.state[p]["momentum_buffer"] for p in method.classifier.parameters()]
    places = [tensor.data_ptr() for tensor in (*method.classifier.parameters(), *momentum)]
    before = method.classifier.weight.detach().clone()
    assert all(buffer.any() for buffer in momentum)
    with torch.no_grad():
        method.expect(method.eval().feature_encoder()(pictures()), 1)
    learner.renew()
    assert places == [tensor.data_ptr() for tensor in (*method.classifier.parameters(), *momentum)]
    assert not any(buffer.any() for buffer in momentum)
    assert not method.classifier.bias.any()
    assert not torch.equal(method.classifier.weight, before)
    assert method.classifier.weight.std().item() == pytest.approx(0.01, rel=0.2)


def steps_of(world: World, config: Config, number_of_steps: int):
    learner = after_an_e_step(world, replace(config, method=Exactly.name))
    learner.method.double()
    learner = Learner(learner.method, config, world)  # with momentum in float64
    losses = []
    for number, index in enumerate(batches(learner)[:number_of_steps]):
        learner.set_rate(0, number, number_of_steps)
        losses.append(learner.step(views_of(index, number), number)["loss"])
    statistics = [buffer for _, buffer in batch_norm_buffers(learner.method)]
    weights = [p.detach() for p in learner.method.parameters()]
    return torch.stack(losses), weights, statistics, learner.method.assignment


def test_two_ranks_learn_what_one_learns(alone):
    """Clusters, pairs, losses and weights, with batch norm over both."""
    config = tiny()
    one, other = run_ranks(2, steps_of, config, 2)
    expected = steps_of(alone, config, 2)
    assert torch.equal(one[3], other[3])
    assert torch.equal(one[3], expected[3])
    for ours, theirs in zip([*one[1], *one[2]], [*other[1], *other[2]], strict=True):
        assert torch.equal(ours, theirs)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close((one[0] + other[0]) / 2, expected[0], **close)
    for ours, theirs in zip([*one[1], *one[2]], [*expected[1], *expected[2]], strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_the_e_step_sees_the_backbone_s_unit_features(alone):
    learner = after_an_e_step(alone, tiny())
    method = learner.method.eval()
    spec = method.features()
    with torch.no_grad():
        features = method.feature_encoder()(pictures())
        pooled = method.encoder.backbone(normalise(pictures(), torch.float32))
    assert features.shape == (IMAGES, spec.width)
    torch.testing.assert_close(features, F.normalize(pooled, dim=1), rtol=1e-4, atol=1e-5)
    assert isinstance(method.encoders()[spec.encoder], Encoder)


def test_features_that_have_collapsed_end_the_run(alone):
    learner = after_an_e_step(alone, tiny())
    with pytest.raises(ValueError, match=r"features have collapsed.*lower learning rate \(--optim\.lr 0\.5\)"):
        learner.method.expect(torch.ones(IMAGES, 64), 1)


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        ({"cluster.ks": (21,)}, 1, r"--cluster\.ks 21: pairs .* of 40 images .* use 2 to 20"),
        ({"cluster.ks": (41,)}, 1, r"--cluster\.ks 41: pairs .* use 2 to 20"),
        ({"cluster.ks": (1,)}, 1, r"--cluster\.ks 1: pairs"),
        ({"cluster.ks": (5, 9)}, 1, r"--cluster\.ks 5 9: siamese_pcl makes one clustering; give one number"),
        ({"optim.batch_size": 9}, 1, r"--optim\.batch-size 9 .* 1 ranks share equally; use a multiple of 2"),
        ({"optim.batch_size": 2}, 1, r"--optim\.batch-size 2 .* 4 or more"),
        ({"optim.batch_size": 6}, 2, r"--optim\.batch-size 6 .* 2 ranks share equally; use a multiple of 4"),
        ({"siamese.components": 41}, 1, r"--siamese\.components 41 .* the 40 images; use at most 40"),
    ],
)
def test_what_cannot_work_is_refused_before_training(settings, ranks, message):
    kind = method_class("siamese_pcl")
    kind.check(tiny(), IMAGES, 2)
    with pytest.raises(ValueError, match=message):
        kind.check(with_settings(tiny(), settings), IMAGES, ranks)


def test_more_components_than_features_are_refused():
    config = with_settings(tiny(), {"siamese.components": 65})
    with pytest.raises(ValueError, match=r"--siamese\.components 65 .* 64 features of --model\.arch cifar_resnet8"):
        method_class("siamese_pcl").check(config, 1000, 1)


def in_this_process(folder: Path, output: Path, alone: World, *, shuffled: bool = False) -> tuple[Trainer, bool]:
    """Train, or go on, on one rank, with true labels or shuffled ones beside the images."""
    images = find_images(folder)
    if shuffled:
        images = replace(images, labels=np.random.default_rng(0).permutation(images.labels).tolist())
    settings = {"optim.batch_size": 12, "data.size": 16, "data.resize": 20, "epochs": 2, "output": output}
    config = with_settings(tiny(), {**settings, "evaluation.every": 1, "evaluation.neighbours": 5, "log_every": 1})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # always: other numbers of threads round otherwise
    try:
        trainer = Trainer(config, images, alone)
        return trainer, trainer.fit()
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def on_one_rank(image_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("siamese") / "one"
    assert in_this_process(image_folder, output, World(0, 1, torch.device("cpu"), None))[1]
    return output


def test_no_label_is_used(on_one_rank, image_folder, tmp_path, alone):
    """Shuffled labels change the scores of the online evaluation and nothing that is learned."""
    assert in_this_process(image_folder, tmp_path, alone, shuffled=True)[1]
    same_state(on_one_rank, tmp_path)
    true, others = (
        [row["knn"] for row in read_rows(folder) if row["kind"] == "evaluation"] for folder in (on_one_rank, tmp_path)
    )
    assert len(true) == len(others) == 3
    assert true != others


@pytest.mark.parametrize("step", [2, 6])
def test_a_run_that_is_stopped_within_an_epoch_goes_on_bit_for_bit(
    step, on_one_rank, image_folder, tmp_path, alone, monkeypatch
):
    """The order of the rest of the epoch follows from the clusters in the checkpoint."""
    add = StepMetrics.add

    def stopping(self: StepMetrics, reached: int, *arguments) -> None:
        add(self, reached, *arguments)
        if reached == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StepMetrics, "add", stopping)
        trainer, finished = in_this_process(image_folder, tmp_path, alone)
    assert not finished
    assert 0 < trainer.progress.step < 4
    assert in_this_process(image_folder, tmp_path, alone)[1]
    same_state(on_one_rank, tmp_path)
    same_rows(on_one_rank, tmp_path)


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory) -> Path:
    """An uninterrupted run on two ranks."""
    output = tmp_path_factory.mktemp("siamese")
    train(image_folder, output, **OPTIONS)
    return output


@pytest.mark.slow
def test_end_to_end(whole):
    rows = read_rows(whole)
    assert len([row for row in rows if row["kind"] == "step"]) == 12
    assert [row["epoch"] for row in rows if row["kind"] == "clustering"] == [0, 1, 2, 3]
    assert [sorted(row["ami"]) for row in rows if row["kind"] == "evaluation"] == [["5"]] * 4
    assert set(load_checkpoint(whole)["encoders"]) == {"query"}
    assert (whole / "report.png").stat().st_size > 0

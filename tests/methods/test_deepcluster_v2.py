"""DeepCluster-v2: a step against its formula in float64, what E-steps cluster against a loop over the epoch's steps,
two ranks against one, and whole runs.
"""

from __future__ import annotations

import copy
import os
import shlex
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from launches import same, same_rows, same_state, train
from ranks import run_ranks
from steps import batch, part
from steps import same as equal

from pcl_fast.captured import CapturedStep
from pcl_fast.config import PRESETS, Config, with_settings
from pcl_fast.data import normalise
from pcl_fast.demo import small
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.learner import Learner
from pcl_fast.methods import build, check_method, method_class
from pcl_fast.methods import deepcluster_v2 as module
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import read_rows
from pcl_fast.schedule import check_sizes
from pcl_fast.train import run

DeepClusterV2 = module.DeepClusterV2
# Four steps of 12 images an epoch; of the 53 images it drops five.
STEPS, IMAGES, DROPPED = 4, 53, 5
# A signal after so many steps stops a run a step later, in the midst of the second epoch.
SIGNALLED = 5
HEADS = (3, 5, 5)
ROWS, KNOWN = 6, 10  # of a batch, and of the data set, in tests of single steps
FLAGS = shlex.split("""
    --data.views digits --data.size 16 --data.resize 20 --data.workers 0 --epochs 2 --optim.batch-size 12 --log-every 1
    --model.arch cifar_resnet8 --model.dim 16 --optim.warmup-epochs 1 --cluster.ks 3 5 5
    --evaluation.every 1 --evaluation.neighbours 5 --evaluation.ks 4
""")
OPTIONS = {"ranks": 2, "preset": "deepcluster_v2", "tiny": FLAGS}


def tiny(**changes: Any) -> Config:
    """In names of changes a double underscore is a dot."""
    usual = {"model.dim": 8, "optim.batch_size": ROWS, "cluster.ks": (3, 4, 3)}
    return with_settings(small("deepcluster_v2"), usual | {k.replace("__", "."): v for k, v in changes.items()})


def recipe(data: Path, output: Path, **changes: Any) -> Config:
    usual = {
        "data__root": data,
        "data__size": 16,
        "data__resize": 20,
        "data__loader": "torchvision",
        "output": output,
        "epochs": 2,
        "log_every": 1,
        "optim__batch_size": 12,
        "cluster__ks": HEADS,
        "evaluation__every": 0,
    }
    return tiny(**usual | changes)


def features_of(world: World, images: int = KNOWN, dim: int = 8) -> torch.Tensor:
    """This rank's shard of the first E-step's features."""
    features = torch.randn(images, dim, generator=torch.Generator().manual_seed(3))
    return F.normalize(features[slice(*shard_bounds(images, world.rank, world.size))], dim=1)


def begun(config: Config, world: World) -> Learner:
    """After the first E-step."""
    learner = Learner(build(config, world, KNOWN), config, world)
    learner.method.expect(features_of(world), 0)
    learner.set_rate(5)
    return learner


def shuffled(seed: int = 0):
    """A batch of six of ten images, in no order."""
    index = torch.randperm(KNOWN, generator=torch.Generator().manual_seed(seed))[:ROWS]
    return batch(seed)._replace(index=index)


# --- what it is ---------------------------------------------------------------------------------------------------


def test_the_preset_is_the_published_recipe_for_a_smaller_batch(alone):
    config = PRESETS["deepcluster_v2"][1]
    assert (config.epochs, config.optim.batch_size) == (400, 256)
    assert config.optim.lr == pytest.approx(4.8 * config.optim.batch_size / 4096)
    assert (config.optim.optimizer, config.optim.momentum, config.optim.weight_decay) == ("lars", 0.9, 1e-6)
    assert (config.optim.warmup_epochs, config.optim.schedule) == (10, "cosine")
    assert (config.cluster.ks, config.cluster.iterations, config.cluster.redo) == ((3000, 3000, 3000), 10, 1)
    assert (config.loss.temperature, config.model.dim, config.model.sync_bn) == (0.1, 128, True)
    view, other = build(replace(config, model=tiny().model, cluster=tiny().cluster), alone, KNOWN).views
    assert view == other
    assert (view.size, view.min_area, view.jitter, view.jitter_share) == (224, 0.08, (0.8, 0.8, 0.8, 0.2), 0.8)
    assert (view.grey_share, view.blur_share, view.flip_share) == (0.2, 0.5, 0.5)


def test_the_head_has_one_batch_norm_between_two_layers(alone):
    head = build(tiny(), alone, KNOWN).encoder.head
    assert [type(layer).__name__ for layer in head] == ["Linear", "SyncBatchNorm1d", "ReLU", "Linear"]


def test_only_the_encoder_is_learned_and_every_parameter_of_it(alone):
    learner = begun(tiny(), alone)
    method = learner.method
    assert {name.partition(".")[0] for name, _ in method.named_parameters()} == {"encoder"}
    assert {name.partition(".")[0] for name in method.state_dict()} == {"encoder", "prototypes", "banks", "visited"}
    method(learner.inputs(shuffled(), 0)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())


def test_heads_move_at_e_steps_alone_and_stay_in_their_places(alone):
    learner = begun(tiny(), alone)
    heads = learner.method.prototypes.sets()
    before = [tensor.clone() for head in heads for tensor in head]
    places = [tensor.data_ptr() for tensor in learner.method.state_dict().values() if isinstance(tensor, torch.Tensor)]
    for number in range(3):
        learner.step(shuffled(number), number)
    assert equal(before, [tensor for head in heads for tensor in head])
    learner.method.expect(None, 1)
    after = learner.method.prototypes.sets()
    assert not any(torch.equal(old, new.centroids) for old, new in zip(before[::3], after, strict=True))
    now = [tensor.data_ptr() for tensor in learner.method.state_dict().values() if isinstance(tensor, torch.Tensor)]
    assert now == places
    for head in after:
        torch.testing.assert_close(head.centroids.norm(dim=1), torch.ones(len(head.centroids)))


def test_before_the_first_e_step_there_is_nothing_to_learn(alone):
    learner = Learner(build(tiny(), alone, KNOWN), tiny(), alone)
    with pytest.raises(RuntimeError, match="no pseudo-labels before the first E-step"):
        learner.step(shuffled(), 0)


# --- a step -------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_heads_and_crops_of_the_images_own_labels(alone):
    """In float64, with loops; one image has no label."""
    config = tiny()
    learner, other = begun(config, alone), begun(config, alone)
    given = shuffled()
    for method in (learner.method, other.method):
        for head in method.prototypes.sets():
            head.assignment[given.index[2]] = -1
    step = learner.method(learner.inputs(given, 0))
    crops = other.method.encode(other.method.encoder, torch.cat(given.views)).double().chunk(2)
    losses, right, labelled = [], 0, 0
    for head in other.method.prototypes.sets():
        for crop in crops:
            for row, image in zip(crop, given.index.tolist(), strict=True):
                label, scores = head.assignment[image], head.centroids.double() @ row / 0.1
                losses.append(scores.logsumexp(0) - scores[label] if label >= 0 else torch.zeros(()))
                right, labelled = right + int(scores.argmax() == label), labelled + int(label >= 0)
    assert labelled == 3 * 2 * 5
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(step.loss.double(), expected, rtol=1e-5, atol=0)
    assert step.metrics["accuracy"].item() == pytest.approx(100 * right / labelled)
    step.loss.backward()
    expected.backward()
    for ours, theirs in zip(learner.method.parameters(), other.method.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_an_image_without_a_label_moves_nothing(alone):
    """Its row has no gradient; with none in the batch the loss is 0 and finite."""
    learner = begun(tiny(), alone)
    given = shuffled()
    for head in learner.method.prototypes.sets():
        head.assignment[given.index] = -1
    step = learner.method(learner.inputs(given, 0))
    step.loss.backward()
    assert (step.loss.item(), step.metrics["accuracy"].item()) == (0, 0)
    assert not any(p.grad.any() for p in learner.method.parameters())


def test_the_banks_hold_the_last_embeddings_of_every_image(alone):
    learner = begun(tiny(), alone)
    method = learner.method
    first = features_of(alone)
    assert all(torch.equal(bank.keys, first) for bank in method.banks)
    assert not method.visited.any()
    expected = [first.clone(), first.clone()]
    seen = set()
    for number in range(3):
        given = shuffled(number)
        embeddings = copy.deepcopy(method).encode(copy.deepcopy(method.encoder), torch.cat(given.views)).detach()
        for crop, bank in zip(embeddings.chunk(2), expected, strict=True):
            for row, image in zip(crop, given.index.tolist(), strict=True):
                bank[image] = row
                seen.add(image)
        learner.step(given, number)
    for bank, rows in zip(method.banks, expected, strict=True):
        torch.testing.assert_close(bank.keys, rows)
        torch.testing.assert_close(bank.keys.norm(dim=1), torch.ones(KNOWN))
    assert not torch.allclose(*expected)
    assert set(method.visited.nonzero().view(-1).tolist()) == seen


def test_captured_steps_read_the_next_e_step_s_prototypes(alone):
    """A stand-in for a graph does the captured work again with the very tensors that it was captured with."""

    def capture(work, device):
        before = copy.deepcopy(captured_learner.state())
        result = work()
        captured_learner.load(before, [captured_learner.own_state()])
        captures.append(1)
        return lambda: result.copy_(work()), result

    learner, captured_learner, captures = begun(tiny(), alone), begun(tiny(), alone), []
    captured = CapturedStep(captured_learner, capture)
    for number in range(10):
        if number == 7:
            for one in (learner, captured_learner):
                one.method.expect(None, 1)
        expected = learner.step(shuffled(number), number)
        found = captured.step(shuffled(number), number)
        assert torch.equal(expected["loss"], found["loss"])
    assert len(captures) == 1
    same(learner.state(), captured_learner.state(), "state")


def test_learns_its_labels(alone):
    learner = begun(tiny(optim__lr=0.5), alone)
    values = [learner.step(shuffled(), number) for number in range(20)]
    assert values[-1]["loss"] < 0.5 * values[0]["loss"]
    assert values[-1]["accuracy"] > 80


# --- two ranks ----------------------------------------------------------------------------------------------------


class Exactly(DeepClusterV2, name="deepcluster_v2 in float64"):
    """In float32 rounding decides on which side of zero some activations are."""

    settings = ()

    def encode(self, encoder: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        backbone = encoder.backbone(normalise(images, torch.float32).double())
        return F.normalize(encoder.head(backbone), dim=1)

    def _cluster(self, head, k, features, *others):
        return super()._cluster(head, k, features.float(), *others)


def steps_of(world: World, config: Config) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Two epochs of two steps, and the E-step after them."""
    learner = Learner(build(replace(config, method=Exactly.name), world, KNOWN).double(), config, world)
    learner.method.expect(features_of(world), 0)
    rows = slice(*shard_bounds(ROWS, world.rank, world.size))
    losses = []
    for number in range(4):
        learner.set_rate(0, number, 4)
        losses.append(learner.step(part(shuffled(number), rows), number)["loss"])
        if number % 2:
            learner.method.expect(None, number)
    state = learner.method.state_dict()
    return torch.stack(losses), {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def test_two_ranks_learn_what_one_learns(alone):
    """With batch norm over both; images that were not visited have no label, on whichever rank they are."""
    config = tiny(cluster__ks=(3, 4))
    (losses, state), (other_losses, other) = run_ranks(2, steps_of, config)
    same(state, other, "state")
    expected_losses, expected = steps_of(alone, config)
    assert any((value < 0).any() for name, value in expected.items() if name.endswith("assignment"))
    torch.testing.assert_close((losses + other_losses) / 2, expected_losses, rtol=1e-6, atol=1e-8)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


# --- whole runs ---------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What one rank did: in its order the steps' (index, embeddings of both crops); and of every E-step, by the number
    of steps before it, (features, what was clustered for each head, the prototypes and labels after it).
    """

    steps: list[tuple[torch.Tensor, torch.Tensor]]
    e_steps: dict[int, tuple[torch.Tensor | None, list[torch.Tensor], list]]


def observe(world: World, config: Config, stop_after: int | None = None) -> Seen:
    """Train, or go on; SIGTERM comes to the main rank after so many of this process's steps."""
    seen, clustered = Seen([], {}), []
    kmeans, expect, after_update = module.kmeans, DeepClusterV2.expect, DeepClusterV2.after_update

    def watched_kmeans(features, *arguments, **options):
        clustered.append(features.clone())
        return kmeans(features, *arguments, **options)

    def watched_expect(self, features, epoch):
        clustered.clear()
        rows = expect(self, features, epoch)
        given = None if features is None else features.clone()
        heads = [(head.centroids.clone(), head.assignment.clone()) for head in self.prototypes.sets()]
        seen.e_steps[len(seen.steps)] = (given, list(clustered), heads)
        return rows

    def watched_update(self, carry, applied):
        after_update(self, carry, applied)
        seen.steps.append((carry[1].clone(), carry[0].transpose(0, 1).clone()))
        if len(seen.steps) == stop_after and world.is_main:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kmeans", watched_kmeans)
        patch.setattr(DeepClusterV2, "expect", watched_expect)
        patch.setattr(DeepClusterV2, "after_update", watched_update)
        patch.setattr("pcl_fast.train.write_report", lambda *_: "not drawn")
        assert run(config, world) == (stop_after is None)
    return seen


@pytest.fixture(scope="module", autouse=True)
def one_thread_all_along() -> Iterator[None]:
    """As the fixture `one_thread`, for the fixtures here too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory) -> dict[int, tuple[Path, list[Seen]]]:
    """Runs that nothing stopped, on one rank and on two."""
    outputs = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    seen = [observe(World(0, 1, torch.device("cpu"), None), recipe(image_folder, outputs[1]))]
    return {1: (outputs[1], seen), 2: (outputs[2], run_ranks(2, observe, recipe(image_folder, outputs[2])))}


@pytest.mark.parametrize("ranks", [1, 2])
def test_e_steps_cluster_what_a_loop_over_the_epoch_s_steps_leaves(whole, ranks):
    """Head m has crop m mod 2; labels are those of the images; an image that the epoch dropped has none."""
    _, seen = whole[ranks]
    assert list(seen[0].e_steps) == [0, STEPS, 2 * STEPS]
    bank: list[dict[int, torch.Tensor]] = [{}, {}]
    for number in range(2 * STEPS + 1):
        if number in seen[0].e_steps:
            shards = [one.e_steps[number] for one in seen]
            if number == 0:
                rows = torch.cat([features for features, _, _ in shards])
                bank = [dict(enumerate(rows)), dict(enumerate(rows))]
            assert all((features is None) == (number > 0) for features, _, _ in shards)
            assert len(bank[0]) == (IMAGES - DROPPED if number else IMAGES)
            for head, (centroids, labels) in enumerate(shards[0][2]):
                images = sorted(bank[head % 2])
                rows = torch.stack([bank[head % 2][image] for image in images])
                assert torch.equal(torch.cat([clustered[head] for _, clustered, _ in shards]), rows)
                assert len(centroids) == HEADS[head]
                assert torch.equal((labels >= 0).nonzero().view(-1), torch.tensor(images))
                nearest = (rows.double() @ centroids.double().T).argmax(1)
                assert torch.equal(labels[images].long(), nearest)
                assert all(equal(others[head], (centroids, labels)) for _, _, others in shards)
            bank = [{}, {}]
        if number < 2 * STEPS:
            for index, crops in (one.steps[number] for one in seen):
                for crop, of_crop in zip(crops, bank, strict=True):
                    of_crop.update(zip(index.tolist(), crop, strict=True))


def test_there_is_one_pass_and_then_none(whole):
    rows = read_rows(whole[2][0])
    assert [row["epoch"] for row in rows if row["kind"] == "features"] == [0]
    clusterings = [row for row in rows if row["kind"] == "clustering"]
    assert [row["k"] for row in clusterings] == [*HEADS] * 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(whole, image_folder, tmp_path, alone, ranks):
    config = recipe(image_folder, tmp_path)
    if ranks == 1:
        observe(alone, config, SIGNALLED)
    else:
        run_ranks(2, observe, config, SIGNALLED)
    state = load_checkpoint(tmp_path)
    assert (state["epoch"], state["step"]) == (1, 2)
    assert state["method"]["visited"].sum() == 2 * 12
    if ranks == 1:
        observe(alone, config)
    else:
        run_ranks(2, observe, config)
    same_state(whole[ranks][0], tmp_path)
    same_rows(whole[ranks][0], tmp_path)


@pytest.mark.slow
def test_by_the_command_line(image_folder, tmp_path):
    """That such a run goes on is tested above, and of every method in test_every_method.py."""
    train(image_folder, tmp_path / "whole", **OPTIONS)
    rows = read_rows(tmp_path / "whole")
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [sorted(row["ami"]) for row in evaluations] == [["3", "4", "5, head 2", "5, head 3"]] * 3
    assert set(load_checkpoint(tmp_path / "whole")["encoders"]) == {"query"}
    assert (tmp_path / "whole" / "report.png").stat().st_size > 0


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster__ks": (3, 49)}, r"--cluster\.ks 49 is more prototypes than .*: 48 of 53, .* 12; use 48 or less"),
        ({"cluster__ks": ()}, r"--cluster\.ks \(none\): every head needs 2 prototypes or more"),
        ({"cluster__ks": (5, 1)}, r"--cluster\.ks 5 1: every head needs 2 prototypes or more"),
    ],
)
def test_what_cannot_be_clustered_is_refused(changes, message):
    DeepClusterV2.check(tiny(optim__batch_size=12, cluster__ks=(48,)), IMAGES, 1)
    with pytest.raises(ValueError, match=message):
        DeepClusterV2.check(tiny(optim__batch_size=12, **changes), IMAGES, 1)


def test_more_prototypes_than_images_end_a_run_before_it_begins(image_folder, tmp_path, alone):
    with pytest.raises(ValueError, match=r"--cluster\.ks 60 is more prototypes than an epoch has images"):
        run(recipe(image_folder, tmp_path, cluster__ks=(60,)), alone)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_batch_that_ranks_do_not_share_equally_is_refused():
    with pytest.raises(ValueError, match=r"--optim\.batch-size 12 does not divide among 5 ranks; use a multiple of 5"):
        check_sizes(tiny(optim__batch_size=12), IMAGES, 5)


def test_settings_of_another_method_are_refused():
    with pytest.raises(ValueError, match=r"--cluster\.alpha is a setting of .*pcl.* method is deepcluster_v2, whose"):
        check_method(tiny(cluster__alpha=5.0))
    assert method_class("deepcluster_v2") is DeepClusterV2

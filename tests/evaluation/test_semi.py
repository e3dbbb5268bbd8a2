"""The task semi: through the command, after a signal, and on two ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from coloured import context_of, write_checkpoint, write_labelled
from ranks import run_ranks

import pcl_fast.evaluation.fine_tuning as fine_tuning
import pcl_fast.evaluation.tasks.semi as semi
from pcl_fast.data import ImageFolder, find_images
from pcl_fast.distributed import World
from pcl_fast.errors import ImageError
from pcl_fast.evaluate import run
from pcl_fast.evaluation.labelled import open_labelled
from pcl_fast.evaluation.tasks.semi import Semi

ALONE = World(0, 1, torch.device("cpu"), None)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run"))


def task(folder, checkpoint, output=None, **options) -> Semi:
    small = {"loader": "torchvision", "workers": 0, "size": 16, "resize": 16, "epochs": 3, "milestones": (2,)}
    return Semi(checkpoint=checkpoint, data=folder, output=output, **{**small, "batch_size": 12, **options})


def report(output) -> dict:
    return json.loads((output / "semi.json").read_text())


def test_scores_beside_the_paper_s(folder, checkpoint, tmp_path):
    """1% of 200 images is lifted to one of each of the 10 classes, which is a smaller batch as well."""
    assert run(task(folder, checkpoint, tmp_path, share=(0.01, 0.1)))
    found = report(tmp_path)
    columns = ["1%: top-1", "1%: top-5", "10%: top-1", "10%: top-5"]
    ours, published = found["scores"][0], {row["name"]: row for row in found["paper"]}
    assert list(ours) == ["name", *columns]
    assert all(0 <= ours[name] <= 100 for name in columns)
    assert [published["PCL v1"][name] for name in columns] == [None, 75.3, None, 85.6]
    assert [published["MoCo"][name] for name in columns] == [None, 56.9, None, 83.0]
    runs = [(run["batch_size"], run["steps"], run["encoder_lr"], run["head_lr"]) for run in found["details"]["runs"]]
    assert runs == [(10, 3, 0.01, 1.0), (12, 3, 0.01, 0.1)]
    protocol = "\n".join(found["protocol"])
    assert re.search(
        r"1%: a class-balanced draw by the seed 0, 10 images, 1 of each class; batches of 10, because", protocol
    )
    assert re.search(r"10%: .* 20 images, 2 of each class; batches of 12; 3 steps; .* times 0\.046875 for", protocol)
    assert (tmp_path / "semi.png").stat().st_size > 1000
    assert not (tmp_path / "semi.part.pt").exists()


def test_other_shares_have_no_scores_of_the_paper(folder, checkpoint, tmp_path):
    assert run(task(folder, checkpoint, tmp_path, share=(0.2,), epochs=1, head_lr=(3.0,)))
    assert report(tmp_path)["paper"] == []
    assert report(tmp_path)["details"]["runs"][0]["head_lr"] == 3.0


def test_lists(folder, checkpoint, tmp_path):
    """The file's name is the title, and the share follows from its length."""
    labelled, files = open_labelled(folder), []
    for name, count in (("few.txt", 2), ("more.txt", 4)):
        files.append(tmp_path / name)
        files[-1].write_text("\n".join(f"{label}_{number}.png" for label in range(9) for number in range(count)))
    few, more = task(folder, checkpoint, lists=tuple(files), head_lr=(2.0, 3.0))._parts(labelled, 1)
    assert (few.title, more.title) == ("few.txt", "more.txt")
    assert (few.share, more.share) == (0.09, 0.18)
    assert (few.recipe.head_lr, more.recipe.head_lr) == (2.0, 3.0)
    assert few.labels.tolist() == [label for label in range(9) for _ in range(2)]
    assert list(few.images.paths) == [f"{label}/{label}_{number}.png" for label in range(9) for number in range(2)]
    assert "0 to 2 of a class (1 of 10 classes have none)" in semi._describe(few, labelled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": (0.1, 1.5)}, r"--share must be numbers in \(0, 1\]"),
        ({"share": ()}, r"--share must be numbers"),
        ({"share": (0.1, 0.1)}, r"--share has 10% 2 times"),
        ({"head_lr": (1.0, 2.0, 3.0)}, r"--head-lr must be one number, or one for each of 1%, 10%"),
        ({"head_lr": (1.0, 0.0)}, r"--head-lr must be positive, got 0"),
        ({"encoder_lr": float("nan")}, r"--encoder-lr must be positive, got nan"),
        ({"epochs": 0}, r"--epochs must be positive"),
        ({"batch_size": 0}, r"--batch-size must be positive"),
        ({"drop": 0.0}, r"--drop must be in \(0, 1\], got 0"),
        ({"min_crop_area": 1.2}, r"--min-crop-area must be in"),
        ({"momentum": 1.0}, r"--momentum must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, r"--weight-decay must not be negative"),
    ],
)
def test_options_that_cannot_work(folder, checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        task(folder, checkpoint, **options).check()


def test_a_class_with_too_few_images_is_found_before_training(folder, checkpoint, tmp_path, monkeypatch):
    """Although it is the second share that it is too small for."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    for number in range(5, 20):
        (data / "train" / "3" / f"3_{number}.png").unlink()
    monkeypatch.setattr(semi, "fine_tune", None)
    with pytest.raises(ImageError, match="but 1 of 10 classes have fewer, the first is 3 with 5"):
        run(task(data, checkpoint, tmp_path, share=(0.1, 0.5)))


# --- interruptions ------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(monkeypatch) -> list[dict]:
    """The weights that are tested."""
    found, test = [], semi.top_accuracies

    def keep(model, *args, **options):
        found.append(model.state_dict())
        return test(model, *args, **options)

    monkeypatch.setattr(semi, "top_accuracies", keep)
    return found


def signal_at(look: int, monkeypatch) -> list[int]:
    """Returns how many steps of their shares are done at the looks, of which one, if any, meets the signal."""
    looks, before = [], fine_tuning._Tuning.look

    def signalling(self, losses):
        looks.append(self.done)
        if len(looks) == look:
            os.kill(os.getpid(), signal.SIGTERM)
        before(self, losses)

    monkeypatch.setattr(fine_tuning._Tuning, "look", signalling)
    return looks


@pytest.mark.parametrize("look", [1, 2, 4])
def test_a_stopped_task_goes_on(folder, checkpoint, tmp_path, monkeypatch, tuned, look):
    """Looks are after 2 and 3 steps of the first share, and after 2, 4, 6 of the second: within the first, at its end,
    and within the second.
    """
    monkeypatch.setattr(fine_tuning, "LOOK_EVERY", 2)
    options = {"share": (0.05, 0.12), "encoder_lr": 0.2}
    assert run(task(folder, checkpoint, tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        signal_at(look, patch)
        assert not run(task(folder, checkpoint, tmp_path / "parts", **options))
    assert not (tmp_path / "parts" / "semi.json").exists()
    assert len(tuned) == (3 if look > 2 else 2)
    with pytest.raises(ValueError, match=r"epochs: 3 -> 4"):
        run(task(folder, checkpoint, tmp_path / "parts", **options, epochs=4))
    looks = signal_at(0, monkeypatch)
    assert run(task(folder, checkpoint, tmp_path / "parts", **options))
    assert looks == [2, 3, 2, 4, 6][look:]  # nothing was done again
    assert len(tuned) == 4
    for one, other in zip(tuned[:2], tuned[2:], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert report(tmp_path / "whole")["scores"] == report(tmp_path / "parts")["scores"]
    assert not (tmp_path / "parts" / "semi.part.pt").exists()


def test_a_stopped_task_does_not_go_on_with_other_images(folder, checkpoint, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    with monkeypatch.context() as patch:
        signal_at(1, patch)
        assert not run(task(data, checkpoint, tmp_path))
    (data / "val" / "3" / "3_0.png").unlink()
    with pytest.raises(ValueError, match=r"images: .* -> "):
        run(task(data, checkpoint, tmp_path))


# --- ranks --------------------------------------------------------------------------------------------------------


def on_rank(world, options):
    """The scores, and which images this rank has seen that are surely no test images."""
    seen, read = set(), ImageFolder.read

    def noting(images, index):
        seen.add(images.keys()[index])
        return read(images, index)

    ImageFolder.read = noting
    try:
        outcome = options.run(context_of(world, options))
    finally:
        ImageFolder.read = read
    return outcome.rows[0].scores, for_training(seen)


def for_training(keys) -> set[str]:
    """Those whose number no test image has."""
    return {key for key in keys if int(re.search(r"_(\d+)", key)[1]) >= 10}


def test_ranks_learn_from_the_same_images(folder, checkpoint, tmp_path):
    """Together from as many as the share says, each from some of them."""
    options = task(folder, checkpoint, tmp_path, share=(0.2,))
    (scores, one), (same_scores, other) = run_ranks(2, on_rank, options)
    assert scores == same_scores
    (part,) = options._parts(open_labelled(folder), 2)
    assert len(part.images) == 40
    assert one | other == for_training(part.images.paths)
    assert one - other
    assert other - one


def with_own_list(world, options, files):
    try:
        replace(options, lists=(files[world.rank],)).run(context_of(world, options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_ranks_with_different_lists(folder, checkpoint, tmp_path):
    images, files = find_images(folder / "train").keys(), [tmp_path / "0" / "list.txt", tmp_path / "1" / "list.txt"]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_text("\n".join(images[number::7]))
    for answer in run_ranks(2, with_own_list, task(folder, checkpoint, tmp_path), files):
        assert re.match(r"ValueError: the ranks differ in the images whose labels are used; all machines must", answer)
    files[1].write_text("nothing.png")  # the other rank does not wait for it
    for answer in run_ranks(2, with_own_list, task(folder, checkpoint, tmp_path), files):
        assert re.match(r"ImageError: 1 of the 1 images .* the first is nothing.png", answer)

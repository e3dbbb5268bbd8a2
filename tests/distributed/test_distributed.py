"""What ranks tell each other, so that none waits for one that has ended."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from pcl_fast.config import PRESETS
from pcl_fast.distributed import World, all_or_none, check_same, connecting, main_first
from pcl_fast.errors import DamagedError, ImageError, UserError
from pcl_fast.run.checkpoint import PARTS, save_checkpoint
from pcl_fast.run.saving import load_same_checkpoint
from pcl_fast.train import open_images

CPU = torch.device("cpu")


def on_machines(world: World, names: list[str], function, *args) -> tuple[str, str]:
    """Call function(world, *args) with a host name per rank, and local ranks to match.

    Return type and text of the error that it raised, or ("nothing", its result).
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: names[world.rank])
        patch.setenv("LOCAL_RANK", str(names[: world.rank].count(names[world.rank])))
        try:
            return "nothing", function(world, *args)
        except Exception as error:
            return type(error).__name__, str(error)


def fail_on(world: World, ranks: list[int], error: Exception) -> None:
    def work() -> None:
        if world.rank in ranks:
            raise error

    all_or_none(work, world)


def test_what_one_rank_raises_is_raised_by_all():
    failing = [1], ImageError("it is empty")
    assert run_ranks(2, on_machines, ["a", "a"], fail_on, *failing) == [("ImageError", "it is empty")] * 2
    told = ("UserError", "on b: it is empty")
    assert run_ranks(2, on_machines, ["a", "b"], fail_on, *failing) == [told, ("ImageError", "it is empty")]
    own = [("OSError", "disk"), ("OSError", "disk")]
    assert run_ranks(2, on_machines, ["a", "b"], fail_on, [0, 1], OSError("disk")) == own


def work_in_turn(world: World, folder: Path, failing: int) -> list[str]:
    """Return which files were there when this rank's turn came."""

    def work() -> list[str]:
        if world.rank == failing:
            raise ValueError("no folder")
        found = sorted(os.listdir(folder))
        time.sleep(0.2)
        (folder / str(world.rank)).touch()
        return found

    return main_first(work, world)


def test_machines_take_turns(tmp_path):
    """The main rank comes first, then one rank of the other machine, then the rest."""
    found = run_ranks(3, on_machines, ["a", "a", "b"], work_in_turn, tmp_path, -1)
    assert [text for _, text in found] == [[], ["0", "2"], ["0"]]


def test_a_folder_that_another_machine_lacks_ends_all(tmp_path):
    replies = run_ranks(2, on_machines, ["a", "b"], work_in_turn, tmp_path, 1)
    assert replies == [("UserError", "on b: no folder"), ("ValueError", "no folder")]


def differ(world: World, values: list[str]) -> None:
    check_same("colour", values[world.rank], world, advice="use one")


def test_ranks_that_differ_are_named():
    assert run_ranks(3, on_machines, ["a", "a", "b"], differ, ["red"] * 3) == [("nothing", None)] * 3
    text = "the ranks differ in colour; use one:\n  red: a (rank 0 1)\n  blue: b (rank 2)"
    assert run_ranks(3, on_machines, ["a", "a", "b"], differ, ["red", "red", "blue"]) == [("ValueError", text)] * 3


def open_own(world: World, roots: list[Path]) -> int:
    _, config = PRESETS["demo"]
    return len(open_images(replace(config, data=replace(config.data, root=roots[world.rank])), world))


def test_machines_with_other_images_are_named(image_folder, tmp_path):
    assert run_ranks(2, on_machines, ["a", "b"], open_own, [image_folder] * 2) == [("nothing", 53)] * 2
    less = tmp_path / "class_0"
    less.mkdir()
    for path in sorted((image_folder / "class_0").iterdir()):
        (less / path.name).symlink_to(path)
    for kind, text in run_ranks(2, on_machines, ["a", "b"], open_own, [image_folder, tmp_path]):
        assert kind == "ValueError"
        assert "--data must hold the same images on every machine" in text
        assert "53 images" in text.splitlines()[1]
        assert text.splitlines()[2].endswith(": b (rank 1)")
    kinds = [kind for kind, _ in run_ranks(2, on_machines, ["a", "b"], open_own, [image_folder, tmp_path / "none"])]
    assert kinds == ["UserError", "ImageError"]


def test_a_broken_header_ends_all_ranks(image_folder, tmp_path):
    """One rank finds it, and all raise the error."""
    for number, path in enumerate(sorted((image_folder / "class_0").iterdir())):
        (tmp_path / path.name).write_bytes(path.read_bytes() if number != 5 else b"no image")
    for kind, text in run_ranks(2, on_machines, ["a", "a"], open_own, [tmp_path] * 2):
        assert kind == "ImageError"
        assert "05.jpg: no known image format" in text


def load_own(world: World, folders: list[Path]) -> int | None:
    state = load_same_checkpoint(folders[world.rank], world)
    return state and state["global_step"]


def test_ranks_go_on_from_the_same_checkpoint_or_not_at_all(tmp_path):
    folders = [tmp_path / name for name in ("none", "early", "late", "end", "spoiled")]
    for folder in folders:
        folder.mkdir()
    none, early, late, end, spoiled = folders
    save_checkpoint(early, {**dict.fromkeys(PARTS), "global_step": 8, "finished": False})
    save_checkpoint(late, {**dict.fromkeys(PARTS), "global_step": 12, "finished": False})
    save_checkpoint(end, {**dict.fromkeys(PARTS), "global_step": 12, "finished": True})
    (spoiled / "checkpoint.pt").write_bytes(b"spoiled")

    def load(one: Path, other: Path) -> list[tuple[str, str]]:
        return run_ranks(2, on_machines, ["a", "b"], load_own, [one, other])

    assert load(none, none) == [("nothing", None)] * 2
    assert load(late, late) == [("nothing", 12)] * 2
    for one, other, *found in (
        (late, none, "the checkpoint of step 12: a (rank 0)", "no checkpoint: b (rank 1)"),
        (none, late, "no checkpoint: a (rank 0)", "the checkpoint of step 12: b (rank 1)"),
        (late, early, "the checkpoint of step 12: a (rank 0)", "the checkpoint of step 8: b (rank 1)"),
        (late, end, "the checkpoint of step 12: a (rank 0)", "the checkpoint of step 12, the last: b (rank 1)"),
    ):
        for kind, text in load(one, other):
            assert kind == "ValueError"
            assert "--output must be a folder that all machines share" in text
            assert [line.strip() for line in text.splitlines()[1:]] == found
    assert [kind for kind, _ in load(late, spoiled)] == ["UserError", DamagedError.__name__]


def join_with(world: World, folder: Path, found: list) -> str:
    """Call connect() as if there were no process group yet; `found` has each rank's device, or why it has none.

    Return the backend of the group and this rank's device.
    """
    joined = []

    def pick() -> torch.device:
        if isinstance(found[world.rank], Exception):
            raise found[world.rank]
        return found[world.rank]

    def rendezvous(*args, **options):
        yield dist.FileStore(f"{folder}/store", world.size), world.rank, world.size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connecting, "_pick_device", pick)
        patch.setattr(dist, "rendezvous", rendezvous)
        patch.setattr(dist, "is_initialized", lambda: False)
        patch.setattr(dist, "init_process_group", lambda backend, **options: joined.append(backend))
        # GPU 1 is a Volta.
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0) if device.index else (9, 0))
        patch.setenv("WORLD_SIZE", str(world.size))
        device = connecting.connect().device
    return f"{joined[0]} {device}"


@pytest.mark.parametrize(
    ("found", "replies"),
    [
        ([CPU, CPU], [("nothing", "gloo cpu")] * 2),
        ([CPU, ValueError("old GPU")], [("UserError", "on b: old GPU"), ("ValueError", "old GPU")]),
        ([ValueError("old GPU"), CPU], [("ValueError", "old GPU"), ("UserError", "on a: old GPU")]),
    ],
)
def test_a_machine_without_a_usable_gpu_ends_all(tmp_path, found, replies):
    assert run_ranks(2, on_machines, ["a", "b"], join_with, tmp_path, found) == replies


@pytest.mark.parametrize(
    ("found", "kinds"),
    [
        ([torch.device("cuda", 0), CPU], ("a GPU that computes in bfloat16", "the CPU")),
        (
            [torch.device("cuda", 0), torch.device("cuda", 1)],
            ("a GPU that computes in bfloat16", "a GPU that computes in float16"),
        ),
    ],
)
def test_machines_with_other_devices_are_named(tmp_path, found, kinds):
    for kind, text in run_ranks(2, on_machines, ["a", "b"], join_with, tmp_path, found):
        assert kind == "ValueError"
        for line, name, host in zip(text.splitlines()[1:], kinds, ("a (rank 0)", "b (rank 1)"), strict=True):
            assert line.startswith(f"  {name}, PyTorch ")
            assert line.endswith(host)


def test_a_rank_that_does_not_come_is_said(monkeypatch):
    store = dist.HashStore()
    store.set_timeout(connecting.timedelta(seconds=0.1))
    with pytest.raises(ValueError, match="not all ranks have started in time"):
        connecting._exchange(None, store, 0, 2)


def test_alone_everything_is_the_same(alone):
    check_same("colour", "red", alone, advice="")
    assert all_or_none(lambda: 3, alone) == 3
    with pytest.raises(UserError, match="this"):
        all_or_none(lambda: (_ for _ in ()).throw(UserError("this")), alone)

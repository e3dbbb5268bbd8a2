"""A disk that damages or loses the last checkpoint costs what came after the one before it, and nobody's hand."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults.tiny import tiny
from launches import same_rows, same_state

from pcl_fast.distributed import World
from pcl_fast.errors import CheckpointError, UserError
from pcl_fast.files import write_whole
from pcl_fast.pretrained import read_pretrained
from pcl_fast.run.checkpoint import bytes_to_give_up, has_previous, load_checkpoint, load_last, save_checkpoint
from pcl_fast.run.ownership import OWNER, owned
from pcl_fast.run.room import check_room
from pcl_fast.train import run

DAMAGE = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "other bytes": lambda path: change_some_bytes(path),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "gone": lambda path: path.unlink(),
}


def change_some_bytes(path: Path) -> None:
    """In the midst of a tensor, as a disk or a cable does. PyTorch itself reads such a file."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(byte ^ 64 for byte in os.pread(file.fileno(), 8, file.tell())))
    torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, image_folder):
    """A run that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole")
    run(tiny(image_folder, folder), World(0, 1, torch.device("cpu"), None))
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("saved", [2, 3, 5])
def test_the_same_command_goes_on_from_the_one_before(
    whole, tmp_path, image_folder, alone, damage, saved, monkeypatch, capsys
):
    """saved: how many checkpoints the run has written when it happens, the first two before its first step, the
    last at its end.
    """
    stop_after(saved, monkeypatch)
    with pytest.raises(Halt):
        run(tiny(image_folder, tmp_path), alone)
    monkeypatch.undo()
    DAMAGE[damage](tmp_path / "checkpoint.pt")
    assert run(tiny(image_folder, tmp_path), alone)
    said = capsys.readouterr().out
    assert "going on from checkpoint.previous.pt, the one before it" in said
    assert f"{tmp_path / 'checkpoint.pt'} is " in said
    same_state(whole, tmp_path)
    same_rows(whole, tmp_path)


class Halt(BaseException):
    pass


def stop_after(saved: int, monkeypatch) -> None:
    """Let a run end, as if killed, when it has saved so often."""
    saves = []

    def counted(*args, **options):
        save_checkpoint(*args, **options)
        saves.append(1)
        if len(saves) == saved:
            raise Halt

    monkeypatch.setattr("pcl_fast.run.saving.save_checkpoint", counted)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_run_that_was_killed_between_its_first_two_begins_anew(
    whole, tmp_path, image_folder, alone, recorded, monkeypatch, capsys
):
    """Unless there is anything in its record: then more than nothing is lost, and somebody must look."""
    stop_after(1, monkeypatch)
    with pytest.raises(Halt):
        run(tiny(image_folder, tmp_path), alone)
    monkeypatch.undo()
    DAMAGE["cut by a byte"](tmp_path / "checkpoint.pt")
    if recorded:
        (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            run(tiny(image_folder, tmp_path), alone)
        return
    assert run(tiny(image_folder, tmp_path), alone)
    assert "nothing had been learned yet, and the run begins anew" in capsys.readouterr().out
    same_state(whole, tmp_path)
    same_rows(whole, tmp_path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_that_goes_on_has_two_before_it_does_anything_else(
    whole, tmp_path, image_folder, alone, damage, monkeypatch
):
    """One may be spoiled without anybody's noticing, and then the other."""
    stop_after(3, monkeypatch)
    with pytest.raises(Halt):
        run(tiny(image_folder, tmp_path), alone)
    monkeypatch.undo()
    DAMAGE[damage](tmp_path / "checkpoint.previous.pt")
    stop_after(1, monkeypatch)
    with pytest.raises(Halt):
        run(tiny(image_folder, tmp_path), alone)
    monkeypatch.undo()
    DAMAGE[damage](tmp_path / "checkpoint.pt")
    assert load_last(tmp_path)[0]["global_step"] == 2
    assert run(tiny(image_folder, tmp_path), alone)
    same_state(whole, tmp_path)
    same_rows(whole, tmp_path)


def test_both_damaged_is_said(tmp_path):
    save_checkpoint(tmp_path, {"epoch": 1})
    save_checkpoint(tmp_path, {"epoch": 2})
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        os.truncate(tmp_path / name, 100)
    with pytest.raises(CheckpointError, match=r"checkpoint.pt is no readable checkpoint: its 100 bytes are"):
        load_last(tmp_path)


def test_what_is_not_damage_is_not_passed_over(tmp_path):
    """Another version's checkpoint, or code: nobody wants to fall back behind that without knowing."""
    save_checkpoint(tmp_path, {"epoch": 1})
    save_checkpoint(tmp_path, {"epoch": 2})
    for content, fault in (({"format": 99}, "format 99"), (shutil.Error, "more than tensors")):
        torch.save(content, tmp_path / "checkpoint.pt")
        with pytest.raises(CheckpointError, match=fault):
            load_last(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_the_one_before_is_kept_with_links_and_without(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for epoch in (1, 2, 3):
        save_checkpoint(tmp_path, {"epoch": epoch})
    assert load_checkpoint(tmp_path)["epoch"] == 3
    assert load_checkpoint(tmp_path / "checkpoint.previous.pt")["epoch"] == 2
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.previous.pt", "checkpoint.pt"]


def test_a_kill_between_the_names_loses_nothing(tmp_path, monkeypatch):
    """Where there are no links, nothing is called checkpoint.pt for a moment."""
    save_checkpoint(tmp_path, {"epoch": 1})
    replace = os.replace

    def killed(source, target):
        if target.name == "checkpoint.pt":
            raise Halt
        replace(source, target)

    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Halt):
        save_checkpoint(tmp_path, {"epoch": 2})
    state, file, fault = load_last(tmp_path)
    assert (state["epoch"], file.name) == (1, "checkpoint.previous.pt")
    assert fault == f"{tmp_path / 'checkpoint.pt'} is gone; going on from checkpoint.previous.pt, the one before it"


@pytest.mark.parametrize("room", [True, False])
def test_the_one_before_makes_room_for_the_next_if_it_must(tmp_path, room):
    """Two must always fit, three need not: a disk that was full enough before still takes the next."""
    path, before = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"1")
    before.write_bytes(b"0")
    there = []

    def write(file) -> None:
        there.append(sorted(name for name in os.listdir(tmp_path) if not name.endswith(".tmp")))
        if not room and before.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(b"2")

    write_whole(path, write, before_as=before)
    assert there == ([["a", "b"]] if room else [["a", "b"], ["a"]])
    assert (path.read_bytes(), before.read_bytes()) == (b"2", b"1")
    assert len(os.listdir(tmp_path)) == 2


def test_who_has_been_taken_over_leaves_the_one_before(tmp_path):
    with owned(tmp_path):
        for epoch in (1, 2):
            save_checkpoint(tmp_path, {"epoch": epoch})
        (tmp_path / OWNER).write_text('{"token": "theirs"}')
        with pytest.raises(UserError, match="taken over"):
            save_checkpoint(tmp_path, {"epoch": 3})
    assert load_checkpoint(tmp_path)["epoch"] == 2
    assert load_checkpoint(tmp_path / "checkpoint.previous.pt")["epoch"] == 1


def test_a_process_that_is_killed_while_it_saves_leaves_two_checkpoints_or_says_that_it_did_not(tmp_path, monkeypatch):
    """Between the two renames both names are of one file: damage to it would be damage to both."""
    for epoch in (1, 2):
        save_checkpoint(tmp_path, {"epoch": epoch})
    assert has_previous(tmp_path)
    rename = os.replace

    def killed(source, target):
        if Path(target).name == "checkpoint.pt":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, {"epoch": 3})
    monkeypatch.undo()
    assert load_last(tmp_path)[0]["epoch"] == 2
    assert not has_previous(tmp_path)
    save_checkpoint(tmp_path, {"epoch": 3})
    assert has_previous(tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.previous.pt")["epoch"] == 2
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.previous.pt", "checkpoint.pt"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_before_that_is_damaged_does_not_count(tmp_path, damage):
    for epoch in (1, 2):
        save_checkpoint(tmp_path, {"epoch": epoch, "weights": torch.ones(1000)})
    DAMAGE[damage](tmp_path / "checkpoint.previous.pt")
    assert not has_previous(tmp_path)


def test_one_before_that_is_kept_too_is_not_given_up(tmp_path):
    """Its second name would keep its bytes on the disk, which would be as full as before."""
    path, before, kept = tmp_path / "a", tmp_path / "b", tmp_path / "kept"
    path.write_bytes(b"1")
    before.write_bytes(b"0")
    os.link(before, kept)

    def write(file) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=f"cannot write {path}: No space left on device"):
        write_whole(path, write, before_as=before)
    assert (path.read_bytes(), before.read_bytes(), kept.read_bytes()) == (b"1", b"0", b"0")
    assert len(os.listdir(tmp_path)) == 3


def test_a_damaged_checkpoint_is_not_taken_up_by_another_run(whole, tmp_path, image_folder, alone):
    damaged = shutil.copytree(whole, tmp_path / "damaged") / "checkpoint.pt"
    change_some_bytes(damaged)
    config = tiny(image_folder, tmp_path / "new", resume_from=damaged)
    with pytest.raises(CheckpointError, match="bytes are damaged: those of archive/data/"):
        run(config, alone)


def test_a_damaged_checkpoint_is_not_scored(whole, tmp_path):
    damaged = shutil.copytree(whole, tmp_path / "damaged")
    change_some_bytes(damaged / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="bytes are damaged: those of archive/data/"):
        read_pretrained(damaged, "query")


@pytest.mark.parametrize("left", [True, False])
def test_where_both_are_damaged_the_run_goes_on_from_the_latest_that_was_kept(
    tmp_path, image_folder, alone, left, monkeypatch, capsys
):
    """left: whether that one is whole. The last two that were kept are the other two by another name."""
    config, output = {"checkpoint__keep_every": 1, "epochs": 3}, tmp_path / "run"
    stop_after(5, monkeypatch)
    with pytest.raises(Halt):
        run(tiny(image_folder, output, **config), alone)
    monkeypatch.setattr("pcl_fast.run.saving.save_checkpoint", save_checkpoint)
    for name in ["checkpoint.pt", "checkpoint.previous.pt", *([] if left else ["checkpoint-0001.pt"])]:
        change_some_bytes(output / name)
    if not left:
        with pytest.raises(
            CheckpointError,
            match=r"checkpoint\.pt is no readable .*, and so are checkpoint\.previous\.pt, .*-0001\.pt, but",
        ):
            run(tiny(image_folder, output, **config), alone)
        return
    before = (output / "checkpoint-0001.pt").read_bytes()
    assert run(tiny(image_folder, output, **config), alone)
    said = "going on from checkpoint-0001.pt, the latest that was kept and is whole"
    assert said in capsys.readouterr().out
    assert (output / "checkpoint-0001.pt").read_bytes() == before
    whole = tmp_path / "whole"
    run(tiny(image_folder, whole, **config), alone)
    same_state(whole, output)
    same_rows(whole, output)


def test_a_run_whose_checkpoints_are_gone_goes_on_from_a_kept_one_or_not_at_all(whole, tmp_path, image_folder, alone):
    """To begin anew would write over its record."""
    folder = shutil.copytree(whole, tmp_path / "copied")
    before = (folder / "metrics.jsonl").read_bytes()
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="holds the record of a run; choose another --output to start anew"):
        run(tiny(image_folder, folder), alone)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_goes_on_where_there_is_room_for_two_alone(tmp_path, monkeypatch):
    """Its next save makes room, as those before have done."""
    for epoch in (1, 2):
        save_checkpoint(tmp_path, {"epoch": epoch, "weights": torch.zeros(1000)})
    size = (tmp_path / "checkpoint.pt").stat().st_size
    assert bytes_to_give_up(tmp_path) == size
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size // 2))
    check_room(tmp_path, size, kept=0, first=False, given_up=bytes_to_give_up(tmp_path))
    os.link(tmp_path / "checkpoint.previous.pt", tmp_path / "kept.pt")
    assert bytes_to_give_up(tmp_path) == 0
    with pytest.raises(OSError, match="are needed; make room"):
        check_room(tmp_path, size, kept=0, first=False, given_up=bytes_to_give_up(tmp_path))


@pytest.mark.parametrize("name", ["checkpoint.previous.pt", "checkpoint-0003.pt"])
def test_a_folder_in_the_way_of_a_checkpoint_is_named(tmp_path, name):
    for epoch in (1, 2):
        save_checkpoint(tmp_path, {"epoch": epoch})
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=f"cannot write {tmp_path / name}: Is a directory; a folder is where a file is"):
        save_checkpoint(tmp_path, {"epoch": 3}, keep_as="checkpoint-0003.pt")

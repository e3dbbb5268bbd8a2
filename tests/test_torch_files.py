"""What PyTorch reads without a word though other bytes were written is told from what is whole."""

from __future__ import annotations

import contextlib
import os
import random
import zipfile

import pytest
import torch
from launches import same

from pcl_fast.errors import CheckpointError, DamagedError
from pcl_fast.torch_files import find_damage, read_torch

STATE = {"weights": torch.randn(40, 30), "counts": torch.arange(100), "epoch": 3, "names": ["a", "b"]}


@pytest.fixture
def file(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_what_is_whole_is_read(file):
    assert find_damage(file) is None
    same(read_torch(file), STATE, "state")


@pytest.mark.parametrize("seed", range(10))
def test_no_other_tensors_or_values_are_read_from_a_damaged_file(file, seed):
    """A bit flipped, a run of zeros, or a block of something else, anywhere: it is noticed, or lies in bytes that mean
    nothing.
    """
    rng, content = random.Random(seed), file.read_bytes()
    for _ in range(30):
        file.write_bytes(damaged(content, rng))
        with contextlib.suppress(DamagedError):
            same(read_torch(file), STATE, "state")


def test_no_bit_of_the_table_of_contents_changes_what_is_read(file):
    """Of the whole entry of one tensor."""
    with zipfile.ZipFile(file) as opened:
        names, begin = opened.namelist(), opened.start_dir
    content = file.read_bytes()
    entry = content.rindex(names[4].encode(), begin) - 46
    for place in range(entry, entry + 46 + len(names[4])):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            with contextlib.suppress(DamagedError):
                same(read_torch(file), STATE, f"bit {bit} of byte {place - entry}")


def damaged(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    at, length = rng.randrange(len(changed)), rng.choice([1, 1, 16, 512])
    kind = rng.choice(["flip", "zeros", "noise"])
    for place in range(at, min(at + length, len(changed))):
        others = {"flip": changed[place] ^ (1 << rng.randrange(8)), "zeros": 0, "noise": rng.randrange(256)}
        changed[place] = others[kind]
    return bytes(changed)


def test_the_damaged_part_is_named(file):
    with zipfile.ZipFile(file) as opened:
        info = opened.getinfo("a/data/1")
    with open(file, "r+b") as content:
        content.seek(info.header_offset + 200)
        content.write(b"\xff")
    with pytest.raises(DamagedError, match=r"a\.pt is no readable checkpoint: its \d+ bytes are damaged: those of a/"):
        read_torch(file)


def test_files_without_checksums_are_taken(tmp_path):
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    same(read_torch(tmp_path / "old.pt"), STATE, "state")
    if hasattr(torch.serialization, "set_crc32_options"):
        torch.serialization.set_crc32_options(False)
        torch.save(STATE, tmp_path / "without.pt")
        torch.serialization.set_crc32_options(True)
        same(read_torch(tmp_path / "without.pt"), STATE, "state")


def test_what_would_unpack_for_hours_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("bomb/data.pkl", bytes(50_000_000))
    with pytest.raises(DamagedError, match="its table of contents"):
        read_torch(tmp_path / "bomb.pt")


def test_an_old_file_that_is_cut_is_damaged(tmp_path):
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    os.truncate(tmp_path / "old.pt", 1000)
    with pytest.raises(DamagedError, match="its 1000 bytes are damaged, or only a part"):
        read_torch(tmp_path / "old.pt")


def test_a_file_that_cannot_be_opened_is_not_damaged(tmp_path):
    with pytest.raises(CheckpointError, match="Is a directory") as raised:
        read_torch(tmp_path)
    assert not isinstance(raised.value, DamagedError)

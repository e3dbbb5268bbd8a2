"""Files are whole or not there."""

from __future__ import annotations

import os

import pytest

from pcl_fast.files import remove_unfinished, write_whole


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_keeps_its_bytes(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    write_whole(tmp_path / "a", lambda file: file.write(b"1"), also_as=tmp_path / "b")
    write_whole(tmp_path / "a", lambda file: file.write(b"2"))
    assert (tmp_path / "a").read_bytes() == b"2"
    assert (tmp_path / "b").read_bytes() == b"1"


def test_only_this_file_s_leftovers_are_removed(tmp_path):
    for name in ("a.1.tmp", "a.2.tmp", "b.1.tmp", "a"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b.1.tmp"]

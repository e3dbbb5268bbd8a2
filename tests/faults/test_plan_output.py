"""The planner's picture lies where it was asked for, and nowhere else."""

from __future__ import annotations

import os
import sys

import pytest

from pcl_fast import plan


@pytest.mark.parametrize(
    ("output", "lies", "begins"),
    [
        ("folder", "folder/plan.png", b"\x89PNG"),
        ("picture", "picture", b"\x89PNG"),
        ("picture.png", "picture.png", b"\x89PNG"),
        ("picture.pdf", "picture.pdf", b"%PDF"),
    ],
)
def test_where_the_picture_lies(tmp_path, monkeypatch, capsys, output, lies, begins):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(sys, "argv", ["plan", "pcl_v2", "--output", str(tmp_path / output)])
    plan.main()
    files = [os.path.join(where, name) for where, _, names in os.walk(tmp_path) for name in names]
    assert files == [str(tmp_path / lies)]
    assert (tmp_path / lies).read_bytes().startswith(begins)
    assert f"Picture: {tmp_path / lies}" in capsys.readouterr().out

"""Containers whose user has no name and no home, or a home that cannot be written."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from pcl_fast import user

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without name and home; temporary files go to tmp_path."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    user._temporary_folder.cache_clear()
    yield
    user._temporary_folder.cache_clear()


def test_the_cache_is_where_the_system_says(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user.cache_folder() == tmp_path / ".cache" / "pcl_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert user.cache_folder() == Path("/elsewhere/pcl_fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert user.cache_folder() == tmp_path / ".cache" / "pcl_fast"


def test_without_a_home_it_is_in_the_temporary_directory(nobody, monkeypatch, tmp_path):
    with pytest.warns(UserWarning, match=rf"no home folder .*; {tmp_path}/pcl_fast-\d+ takes its place"):
        folder = user.cache_folder()
    assert user.cache_folder() == folder  # with another warning it would fail
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert user.cache_folder() == Path("/elsewhere/pcl_fast")


def test_a_home_that_cannot_be_written_is_none(nobody, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/proc/self")  # where nobody makes folders, root neither
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
    with pytest.warns(UserWarning, match="no home folder"):
        assert user.cache_folder().parent == tmp_path


def test_a_folder_that_somebody_else_has_made_is_not_used(nobody, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"pcl_fast-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="no home folder"):
        folder = user.cache_folder()
    assert folder.resolve() == folder
    assert folder.parent == tmp_path


def test_what_others_ask_for_is_set(nobody, tmp_path):
    with pytest.warns(UserWarning, match="no home folder"):
        user.give_name_and_home()
    assert os.environ["USER"] == f"uid-{os.getuid()}"
    assert Path.home() == tmp_path / f"pcl_fast-{os.getuid()}"
    assert user.cache_folder() == Path.home() / ".cache" / "pcl_fast"


def test_nothing_is_set_for_those_who_have_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    user.give_name_and_home()
    assert dict(os.environ) == before

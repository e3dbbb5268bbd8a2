"""What cannot be done is said first, and nothing of anybody else's is touched."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from sites import run, write_images, write_run

from pcl_fast.errors import UserError
from pcl_fast.exploring.place import MARK, written_beside


def test_what_is_no_site_is_never_touched(odd_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for flags in ([], ["--force"]):
        assert "holds something that pcl_fast.explore has not written" in run(
            odd_run, "--output", tmp_path / "mine", *flags
        )
    assert "is a file" in run(odd_run, "--output", tmp_path / "mine" / "letter.txt", "--force")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "letter.txt"]


def test_a_site_is_replaced_whole_with_force_alone(odd_run, site, tmp_path):
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    (folder / "data" / "old.js").write_text("")
    assert "replace it with --force" in run(odd_run, "--output", folder)
    assert (folder / "data" / "old.js").exists()
    (tmp_path / "site.unfinished").mkdir()
    (tmp_path / "site.unfinished" / MARK).write_text("")
    assert run(odd_run, "--output", folder, "--force", "--on-map", "20") is None
    assert not (folder / "data" / "old.js").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def write(output: Path, text: str, *, fails: bool = False) -> None:
    with written_beside(output, force=True) as folder:
        (folder / "index.html").write_text(text)
        if fails:
            raise KeyboardInterrupt


def test_an_interrupt_leaves_what_was_there(tmp_path):
    output = tmp_path / "site"
    with pytest.raises(KeyboardInterrupt):
        write(output, "half", fails=True)
    assert not list(tmp_path.iterdir())
    write(output, "first")
    with pytest.raises(KeyboardInterrupt):
        write(output, "second", fails=True)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    assert (output / "index.html").read_text() == "first"
    write(output, "third")
    assert (output / "index.html").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_somebody_else_s_folder_is_not_cleared(tmp_path):
    (tmp_path / "site.unfinished").mkdir()
    with pytest.raises(UserError, match="is in the way"):
        write(tmp_path / "site", "mine")
    assert (tmp_path / "site.unfinished").is_dir()


def test_images_that_have_moved(tmp_path):
    images = write_images(tmp_path / "images", 20, ())
    folder = write_run(tmp_path / "run", images)
    images.rename(tmp_path / "elsewhere")
    said = run(folder, "--output", tmp_path / "site")
    assert f"the run was trained on images in {images}, which is not there any more; say with --data DIR" in said
    assert "lies inside" in run(folder, "--data", tmp_path / "elsewhere", "--output", tmp_path / "elsewhere" / "site")
    assert run(folder, "--data", tmp_path / "elsewhere", "--output", tmp_path / "site") is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--images", 1], "--images must be at least 2, not 1"),
        (["--on-map", 0], "--on-map must be at least 2, not 0"),
        (["--ks", "5", "5"], "--ks must be different positive numbers"),
        (["--ks", "500"], "--ks 500 is more than the 121 images"),
    ],
)
def test_numbers_that_cannot_work(flags, said, odd_run, tmp_path):
    assert said in run(odd_run, "--output", tmp_path / "site", *flags)
    assert not list(tmp_path.iterdir())


def test_jinja2_is_asked_for(odd_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert 'pip install "pcl-fast[explore]"' in run(odd_run, "--output", tmp_path / "site")


def test_a_broken_image_leaves_nothing(odd_run, odd_images, tmp_path):
    broken = tmp_path / "images"
    shutil.copytree(odd_images, broken)
    file = next(broken.rglob("1*.png"))
    file.write_bytes(file.read_bytes()[:-800])
    assert file.name in run(odd_run, "--data", broken, "--output", tmp_path / "site")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]

"""The demo's images."""

from __future__ import annotations

import numpy as np

from pcl_fast.data import find_images
from pcl_fast.data.sources.digits import digits_folder, load_digits


def test_digits_are_written_once_as_class_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = find_images(digits_folder())
    assert len(folder) == 5000
    assert np.bincount(folder.labels).tolist() == [500] * 10
    written = (folder.path(0)).stat().st_mtime_ns
    assert digits_folder() == folder.root
    assert folder.path(0).stat().st_mtime_ns == written
    assert [path.name for path in folder.root.parent.iterdir()] == ["digits"]


def test_jpeg_changes_little(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = find_images(digits_folder())
    images, _ = load_digits()
    for index in (0, 700, 4999):
        number = int(folder.path(index).stem)
        read = np.asarray(folder.read(index))[:, :, 0].astype(int)
        assert np.abs(read - images[number]).mean() < 2

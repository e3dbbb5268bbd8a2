"""A run and its site, once for all tests that only read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from sites import run, write_images, write_run


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("odd") / "images")


@pytest.fixture(scope="session")
def odd_run(odd_images, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "a run", odd_images)


@pytest.fixture(scope="session")
def site(odd_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sites") / "site"
    assert run(odd_run, "--output", folder) is None
    return folder

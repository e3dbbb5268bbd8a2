"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from class_folders import write_images

from pcl_fast.distributed import World

# One where tests run side by side: threads that wait for each other would take the cores from others.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# Under nohup and in the background of a script these are ignored, here and in all that tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def two_ranks(image_folder, tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run on two ranks, and what it printed."""
    from launches import train  # not before the variable above is set

    output = tmp_path_factory.mktemp("two_ranks")
    return output, train(image_folder, output, ranks=2)


@pytest.fixture
def alone() -> World:
    return World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks have. Two that wait for each other on busy cores are many times slower with so little to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

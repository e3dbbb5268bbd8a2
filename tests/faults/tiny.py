"""Runs of a second or two within the tests' own process, and a disk that is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pcl_fast.config import PRESETS, Config, with_settings

# An epoch has two steps. There is no E-step unless a test wants it.
_TINY = {
    "epochs": 2,
    "log_every": 1,
    "data.size": 16,
    "data.resize": 20,
    "data.loader": "torchvision",
    "data.workers": 0,
    "model.queue_size": 50,
    "model.dim": 16,
    "loss.backend": "torch",
    "cluster.ks": (),
    "optim.batch_size": 24,
    "optim.schedule": "step",
    "evaluation.every": 0,
}


def tiny(data: Path, output: Path, **changes) -> Config:
    """A recipe for the tests' 53 images; in names of changes a double underscore is a dot."""
    config = replace(PRESETS["demo"][1], data=replace(PRESETS["demo"][1].data, root=data), output=output)
    return with_settings(config, _TINY | {name.replace("__", "."): value for name, value in changes.items()})


def flags_of_tiny(data: Path, output: Path, **changes) -> list[str]:
    """The same on the command line, after the preset `demo`."""
    flags = ["--data", str(data), "--output", str(output)]
    for name, value in (_TINY | {name.replace("__", "."): value for name, value in changes.items()}).items():
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """No file can be longer, as on a disk that has only so much room: this process's writes fail there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

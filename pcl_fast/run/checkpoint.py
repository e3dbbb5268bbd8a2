"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from pcl_fast.config import Config, recipe_differences, to_dict
from pcl_fast.distributed import World, check_same, together
from pcl_fast.errors import CheckpointError

NAME = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep_as: str | None = None) -> None:
    """Write `state` to folder/checkpoint.pt so that a crash at any moment leaves the old or the new one.

    Written aside, flushed to the disk, then renamed over the old one.

    Args:
        folder: exists.
        state: tensors and plain Python values (what torch.load reads with weights_only=True).
        keep_as: also keep this checkpoint under another name in the folder, which later saves do not touch.
    """
    aside = folder / f"{NAME}.tmp"
    # What a crash has left may be a second name of a kept checkpoint, which must not be written over.
    aside.unlink(missing_ok=True)
    with open(aside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if keep_as is not None:
        _duplicate(aside, folder / keep_as)
    os.replace(aside, folder / NAME)
    _flush_folder(folder)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint of a run on the CPU, or None if there is none.

    Raises:
        CheckpointError: the file is not a checkpoint; names it.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is no readable checkpoint ({error}); move it away to start anew, or put a kept one in its place"
        ) from error


def load_same_checkpoint(folder: Path, world: World) -> dict[str, Any] | None:
    """`load_checkpoint` on every rank. Ranks that went on from different steps would wait for each other for ever.

    Raises:
        CheckpointError: as `load_checkpoint`, on every rank.
        ValueError: the ranks find different checkpoints, or some find none; says on which machines.
    """
    state = together(lambda: load_checkpoint(folder), world)
    found = "no checkpoint"
    if state is not None:
        found = f"the checkpoint of step {state['global_step']}" + (", the last" if state["finished"] else "")
    advice = "--output must be a folder that all machines share"
    check_same(f"what they find in {folder}", found, world, advice=advice)
    return state


def _duplicate(source: Path, target: Path) -> None:
    """A second name for the same bytes, or a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_same_run(state: dict[str, Any], config: Config, fingerprint: str) -> None:
    """Whether a checkpoint is this run's.

    Raises:
        ValueError: it belongs to another recipe or another data set; names what differs.
    """
    differences = recipe_differences(state["config"], to_dict(config))
    if state["data"] != fingerprint:
        differences.append(f"data set: {state['data']} -> {fingerprint}")
    if differences:
        raise ValueError(
            f"{config.output} holds a run under another recipe; choose another --output, or go back to its values:\n  "
            + "\n  ".join(differences)
        )

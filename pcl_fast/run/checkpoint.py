"""The checkpoint's file: writing it, and reading it. (pretrained/ takes encoders out of it.)

It holds tensors and plain Python values, by these keys:

    format                         FORMAT, of this layout
    config                         the recipe, see config.to_dict
    data                           the data set's fingerprint
    epoch, step, global_step       how far the run has come; finished: whether to its end
    metrics_length, epoch_metrics  what metrics.jsonl and the epoch's means were then
    choices                        how the run computes, see choices.py
    method                         the method's state_dict
    encoders                       {"query": state_dict, "momentum": ...}, the same bytes as in `method`
    optimizer, scaler              their state_dicts
    ranks                          what is each rank's own, in rank order
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pcl_fast.errors import DIVERGED, CheckpointError, DamagedError, NonFiniteError
from pcl_fast.files import frees_room, replace, write_whole
from pcl_fast.run.rows import FILE
from pcl_fast.torch_files import find_damage, read_torch

NAME = "checkpoint.pt"
# The one before it, for a disk that has damaged the last.
PREVIOUS = "checkpoint.previous.pt"
FORMAT = 2
_KEPT = re.compile(r"checkpoint-(\d+)\.pt")
# What a run needs to go on.
PARTS = (
    "config", "data", "epoch", "step", "global_step", "finished", "metrics_length", "epoch_metrics", "method",
    "encoders", "optimizer", "scaler", "ranks",
)  # fmt: skip
_WAY_OUT = "choose another --output to start anew, or put a checkpoint that is whole in its place"


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep_as: str | None = None) -> None:
    """Write `state` to folder/checkpoint.pt so that a crash at any moment leaves the old or the new one. The old one is
    kept as checkpoint.previous.pt.

    Args:
        folder: exists.
        state: tensors and plain Python values (what torch.load reads with weights_only=True).
        keep_as: also keep this checkpoint under another name in the folder, which later saves do not touch.

    Raises:
        OSError: it cannot be written; see `write_whole`.
    """
    also_as, whole = None if keep_as is None else folder / keep_as, {"format": FORMAT, **state}
    write_whole(
        folder / NAME,
        lambda file: torch.save(whole, file),
        also_as=also_as,
        before_as=folder / PREVIOUS,
        size=size_of(state),
    )


def check_finite(state: dict[str, Any]) -> None:
    """Refuse to save what training could not go on from.

    Raises:
        NonFiniteError: a tensor in `state` has an entry that is not finite; names it.
    """
    # The encoders are in the method too.
    parts = {name: state[name] for name in ("method", "optimizer", "ranks")}
    found = [(name, tensor) for name, tensor in tensors_of(parts) if tensor.is_floating_point()]
    finite = {tensor.device: [] for _, tensor in found}
    for _, tensor in found:
        finite[tensor.device].append(tensor.isfinite().all())
    if all(torch.stack(flags).all() for flags in finite.values()):  # waits once for each device
        return
    bad = [name for name, tensor in found if not tensor.isfinite().all()]
    raise NonFiniteError(
        f"after step {state['global_step']} {len(bad)} of the run's tensors are not finite, {bad[0]} for one; they are "
        f"not saved, and the last checkpoint stands. {DIVERGED}"
    )


def size_of(state: Any) -> int:
    """About how many bytes a state takes in a file: those of its tensors, memory that they share once."""
    storages = [tensor.untyped_storage() for _, tensor in tensors_of(state)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def tensors_of(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts and lists, each with its name, as in "optimizer.state.0.momentum_buffer"."""
    if isinstance(state, torch.Tensor):
        yield name, state
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    for key, value in items:
        yield from tensors_of(value, f"{name}.{key}" if name else f"{key}")


class Last(NamedTuple):
    """The last checkpoint of a run's folder that can be read.

    state: on the CPU; None if the folder has none yet.
    file: where it was; None likewise.
    fault: what is wrong with the last one, in a sentence; None if that is it.
    """

    state: dict[str, Any] | None
    file: Path | None = None
    fault: str | None = None


def load_last(folder: Path) -> Last:
    """Load the last checkpoint of a run's folder. If a fault of the disk has damaged or taken it, that before it is
    loaded, which a run always has unless the disk is too full; and if that is damaged too, the latest that was kept.

    Raises:
        CheckpointError: see `load_checkpoint`; or all are damaged.
    """
    last, others = folder / NAME, [folder / PREVIOUS, *reversed(_kept(folder))]
    fault = f"{last} is gone"
    try:
        state = load_checkpoint(folder)
        if state is not None:
            return Last(state, last)
    except DamagedError as error:
        fault, damage = str(error).partition(";")[0], error
    else:
        damage = None
    others = [file for file in others if file.exists()]
    for file in others:
        try:
            told = "the one before it" if file.name == PREVIOUS else "the latest that was kept and is whole"
            return Last(load_checkpoint(file), file, f"{fault}; going on from {file.name}, {told}")
        except DamagedError:
            continue
    record = folder / FILE
    recorded = record.exists() and record.stat().st_size > 0
    if damage is None and not recorded:
        return Last(None)
    # Nothing is recorded before a run has its first two checkpoints.
    if others or recorded or not record.exists():
        so = f", and so are {', '.join(file.name for file in others)}" if others else ""
        holds = f", but {folder} holds the record of a run" if recorded else ""
        raise DamagedError(f"{fault}{so}{holds}; {_WAY_OUT}")
    return Last(None, None, f"{fault}; nothing had been learned yet, and the run begins anew")


def has_previous(folder: Path) -> bool:
    """Whether the checkpoint before the last is there and whole, and a file of its own: a process that was killed while
    it saved may have left two names of one.
    """
    previous, last = folder / PREVIOUS, folder / NAME
    try:
        return find_damage(previous) is None and not (last.exists() and previous.samefile(last))
    except OSError:
        return False


def bytes_to_give_up(folder: Path) -> int:
    """How much room a save would make where three checkpoints do not fit, see `write_whole`."""
    previous = folder / PREVIOUS
    return previous.stat().st_size if frees_room(previous) else 0


def put_back(folder: Path, file: Path) -> None:
    """Let another checkpoint of the folder take the place of a damaged last one: the next save would remove it to make
    room, or nobody would find it. One that was kept stays where it is, too.

    Raises:
        OSError, UserError: see `write_whole`.
    """
    if file.name == PREVIOUS:
        replace(file, folder / NAME)
        return
    with open(file, "rb") as source:
        write_whole(folder / NAME, lambda target: shutil.copyfileobj(source, target))


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint, on the CPU.

    Args:
        path: of the file, or of a run's folder, whose last checkpoint is taken.

    Returns:
        None if the folder has none yet.

    Raises:
        CheckpointError: the file is not a checkpoint, or of another version of pcl_fast; names it.
        DamagedError: it has other bytes than were written.
    """
    file = path / NAME if path.is_dir() or not path.suffix else path
    if not file.exists():
        return None
    try:
        state = read_torch(file)
    except CheckpointError as error:
        raise type(error)(f"{error}; {_WAY_OUT}" if file.name == NAME else f"{error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} was not written by this version of pcl_fast: it holds {_contents(state)}. Go on with the version "
            f"that wrote it; or {_WAY_OUT}. pcl_fast.evaluate takes weights of other programs"
        )
    return state


def check_whole(state: dict[str, Any], path: Path) -> None:
    """Refuse to go on from a checkpoint that lacks something.

    Raises:
        CheckpointError: names what.
    """
    missing = [name for name in PARTS if name not in state]
    if missing:
        raise CheckpointError(f"the checkpoint of {path} has no {', '.join(missing)}; {_WAY_OUT}")


def _contents(state: Any) -> str:
    """Say what a file holds."""
    if isinstance(state, torch.Tensor):
        return f"a tensor of shape {tuple(state.shape)}"
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    if "format" in state:
        return f"format {state['format']}, and this is format {FORMAT}"
    names = [str(name) for name in state]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"a dict of {shown}" if names else "an empty dict"


def kept_checkpoints(path: Path) -> list[Path]:
    """The checkpoints in a run's folder: those kept of earlier epochs, in their order, and the last one. None for
    another folder; a file stands for itself.
    """
    if path.is_file():
        return [path]
    return _kept(path) + ([path / NAME] if (path / NAME).exists() else [])


def _kept(folder: Path) -> list[Path]:
    kept = {int(found[1]): file for file in folder.glob("checkpoint-*.pt") if (found := _KEPT.fullmatch(file.name))}
    return [kept[epoch] for epoch in sorted(kept)]

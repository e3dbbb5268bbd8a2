"""Files with tensors in them: finding, reading and telling them apart."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from pcl_fast.errors import CheckpointError, DamagedError
from pcl_fast.run.checkpoint import NAME
from pcl_fast.torch_files import read_torch

HUB_NAME = "model.safetensors"


def locate(path: Path) -> Path:
    """Return the file that a path means: itself, or in a folder a run's last checkpoint or timm's weights.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(
            f"{path} holds no checkpoint, it is not there; give a run's folder, or a checkpoint's file"
        )
    for name in (NAME, HUB_NAME):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path} holds no checkpoint, neither a run's ({NAME}) nor timm's ({HUB_NAME})")


def read(file: Path) -> Any:
    """Return what a file of PyTorch or safetensors holds, on the CPU, without running code that it brings.

    Raises:
        CheckpointError: it cannot be read, is damaged, or cannot be read without such code; says how to convert it.
    """
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)


def checksum(file: Path) -> str:
    """Return a file's SHA-256, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file} is no readable safetensors file ({error})") from error


def _read_torch(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return read_torch(file)
    except CheckpointError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError) or isinstance(error, DamagedError):
            raise
        named = re.search(r"GLOBAL ([\w.]+)", str(error.__cause__))
        raise CheckpointError(_ADVICE.format(file=file, needs=named[1] if named else "a newer pickle")) from error


_ADVICE = """\
{file} holds more than tensors and plain values ({needs}). It is not read, because that would run whatever code the \
file brings. If you trust it, write its tensors into a file of their own where its classes can be imported, and give \
that:
  content = torch.load("{file}", map_location="cpu", weights_only=False)
  torch.save(content["state_dict"], "tensors.pth")  # or content["model"], ..., or content.state_dict() of a network"""


def _stand_in(module: str, name: str) -> type:
    """Return a class that takes the place of a pickled one, and keeps nothing of what it is given."""

    def ignore(self: object, *state: object) -> None:
        pass

    return type(name, (), {"__module__": module, "__init__": ignore, "__setstate__": ignore})


# Nobody reads these of a checkpoint, but DINO's and others' hold them: the command line, and learning rates that came
# out of an array.
_HARMLESS = [
    argparse.Namespace,
    _stand_in("numpy", "dtype"),
    _stand_in("numpy.core.multiarray", "scalar"),
    _stand_in("numpy._core.multiarray", "scalar"),
]

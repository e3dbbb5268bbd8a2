"""Take an encoder into another library.

    python -m pcl_fast.export CHECKPOINT --to torchvision|timm|detectron2|onnx --output FILE [--encoder query|momentum]

CHECKPOINT is whatever the evaluation reads: a run's folder or one of its checkpoints, an official PCL or MoCo file, or
the weights of a torchvision or timm ResNet. docs/export.md says how each library loads what is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pcl_fast.command import command
from pcl_fast.errors import UserError
from pcl_fast.pretrained import Pretrained, read_pretrained
from pcl_fast.pretrained.writing import to_detectron2, to_onnx, to_timm, to_torchvision

Library = Literal["torchvision", "timm", "detectron2", "onnx"]
WRITERS: dict[Library, Callable[[Pretrained, Path], None]] = {
    "torchvision": to_torchvision,
    "timm": to_timm,
    "detectron2": to_detectron2,
    "onnx": to_onnx,
}


def main() -> None:
    with command("pcl_fast.export"):
        tyro.cli(export, prog="pcl_fast.export", description=__doc__)


def export(
    checkpoint: tyro.conf.Positional[Path],
    *,
    to: Library,
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")],
    encoder: Literal["query", "momentum"] = "query",
    force: bool = False,
) -> None:
    """Read an encoder and write it for another library.

    Args:
        checkpoint: a run's folder, or a file.
        to: the library.
        output: the file that is written; for timm a folder.
        encoder: of a checkpoint that has two. query is what was trained and what the paper transfers to other tasks;
            momentum is its moving average, which makes the features for kNN and clustering.
        force: overwrite what is there.

    Raises:
        UserError: the checkpoint cannot be read, the library has no such network, or something is there already.
        OSError: the output cannot be written.
    """
    if not force and (any(output.iterdir()) if output.is_dir() else output.exists()):
        raise UserError(f"--output {output} is there already; choose another place, or overwrite it with --force")
    pretrained = read_pretrained(checkpoint, encoder)
    print(f"{pretrained.source}: {pretrained.path}", *pretrained.notes, sep="\n  ")
    WRITERS[to](pretrained, output)
    print(f"written: {output}")


if __name__ == "__main__":
    main()

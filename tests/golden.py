"""What a tiny run of PCL learns, bit for bit: its losses, and checksums of some of its weights.

    python tests/golden.py

renews golden.json for this machine, after a change that is meant to change what is learned; the commit says why. The
bits depend on PyTorch and on the processor, so there is a record for each; see `key`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

RECORDS = Path(__file__).with_name("golden.json")
# 20 steps: four of InfoNCE alone, then an E-step before every further four.
FLAGS = ("--epochs", "5", "--data.loader", "torchvision", "--data.workers", "0")
STEPS_BEFORE_E_STEP = 4


def key() -> str:
    """What the bits depend on: PyTorch, the instructions it uses, the processor; always with one thread a rank."""
    import torch

    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()},{model.partition(':')[2]}"


def measure(images: Path, output: Path, ranks: int) -> dict:
    """Train in `output`: {"losses": of every step, "weights": {name: checksum}}."""
    from launches import train

    from pcl_fast.run.metrics import read_rows

    train(images, output, *FLAGS, ranks=ranks)
    losses = [row["loss"] for row in read_rows(output) if row["kind"] == "step"]
    return {"losses": losses, "weights": {name: _checksum(rows) for name, rows in _weights(output).items()}}


def _weights(output: Path) -> dict:
    """Of the last checkpoint: the encoder's first and last, the momentum encoder's, the queue and the prototypes."""
    from pcl_fast.run.checkpoint import load_checkpoint

    state = load_checkpoint(output)
    query, momentum, method = state["encoders"]["query"], state["encoders"]["momentum"], state["method"]
    first, last = "backbone.0.weight", "head.2.weight"
    return {
        "query, first": query[first],
        "query, last": query[last],
        "momentum, first": momentum[first],
        "momentum, last": momentum[last],
        "queue": method["queue.keys"],
        "prototypes": method["prototypes.granularities.1.centroids"],
        "concentration": method["prototypes.granularities.1.concentration"],
    }


def _checksum(rows) -> str:
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()[:16]


def renew() -> None:
    from class_folders import write_images

    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / "images")
        records[key()] = {f"{ranks} ranks": measure(images, Path(folder) / str(ranks), ranks) for ranks in (1, 2)}
    RECORDS.write_text(json.dumps(records, indent=1) + "\n")
    print(f"{RECORDS}: {key()}")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    renew()

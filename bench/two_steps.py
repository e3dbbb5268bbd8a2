"""A real run of two epochs of two steps, on all GPUs: PCL v2 with DALI, whose decoder shares the work between GPU and
CPU. The second epoch begins with an E-step and has prototypes.

    python bench/two_steps.py [--out bench/results]

It starts the command that users start, on photographs of ImageNet's size, and then looks at what the run recorded:
every loss is finite, no kernel was found wrong, and the GPU decoded every image; the exit code is 1 if not. Without a
GPU it is ResNet-18 at 64 px, few images, and DALI on the CPU. The record is <out>/<machine>/run.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import device
import machine
import nvidia.dali  # noqa: F401, so that it is said at once if DALI is missing
import photos
import tensorboard  # noqa: F401
import torch

import pcl_fast.train  # noqa: F401
from pcl_fast.run.rows import read_rows

STEPS, EPOCHS = 2, 2
SMALL = "--model.arch resnet18 --data.size 64 --data.resize 73 --model.queue-size 64 --loss.num-negatives 16"


def command(data: Path, output: Path, ranks: int, rows: int, small: bool) -> list[str]:
    """Return the command behind `python`. rows: images per rank and step."""
    images = STEPS * ranks * rows
    flags = [
        f"--data {data} --output {output} --epochs {EPOCHS} --log-every 1 --data.loader dali",
        f"--optim.batch-size {ranks * rows} --optim.warmup-epochs 0 --evaluation.every 0",
        f"--cluster.ks {images // 4} {images // 2} --cluster.warmup-epochs 1 --cluster.iterations 3 --cluster.redo 1",
        SMALL if small else f"--model.queue-size {8 * ranks * rows} --loss.num-negatives {images // 8}",
    ]
    words = " ".join(flags).split()
    return ["-m", "pcl_fast.launch", f"--nproc-per-node={ranks}", "-m", "pcl_fast.train", "pcl_v2", *words]


def faults(rows: Sequence[dict], said: str) -> list[str]:
    """Return what is wrong with a run, from metrics.jsonl and from what it printed."""
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    kernels = next((row for row in rows if row["kind"] == "kernels"), {})
    on_cpu = re.findall(r"(\d+) so far", said)
    checks = {
        f"{len(losses)} of {EPOCHS * STEPS} steps": len(losses) != EPOCHS * STEPS,
        f"losses {losses}": not all(map(math.isfinite, losses)),
        "no E-step": not any(row["kind"] == "clustering" for row in rows),
        **{f"the kernel {name} {fault}": True for name, fault in kernels.get("faults", {}).items()},
        f"{on_cpu[-1] if on_cpu else 0} batches were decoded on the CPU": bool(on_cpu),
    }
    return [text for text, wrong in checks.items() if wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.HERE / "results")
    arguments = parser.parse_args()
    ranks, rows = max(1, torch.cuda.device_count()), 64 if device.CUDA else 16
    with tempfile.TemporaryDirectory(prefix="two-steps-") as folder:
        data, output = Path(folder, "photographs"), Path(folder, "run")
        data.mkdir()
        photos.write_photographs(data, STEPS * ranks * rows)
        words = command(data, output, ranks, rows, small=not device.CUDA)
        print("python", *words, flush=True)
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout, flush=True)
        recorded = read_rows(output) if (output / "metrics.jsonl").is_file() else []
    wrong = faults(recorded, done.stdout)
    if done.returncode:
        wrong.insert(0, f"the run ended with exit code {done.returncode}")
    record = {
        "commit": machine.commit(),
        "date": date.today().isoformat(),
        "machine": machine.name(),
        "torch": torch.__version__,
        "decoder": "mixed" if device.CUDA else "cpu",
        "command": " ".join(words).replace(folder, "FOLDER"),
        "wrong": wrong,
        "rows": [row for row in recorded if row["kind"] in ("kernels", "step", "features", "clustering", "finished")],
        "cases": {},
    }
    path = arguments.out / machine.slug() / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written: {path}")
    print(f"wrong: {'; '.join(wrong)}" if wrong else f"{EPOCHS * STEPS} steps on {ranks} ranks, all as it should be")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

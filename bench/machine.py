"""What the figures depend on: the GPU or processor, and the stack.

    python bench/machine.py [--out bench/results]

prints it, and writes <out>/<machine>/machine.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import re
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import device
import optional
import torch

HERE = Path(__file__).parent


def name() -> str:
    """Return the GPU's name, or the processor's and how many threads PyTorch uses."""
    return torch.cuda.get_device_name() if device.CUDA else f"{processor()} CPU, {torch.get_num_threads()} threads"


def slug() -> str:
    """Return the name of the machine's folder of records."""
    return re.sub(r"[^a-z0-9]+", "-", name().lower()).strip("-")


@functools.cache
def describe() -> tuple[dict, str]:
    """Return what the figures depend on, and a folder name for it."""
    found = {
        "machine": name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
    }
    if device.CUDA:
        found["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["copy_gb_per_s"] = round(device.copy_rate() / 1e9, 1)
        found["matmul_tflop_per_s"] = round(device.matmul_rate() / 1e12, 1)
    return found, slug()


def processor() -> str:
    """Return the processor's model, or its architecture if the system does not tell the model."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def commit() -> str:
    return output_of("git", "-C", str(HERE), "describe", "--always", "--dirty")


def output_of(*command: str) -> str:
    """Return the first line that a command prints, or "unknown" if it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]


def stack() -> dict:
    """Return what else a report of a fault should say: GPUs, what of CUDA PyTorch brought along, packages."""
    found: dict = {"system": platform.platform(), "cores": device.cores(), "packages": optional.versions()}
    for package in ("numpy", "scikit-learn", "pytest", "pytest-benchmark"):
        try:
            found["packages"][package] = version(package)
        except PackageNotFoundError:
            continue
    if device.CUDA:
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpus": torch.cuda.device_count(),
            "capability": f"sm_{gpu.major}{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def write_record(out: Path, name: str, **content: Any) -> None:
    """Write <out>/<machine>/<name>.json: commit, date and machine, then the content (sizes, cases)."""
    found, folder = describe()
    record = {"commit": commit(), "date": date.today().isoformat(), **found, **content}
    path = out / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    print(json.dumps({"commit": commit(), **describe()[0], **stack()}, indent=2))
    write_record(arguments.out, "machine", **stack(), cases={})


if __name__ == "__main__":
    main()

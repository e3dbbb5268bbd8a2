"""Build the pretended GPU, and run programs on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
PATIENCE = 300  # seconds; the programs take ten


def headers() -> list[Path]:
    """Folders of CUDA's headers, as they are installed beside PyTorch; none if they are not.

    The runtime's must be of PyTorch's own version, for structures differ. They include one that only Triton brings.
    """
    packages, major = Path(sysconfig.get_path("purelib")), (torch.version.cuda or "").partition(".")[0]
    runtime = packages / "nvidia" / ("cuda_runtime" if major == "12" else f"cu{major}") / "include"
    folders = [runtime, packages / "triton" / "backends" / "nvidia" / "include"]
    there = (runtime / "cuda_runtime_api.h").exists() and (folders[1] / "crt" / "host_defines.h").exists()
    return folders if there else []


def missing() -> str | None:
    """What a pretended GPU lacks on this machine, or None."""
    if sys.platform != "linux":
        return "it stands in for a library of Linux"
    if not torch.backends.cuda.is_built():
        return "PyTorch is built without CUDA"
    if COMPILER is None:
        return "there is no C compiler"
    return None if headers() else "CUDA's headers are not installed beside PyTorch"


def build(folder: Path) -> None:
    """Compile both libraries into a folder."""
    include = [f"-I{path}" for path in headers()]
    _compile(folder / "libruntime.so", "runtime.c", "nothing.c", *include)
    _compile(folder / "libcuda.so.1", "driver.c")


def _compile(library: Path, *arguments: str) -> None:
    sources = [str(HERE / name) if name.endswith(".c") else name for name in arguments]
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wno-builtin-declaration-mismatch"]
    subprocess.run([*command, "-o", str(library), *sources], check=True)


def run_pretended(libraries: Path, program: str, *arguments: str, capability: int) -> subprocess.CompletedProcess:
    """Run a program of this folder where PyTorch finds a GPU of that compute capability (90: sm_90)."""
    path = os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "LD_PRELOAD": str(libraries / "libruntime.so"),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(libraries), os.environ.get("LD_LIBRARY_PATH")])),
        "PRETENDED_SM": str(capability),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # memory is fresh each time: no result is another's leftover
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }
    for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):
        environment.pop(name, None)
    command: Sequence[str] = [sys.executable, str(HERE / program), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)

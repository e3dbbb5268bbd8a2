"""Whether the installed PyTorch has code for this machine's GPU, and which stack has it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

_V100 = "requirements/v100.txt (`make setup STACK=v100`, then .venv-v100)"
# Every stack, and the architectures that its PyTorch has code for.
_STACKS = {
    "requirements/cu13.txt (`make setup`, then .venv)": ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
    _V100: ("sm_70",),
}
# The oldest compute capability that Triton supports, whatever PyTorch has code for.
_OLDEST = (7, 0)
_NAME = re.compile(r"(sm|compute)_(\d+)(\d)([a-z]?)")


def check_gpu(device: torch.device) -> None:
    """Refuse a GPU that the installed stack does not run on, before the first kernel fails on it.

    Raises:
        ValueError: it does not run there; names the GPU, what PyTorch has code for, and the requirements file to
            install.
    """
    capability = torch.cuda.get_device_capability(device)
    architectures = [name for name in torch.cuda.get_arch_list() if _NAME.fullmatch(name)]
    # If a build does not say what it has code for, assume that it works.
    if capability >= _OLDEST and (not architectures or has_code_for(capability, architectures)):
        return
    fitting = [stack for stack, names in _STACKS.items() if has_code_for(capability, names)]
    if fitting:
        advice = f"install {fitting[0]}"
    elif capability < _OLDEST:
        advice = f"no stack supports GPUs older than Volta (sm_{_OLDEST[0]}{_OLDEST[1]})"
    else:
        advice = "neither of the stacks in requirements/ supports it yet"
    raise ValueError(
        f"{torch.cuda.get_device_name(device)} is sm_{capability[0]}{capability[1]}, which is not supported "
        f"here: PyTorch {torch.__version__} has code for {', '.join(architectures) or 'GPUs unknown'}; {advice}. "
        'CUDA_VISIBLE_DEVICES="" trains on the CPU'
    )


def has_code_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether code for one of `architectures` (named as in torch.cuda.get_arch_list) runs on a GPU.

    Machine code for sm_XY runs on the same major version X from minor version Y on; code for compute_XY, which the
    driver translates, runs on every GPU from XY on. With an "a" after the number, either runs on exactly that GPU.
    """
    for name in architectures:
        kind, major, minor, suffix = _NAME.fullmatch(name).groups()
        version = int(major), int(minor)
        if capability == version:
            return True
        if suffix != "a" and capability > version and (kind == "compute" or capability[0] == version[0]):
            return True
    return False


def check_no_gpu() -> None:
    """Refuse a machine whose GPU PyTorch does not find, most likely because the driver is too old.

    Raises:
        ValueError: the machine has a GPU, which was not hidden on purpose.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or torch.version.cuda is None or not any(Path("/dev").glob("nvidia[0-9]*")):
        return
    raise ValueError(
        f"this machine has a GPU that PyTorch {torch.__version__} cannot use; most likely its driver is too old for "
        f"CUDA {torch.version.cuda} (nvidia-smi says which CUDA it supports). Update the driver, or for a Volta GPU "
        f'install {_V100}; CUDA_VISIBLE_DEVICES="" trains on the CPU'
    )

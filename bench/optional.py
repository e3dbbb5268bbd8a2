"""Packages that some providers need and the project does not; a provider whose package is missing is skipped."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import pytest

PACKAGES = (
    "faiss-gpu", "faiss-gpu-cu12", "flash-kmeans", "flashlib", "nvidia-cutlass-dsl",
    "nvidia-dali-cuda130", "nvidia-dali-cuda120", "pillow", "superkmeans", "torchvision",
)  # fmt: skip


def module(name: str, package: str) -> ModuleType:
    """Return the module; if it is not installed, skip the test that asks for it."""
    return pytest.importorskip(name, reason=f"needs the package {package}", exc_type=ImportError)


def versions() -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

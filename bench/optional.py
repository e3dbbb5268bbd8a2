"""Packages that some providers need and the project does not: without them these providers are skipped."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import pytest

PACKAGES = (
    "faiss-gpu", "faiss-gpu-cu12", "flash-kmeans", "flashlib", "nvidia-cutlass-dsl",
    "nvidia-dali-cuda130", "nvidia-dali-cuda120", "pillow", "torchvision",
)  # fmt: skip


def module(name: str, package: str) -> ModuleType:
    """The module, or the test that asks for it is skipped."""
    return pytest.importorskip(name, reason=f"needs the package {package}", exc_type=ImportError)


def versions() -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

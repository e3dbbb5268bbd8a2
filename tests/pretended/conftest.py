from __future__ import annotations

import os
from pathlib import Path

import pytest
from building import build, missing


@pytest.fixture(scope="session")
def pretended_gpu(tmp_path_factory) -> Path:
    """The folder of the libraries that stand in for a GPU's."""
    reason = missing()
    if reason and "CI" in os.environ:
        pytest.fail(f"no pretended GPU, though this is CI: {reason}")
    if reason:
        pytest.skip(f"no pretended GPU: {reason}")
    folder = tmp_path_factory.mktemp("pretended_gpu")
    build(folder)
    return folder

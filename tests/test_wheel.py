"""The wheel by itself, away from the checkout: all packages are in it, and the benchmarks' records."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pcl_fast import plan

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder with the wheel's packages. It is built from a copy: setuptools leaves folders where it builds."""
    root = tmp_path_factory.mktemp("wheel")
    source, target = root / "source", root / "target"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("pcl_fast", "kernels", "bench"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, source], check=True)
    (wheel,) = root.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


@pytest.mark.slow
def test_the_planner_says_the_same_from_a_wheel(installed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["pcl_v2", "--output", "x.png"]
    # The wheel's packages and what they depend on; -S, so that an editable installation is not seen.
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    command = [sys.executable, "-S", "-m", "pcl_fast.plan", *arguments]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").is_file()
    assert "measured: bench/results/" in done.stdout
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    plan.main()
    assert done.stdout == capsys.readouterr().out


@pytest.mark.slow
def test_the_script_runs_the_commands(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), sysconfig.get_path("purelib")])}
    script = [sys.executable, "-S", str(installed / "bin" / "pcl-fast")]
    for words, expected in (
        ([], "usage: pcl-fast COMMAND"),
        (["plan", "pcl_v2", "--output", "x.png"], "measured: bench/results/"),
    ):
        command = [*script, *words]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    assert (installed / "pcl_fast" / "py.typed").is_file()


@pytest.mark.slow
def test_every_package_is_in_the_wheel(installed):
    def modules(root: Path) -> set[str]:
        return {path.relative_to(root).as_posix() for path in root.rglob("*.py")}

    assert modules(installed / "pcl_fast" / "kernels") == modules(REPOSITORY / "kernels")
    ours = {name for name in modules(installed / "pcl_fast") if not name.startswith("kernels/")}
    assert ours == {name for name in modules(REPOSITORY / "pcl_fast") if not name.startswith("kernels/")}

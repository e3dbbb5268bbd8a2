"""Some steps of a real run: what is started can be parsed, and what went wrong in it is named."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali", exc_type=ImportError)
import two_steps

from pcl_fast.command_line import parse_preset
from pcl_fast.config import PRESETS, validate

RIGHT = [*({"kind": "step", "loss": 1.0 + step} for step in range(4)), {"kind": "clustering"}]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("ranks", [1, 8])
def test_the_recipe_can_be(monkeypatch, tmp_path, ranks, small):
    rows = 16 if small else 64
    words = two_steps.command(tmp_path, Path("run"), ranks, rows, small)
    monkeypatch.setattr("sys.argv", ["train", *words[words.index("pcl_fast.train") + 1 :]])
    config = parse_preset(PRESETS, prog="train", description="")
    validate(config)
    images = two_steps.STEPS * ranks * rows
    assert config.epochs * (images // config.optim.batch_size) == two_steps.EPOCHS * two_steps.STEPS
    assert config.cluster.warmup_epochs < config.epochs
    assert max(config.cluster.ks) <= images


def test_a_right_run_has_no_faults():
    assert two_steps.faults(RIGHT, "fine") == []


@pytest.mark.parametrize(
    ("rows", "said", "expected"),
    [
        (RIGHT[1:], "", "3 of 4 steps"),
        ([{"kind": "step", "loss": float("nan")}, *RIGHT[1:]], "", "losses [nan"),
        (RIGHT[:-1], "", "no E-step"),
        ([*RIGHT, {"kind": "kernels", "faults": {"assign": "is wrong"}}], "", "the kernel assign is wrong"),
        (RIGHT, "decoded on the CPU instead, 3 so far", "3 batches were decoded on the CPU"),
    ],
)
def test_faults_are_named(rows, said, expected):
    (fault,) = two_steps.faults(rows, said)
    assert expected in fault

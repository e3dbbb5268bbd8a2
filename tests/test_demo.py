"""The demo's scores. `make demo` runs all of it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pcl_fast.config import PRESETS
from pcl_fast.demo import as_table, score_all
from pcl_fast.learner import Learner
from pcl_fast.run.checkpoint import save_checkpoint


def test_an_encoder_that_learned_nothing_scores_as_the_untrained_one(tmp_path, alone):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 28, 28), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / "digits" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03}.jpg")
    learner = Learner(PRESETS["demo"][1], alone)
    save_checkpoint(tmp_path, {"learner": learner.state(), "ranks": [learner.rank_state()]})
    rows = score_all(tmp_path, tmp_path / "digits")
    assert rows["trained, backbone"] == rows["untrained, backbone"]
    assert rows["trained, 128-d"] == rows["untrained, 128-d"]
    assert rows["raw pixels"] != rows["untrained, backbone"]
    assert as_table(rows).row_count == 5

"""PCL learns what it learned before: see golden.py."""

from __future__ import annotations

import json

import pytest
from golden import RECORDS, STEPS_BEFORE_E_STEP, key, measure


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tiny_run_learns_what_it_learned_before(image_folder, tmp_path, ranks):
    records = json.loads(RECORDS.read_text())
    found = measure(image_folder, tmp_path / "run", ranks)
    assert len(found["losses"]) == 20
    if key() in records:
        assert found == records[key()][f"{ranks} ranks"]
        return
    # Elsewhere rounding differs, and from the first clustering on it decides which images share a prototype.
    for record in records.values():
        expected = record[f"{ranks} ranks"]["losses"][:STEPS_BEFORE_E_STEP]
        assert found["losses"][:STEPS_BEFORE_E_STEP] == pytest.approx(expected, rel=1e-5)

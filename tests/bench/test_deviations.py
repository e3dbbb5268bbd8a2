"""The ways that bench/deviations.py compares are pcl_v2, pcl_v2_fast, and what lies between."""

from __future__ import annotations

import itertools

import deviations
import pytest
import summary

from pcl_fast.config import changed_settings, recipe_differences, to_dict, validate
from pcl_fast.demo import small


@pytest.mark.parametrize("epochs", [2, 3, 12, 24])
def test_every_deviation_is_measured_alone_and_with_all_others(epochs):
    ways = deviations.ways(epochs)
    paper, *alone, together = ways.values()
    assert next(iter(ways)) == deviations.PAPER
    assert list(ways)[-1] == deviations.ALL
    changed = [changed_settings(paper, way) for way in alone]
    assert sorted(itertools.chain(*changed)) == changed_settings(paper, together) == deviations.deviations()
    assert all(changed)
    for way in ways.values():
        validate(way)
        assert (way.epochs, way.evaluation.every, way.cluster.redo) == (epochs, 0, 5)


def test_at_the_demo_s_length_they_are_the_presets_in_miniature():
    ways = deviations.ways(24)
    for preset, way in {"pcl_v2": deviations.PAPER, "pcl_v2_fast": deviations.ALL}.items():
        differences = recipe_differences(to_dict(small(preset)), to_dict(ways[way]))
        assert differences == ["cluster.redo: 1 -> 5"]


def test_figures_of_seeds_and_their_table():
    keys = [*deviations.SCORES, "seconds", *(f"seconds_{phase}" for phase in deviations.PHASES)]
    slow, fast = (
        [dict.fromkeys(keys, value * (seed + 1)) for seed in range(3)] for value in (0.2, 0.1)
    )  # fmt: skip
    found = {"paper": deviations.figures(slow, slow), "fast": deviations.figures(fast, slow)}
    assert (found["fast"]["median_ms"], found["fast"]["times_faster_than_first"]) == (200, 2.0)
    assert found["fast"]["knn"] == pytest.approx(0.2)
    assert [seed["knn"] for seed in found["fast"]["seeds"]] == pytest.approx([0.1, 0.2, 0.3])
    assert deviations.as_table(found, "title").row_count == 2
    text = summary.benchmark(
        "deviations", {"date": "2030-01-01", "commit": "abc", "cases": {"c": {"providers": found}}}
    )
    assert "| c | fast | 200 | 2.00 |" in text

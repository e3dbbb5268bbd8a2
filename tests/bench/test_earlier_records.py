"""What a run of a benchmark keeps of the record that it finds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def with_earlier(now: dict, before: dict) -> dict:
    spec = importlib.util.spec_from_file_location("conftest_of_bench", BENCH / "conftest.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.with_earlier(now, before)


def row(ms: float) -> dict:
    return {"median_ms": ms, "times_faster_than_first": 1.0}


def test_cases_and_providers_that_were_not_measured_again_stay_and_say_when():
    before = {
        "commit": "abc",
        "date": "2026-01-02",
        "cases": {
            "small": {"n": 1, "providers": {"official": row(9.0), "ours": row(3.0)}},
            "large": {"n": 2, "measured": {"commit": "0", "date": "2025-12-31"}, "providers": {"ours": row(5.0)}},
        },
    }
    now = {"small": {"n": 1, "providers": {"ours": row(2.0)}}, "new": {"n": 3, "providers": {"ours": row(1.0)}}}
    found = with_earlier(now, before)
    when = {"commit": "abc", "date": "2026-01-02"}
    assert list(found) == ["small", "large", "new"]
    assert found["large"] == before["cases"]["large"]
    assert found["new"] == now["new"]
    # The ratio was to a provider that did not run now.
    assert found["small"] == {
        "n": 1,
        "providers": {"official": {"measured": when, **row(9.0)}, "ours": {"median_ms": 2.0}},
    }
    again = {"small": {"n": 1, "providers": {"official": row(8.0)}}}
    found = with_earlier(again, {"commit": "def", "date": "2026-02-03", "cases": found})
    assert list(found["small"]["providers"]) == ["official", "ours"]
    assert found["small"]["providers"]["official"] == row(8.0)
    assert found["small"]["providers"]["ours"]["measured"] == {"commit": "def", "date": "2026-02-03"}


def test_a_provider_measured_twice_ago_keeps_its_day():
    first = {"commit": "a", "date": "2026-01-01", "cases": {"c": {"providers": {"x": row(1.0), "y": row(1.0)}}}}
    second = {"commit": "b", "date": "2026-01-02", "cases": with_earlier({"c": {"providers": {"y": row(2.0)}}}, first)}
    third = with_earlier({"c": {"providers": {"y": row(3.0)}}}, second)
    assert third["c"]["providers"]["x"]["measured"] == {"commit": "a", "date": "2026-01-01"}

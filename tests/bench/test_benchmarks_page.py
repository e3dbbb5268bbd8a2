"""docs/benchmarks.md is what the records say, and so are the README's figures that come from them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jinja2
import pytest
import report

from pcl_fast.planning.figures import Records

README = (Path(__file__).parents[2] / "README.md").read_text()
H300 = {
    "commit": "abc", "date": "2030-01-01", "machine": "NVIDIA H300", "sizes": {},
    "cases": {"N=64": {"providers": {"eager": {"median_ms": 2.0}, "triton": {"median_ms": 0.0071}}}},
}  # fmt: skip

WAYS = ("ours", "official", "projected")


@pytest.fixture
def results(tmp_path) -> Path:
    """The records of CPUs, and none of a GPU."""
    return Path(shutil.copytree(report.RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("nvidia-*")))


def test_the_page_is_made_of_the_records():
    assert report.page() == report.PAGE.read_text(), "docs/benchmarks.md is old: python bench/report.py"


def test_a_figure_follows_its_record(results):
    path = results / report.CPU / "loss.json"
    record = json.loads(path.read_text())
    record["cases"]["sampling alone"]["providers"]["eager"]["median_ms"] = 98.4
    path.write_text(json.dumps(record))
    assert "| the same, ours | 98 ms," in report.page(results)


def test_a_figure_without_a_record_is_an_error(results):
    (results / report.CPU / "estep.json").unlink()
    with pytest.raises(jinja2.UndefinedError):
        report.page(results)


def test_what_a_gpu_measured_is_shown(results):
    assert "**Nothing has been measured on a GPU yet**" in report.page(results)
    folder = results / "nvidia-h300"
    folder.mkdir()
    (folder / "loss.json").write_text(json.dumps(H300))
    text = report.page(results)
    assert "[On NVIDIA H300](#on-nvidia-h300)" in text
    assert "| N=64 | triton | 0.0071 |" in text
    assert "Nothing has been measured" not in text


def test_the_planner_reads_a_folder_with_all_kinds_of_records(results):
    folder = results / "nvidia-h300"
    folder.mkdir()
    (folder / "loss.json").write_text(json.dumps(H300))
    for name in ("machine", "run", "first-hour"):
        record = {"machine": "NVIDIA H300", "cases": {"gpu": {"outcome": "done"}} if name == "first-hour" else {}}
        (folder / f"{name}.json").write_text(json.dumps(record))
    records = Records(results)
    assert set(records.machines) > {report.CPU, "nvidia-h300"}
    assert records.find("loss", "N=64", "triton", "median_ms", first="h300").figure("N=64", "triton", "median_ms")


def test_hours_in_the_readme():
    said = " ".join(re.sub("[>*]", " ", README).split())
    plan, cached, fast = report.hours("pcl_v2"), report.hours("pcl_v2", cache=2), report.hours("pcl_v2_fast")
    one = report.hours("pcl_v2", gpus=1, gpu="h200", cores=16, cache=2)
    own, official, fused, less = (round(float(hours)) for hours in (*map(plan.get, WAYS), fast["projected"]))
    assert f"{own} hours for this code and {official} hours for the official code" in said
    assert float(plan["ours"]) > report.GOAL
    assert "by this plan the goal is missed" in said
    assert f"it is {fused} hours, {cached['projected']} with a cache" in said
    assert f"2 GB/s, and {less} for `pcl_v2_fast`" in said
    assert f"one H200 would take {round(float(one['ours']))} hours with such a cache" in said


def test_the_demo_s_scores_are_those_of_the_readme():
    """The demo leaves no record here: its table is in the README as printed, and this page repeats some of it."""
    trained, features = (
        [cell.strip() for cell in re.findall(rf"^│ {name}.*$", README, re.MULTILINE)[-1].strip("│").split("│")]
        for name in ("trained ", "trained, 128-d ")
    )
    page = report.PAGE.read_text()
    ours = re.search(r"^\| with prototypes \|(.*)\|$", page, re.MULTILINE)[1]
    assert [cell.strip() for cell in ours.split("|")] == [*trained[1:], features[1]]

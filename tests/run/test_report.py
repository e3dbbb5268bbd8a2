"""The report of a run, whatever its method names its metrics and clusterings."""

from __future__ import annotations

import json

import matplotlib.axes
import matplotlib.figure
import pytest

from pcl_fast.methods import Metric
from pcl_fast.run.report import write_report


@pytest.mark.parametrize("names", [("9", "30"), ("first head", "second head")])
def test_clusterings_may_have_any_names(tmp_path, monkeypatch, names):
    rows = [
        {"kind": "epoch", "epoch": 1, "loss": 1.0, "lr": 0.1, "seconds": {"training": 2.0}},
        {"kind": "evaluation", "epoch": 1, "knn": 0.5, "ami": dict.fromkeys(names, 0.25)},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels, plot = [], matplotlib.axes.Axes.plot
    figures, savefig = [], matplotlib.figure.Figure.savefig

    def noted(self, *arguments, label=None, **options):
        labels.append(label)
        return plot(self, *arguments, label=label, **options)

    def saved(self, *arguments, **options):
        figures.append(self)
        return savefig(self, *arguments, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", noted)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", saved)
    assert write_report(tmp_path, {"loss": Metric("sum", "loss")}).stat().st_size > 0
    assert labels == ["sum", "learning rate", "kNN accuracy", *(f"AMI({name})" for name in names), labels[-1]]
    # Places of the grid that no panel needs are empty.
    assert all(bool(axes.get_title()) == axes.axison for axes in figures[0].axes)

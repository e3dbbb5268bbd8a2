"""Values that cannot work are refused in words, whatever they are."""

from __future__ import annotations

import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from faults.tiny import flags_of_tiny

from pcl_fast.clustering import cluster, kmeans
from pcl_fast.config import PRESETS, validate
from pcl_fast.run.report import write_report
from pcl_fast.train import main

FEATURES = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans(FEATURES, 5.5), "k must be an integer, got 5.5"),
        (lambda: kmeans(FEATURES, True), "k must be an integer, got True"),
        (lambda: kmeans(FEATURES, np.bool_(True)), "k must be an integer, got .*True_?"),
        (lambda: kmeans(FEATURES, "5"), "k must be an integer, got '5'"),
        (lambda: kmeans(FEATURES, None), "k must be an integer, got None"),
        (lambda: kmeans(FEATURES, 5, iterations=2.5), r"iterations must be an integer, got 2\.5"),
        (lambda: kmeans(FEATURES, 5, redo=1.5), r"redo must be an integer, got 1\.5"),
        (lambda: kmeans(FEATURES.tolist(), 5), "features must be a tensor or a NumPy array, got list"),
        (lambda: cluster(FEATURES, (5, 2.5), temperature=0.1), r"k must be an integer, got 2\.5"),
    ],
)
def test_what_is_no_number_of_clusters_is_named(call, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        call()


def test_features_without_length_are_named():
    with pytest.raises(ValueError, match=r"features must have a length of at least 1, got \[20, 0\]"):
        kmeans(torch.empty(20, 0), 3)


def test_numpy_s_arrays_and_numbers_are_taken():
    array = FEATURES.numpy().copy()
    array.flags.writeable = False
    expected = kmeans(FEATURES, 5)
    assert torch.equal(kmeans(array, np.int64(5)).centroids, expected.centroids)
    assert torch.equal(cluster(array, [np.int32(5)], temperature=0.1)[0].assignment, expected.assignment)
    with pytest.raises(ValueError, match=r"float32 or float16 .* got .*float64"):
        kmeans(array.astype(np.float64), 5)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match=f"--seed must fit into 64 bits, got {seed}"):
        validate(replace(PRESETS["demo"][1], seed=seed))
    validate(replace(PRESETS["demo"][1], seed=min(max(seed, -(2**63)), 2**64 - 1)))


def test_a_port_in_use_is_said(monkeypatch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        names = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr("sys.argv", ["pcl_fast.train", "demo", "--output", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            main()
    message = str(ended.value.code)
    assert message.startswith("pcl_fast.train: the ranks cannot meet: ")
    assert str(port) in message
    assert "--master-port" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["a$b^c_d$", "$\\frac$", "\udcff"])
def test_a_report_may_lie_anywhere(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    assert write_report(folder, {}).stat().st_size > 0


def test_too_large_a_queue_is_a_sentence(tmp_path, image_folder, monkeypatch):
    flags = flags_of_tiny(image_folder, tmp_path, model__queue_size=2_000_000_000)
    monkeypatch.setattr("sys.argv", ["pcl_fast.train", "demo", *flags])
    with pytest.raises(SystemExit, match=r"^pcl_fast\.train: there is no memory for .* GB more.*--model.queue"):
        main()

"""The written files: what they say, against the encoder and the prototypes; and that they hang together."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launches import run_here
from PIL import Image
from sites import CLASSES, KS, ODD_NAMES, Page, data, run, write_images, write_run

from pcl_fast import embed
from pcl_fast.data import clustering_loader, find_images, normalise
from pcl_fast.distributed import World
from pcl_fast.exploring.sheets import ACROSS, PER_SHEET
from pcl_fast.pretrained import read_pretrained

PAGES = ("index", "clusters", "map", "findings", "cluster", "image")


def images_of(site) -> dict:
    """The chunks about images, one after another."""
    count = data(site, "site")["images"]
    chunks = [data(site, f"images/{number}") for number in range(-(-count // PER_SHEET))]
    return {
        "paths": [path for chunk in chunks for path in chunk["paths"]],
        "labels": [label for chunk in chunks for label in chunk["labels"]],
        "clusters": np.concatenate([chunk["clusters"] for chunk in chunks], 1),
        "distances": np.concatenate([chunk["distances"] for chunk in chunks], 1),
        "near": np.concatenate([chunk["near"] for chunk in chunks]),
        "nearDistances": np.concatenate([chunk["nearDistances"] for chunk in chunks]),
    }


def clusters_of(site, k: int) -> list[dict]:
    chunks = range(len(data(site, f"clusters/{k}")["begins"]))
    return [entry for chunk in chunks for entry in data(site, f"members/{k}/{chunk}")]


@pytest.fixture(scope="module")
def expected(odd_run, odd_images, site) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Unit features in the site's order, and the distances to all prototypes."""
    encoder, images = read_pretrained(odd_run, "momentum"), find_images(odd_images)
    views = torch.cat(
        list(clustering_loader(images, encoder.data, batch_size=500, world=World(0, 1, torch.device("cpu"), None)))
    )
    with torch.no_grad():
        unit = F.normalize(encoder.head(encoder.backbone(normalise(views, torch.float32))), dim=1).double()
    unit = unit[[images.keys().index(path) for path in images_of(site)["paths"]]]
    return unit, [torch.cdist(unit, found.centroids.double()) for found in encoder.prototypes]


def test_every_image_is_there_once_with_its_name_and_label(site, odd_images):
    found, images = images_of(site), find_images(odd_images)
    assert sorted(found["paths"]) == sorted(images.keys())
    assert {path.rpartition("/")[2] for path in found["paths"]} >= set(ODD_NAMES)
    names = data(site, "site")["labels"]
    assert names == sorted(CLASSES)
    for path, label in zip(found["paths"], found["labels"], strict=True):
        assert path.startswith(f"{names[label]}/")


def test_clusters_are_the_nearest_prototypes(site, expected):
    found = images_of(site)
    assert data(site, "site")["ks"] == list(KS)
    for place, distances in enumerate(expected[1]):
        np.testing.assert_allclose(found["distances"][place], distances.min(1).values, atol=2e-4)
        theirs = distances[torch.arange(len(distances)), torch.from_numpy(found["clusters"][place])]
        np.testing.assert_allclose(theirs, distances.min(1).values, atol=1e-5)


def test_neighbours_are_the_nearest_other_images(site, expected):
    found, distances = images_of(site), torch.cdist(expected[0], expected[0]).fill_diagonal_(torch.inf)
    np.testing.assert_allclose(found["nearDistances"], distances.sort(1).values[:, :12], atol=1e-3)
    assert not (found["near"] == np.arange(len(distances))[:, None]).any()


@pytest.mark.parametrize("place", range(len(KS)))
def test_a_cluster_s_page(place, site, expected):
    k, found = KS[place], images_of(site)
    table, clusters = data(site, f"clusters/{k}"), clusters_of(site, k)
    assert len(clusters) == k
    distances = expected[1][place]
    for cluster, entry in enumerate(clusters):
        members = np.flatnonzero(found["clusters"][place] == cluster)
        assert sorted(entry["images"]) == members.tolist()
        assert len(members) == table["size"][cluster]
        assert (np.diff(found["distances"][place][entry["images"]]) >= 0).all()
        # At the border another prototype is almost as near.
        two = distances[entry["images"]].topk(2, largest=False).values
        margins = (two[:, 1] - two[:, 0]).sort().values
        border = distances[entry["border"]].topk(2, largest=False).values
        np.testing.assert_allclose(border[:, 1] - border[:, 0], margins[: min(24, len(members) // 2)], atol=1e-5)
        ((other, overlaps),) = entry["overlaps"].items()
        assert other == str(KS[1 - place])
        theirs = found["clusters"][1 - place][members]
        assert dict(map(tuple, overlaps)) == {c: int((theirs == c).sum()) for c in set(theirs.tolist())}
        assert [count for _, count in overlaps] == sorted((count for _, count in overlaps), reverse=True)
        assert cluster not in entry["near"]
        if len(members):
            labels = np.bincount(np.array(found["labels"])[members])
            assert labels[table["label"][cluster]] == labels.max()
            assert table["purity"][cluster] == pytest.approx(labels.max() / len(members), abs=1e-4)


def test_thumbnails_are_the_images(site, odd_images):
    tile, paths = data(site, "site")["tile"], images_of(site)["paths"]
    assert tile == 24
    sheet = np.asarray(Image.open(site / "sheets" / "0.webp")).astype(float)
    for number in (0, ACROSS, len(paths) - 1):
        top, left = number // ACROSS * tile, number % ACROSS * tile
        image = np.asarray(Image.open(odd_images / paths[number]).convert("RGB")).astype(float)
        assert np.abs(sheet[top : top + tile, left : left + tile] - image).mean() < 15
        other = np.asarray(Image.open(odd_images / paths[number - 1]).convert("RGB")).astype(float)
        assert np.abs(sheet[top : top + tile, left : left + tile] - other).mean() > 15


def test_the_copy_is_found(site):
    rows = list(csv.DictReader((site / "findings" / "near-duplicates.csv").open(newline="", encoding="utf-8-sig")))
    assert len(rows) == 1
    assert {rows[0]["image"].rpartition("/")[2], rows[0]["other"].rpartition("/")[2]} == {"119.png", "copy.jpg"}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_resolves_on_the_disk(page, site):
    parsed = Page(site / f"{page}.html")
    for link in (*parsed.all("href"), *parsed.all("src")):
        path, _, _ = link.partition("#")
        assert link.startswith("data:,") or not path or (site / path).is_file(), link
    ids = set(parsed.all("id"))
    for link in parsed.all("href"):
        assert not link.startswith("#") or link[1:] in ids
    assert len(parsed.all("id")) == len(ids)
    # Labels of classes are text, and what scripts fill in is never taken for elements.
    assert "b" not in {tag for tag, _ in parsed.elements}
    scripts = "".join(file.read_text() for file in (site / "static").glob("*.js"))
    assert not re.search("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval", scripts)


def test_pages_say_what_is_looked_at(site, odd_run):
    index = Page(site / "index.html")
    for text in (
        "a run",
        "121 images of 3 classes",
        "those of the run's prototypes",
        "2 of 24",
        "cifar_resnet8",
        "loss",
    ):
        assert text in index.text
    assert "training" in index.text
    assert "4 s" in index.text
    assert CLASSES[0] in Page(site / "clusters.html").text
    assert all(attributes.get("aria-label") for tag, attributes in index.elements if tag == "svg")


def test_the_map(site):
    found, images = data(site, "map"), images_of(site)
    assert found["images"] == list(range(121))
    at = np.array(found["at"])
    assert at.min() == 0
    assert at.max() == 9999
    assert found["clusters"] == images["clusters"].tolist()
    for place, prototypes in enumerate(found["prototypes"]):
        for cluster, position in enumerate(prototypes):
            mine = at[images["clusters"][place] == cluster]
            expected = np.median(mine, 0).astype(int).tolist() if len(mine) else [-1, -1]
            assert position == expected


def test_a_run_without_prototypes_is_clustered_on_the_spot(tmp_path, capsys):
    images = write_images(tmp_path / "flat", 40, ())
    simclr = write_run(tmp_path / "simclr", images, "simclr", ks=())
    assert run(simclr, "--output", tmp_path / "site", "--on-map", 30) is None
    said = "The checkpoint has no prototypes: its features were clustered by k-means for these pages, into 2 clusters."
    assert said in capsys.readouterr().out
    assert said in Page(tmp_path / "site" / "index.html").text
    # Nor has it labels.
    assert data(tmp_path / "site", "site")["labels"] is None
    assert data(tmp_path / "site", "clusters/2")["purity"] is None
    assert "label" not in Page(tmp_path / "site" / "clusters.html").all("name")
    assert not (tmp_path / "site" / "findings" / "label-disagreements.csv").exists()
    assert len(data(tmp_path / "site", "map")["images"]) == 30


def test_of_heads_with_equally_many_prototypes_the_first_is_shown(tmp_path, odd_images):
    run_folder = write_run(tmp_path / "run", odd_images, "deepcluster_v2", ks=(5, 9, 5))
    assert run(run_folder, "--output", tmp_path / "site") is None
    assert data(tmp_path / "site", "site")["ks"] == [5, 9]
    said = "Of heads with equally many, the first one's are shown."
    assert said in Page(tmp_path / "site" / "index.html").text
    table = tmp_path / "table.npy"
    assert run_here(embed.main, run_folder, "--data", odd_images, "--output", table) is None
    rows = {row["path"]: row for row in csv.DictReader(table.with_suffix(".csv").open(newline=""))}
    shown = data(tmp_path / "site", "images/0")
    assert shown["clusters"][0] == [int(rows[path]["cluster_5_1"]) for path in shown["paths"]]
    assert [*rows[shown["paths"][0]]][2::2] == ["cluster_5_1", "cluster_9", "cluster_5_3"]


def test_a_sample_is_stated(odd_run, tmp_path):
    assert run(odd_run, "--output", tmp_path / "site", "--images", 20, "--ks", "4") is None
    said = "Shown is a sample of 20 of the 121 images"
    for page in PAGES:
        assert said in Page(tmp_path / "site" / f"{page}.html").text
    assert data(tmp_path / "site", "site")["images"] == 20
    assert sum(data(tmp_path / "site", "clusters/4")["size"]) == 20
    assert not (tmp_path / "site" / "findings" / "empty-clusters.csv").exists()
    # Of the run's own clusters, too, and of other images than it was trained on.
    assert run(odd_run, "--output", tmp_path / "site", "--images", 20, "--force") is None
    assert not (tmp_path / "site" / "findings" / "empty-clusters.csv").exists()
    others = write_images(tmp_path / "others", 40)
    assert run(odd_run, "--data", others, "--output", tmp_path / "site", "--force") is None
    assert not (tmp_path / "site" / "findings" / "empty-clusters.csv").exists()

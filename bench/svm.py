"""The linear SVMs of VOC07, trained and tested. Run by `make bench`.

Features and classes are as many as VOC07's with a ResNet-50, and are drawn so that the mean average precision is about
that of the paper. The protocol is that of the official code, whose way is a loop over the classes; ours divides them
among processes, one a core, which are started before the clock is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

from pcl_fast.distributed import World
from pcl_fast.evaluation.average_precision import envelope_ap
from pcl_fast.evaluation.parallel import own_cores, spread
from pcl_fast.evaluation.svm import PROTOCOLS, VocFeatures, VocJob, draw_voc, score_voc, unit, voc_jobs

TRAIN, TEST, D, CLASSES = 5011, 4952, 2048, 20
SIZES = {"training images": TRAIN, "test images": TEST, "d": D, "classes": CLASSES}
PROTOCOL, SHOTS, DRAWS, ROUNDS = PROTOCOLS["pcl"], (1, 2, 4, 8, 16), 5, 3
JOBS = {
    "all images": voc_jobs(PROTOCOL, (), DRAWS, CLASSES, full=True),
    "few images": voc_jobs(PROTOCOL, SHOTS, DRAWS, CLASSES, full=False),
}

# On the host, whatever the machine has.
pytestmark = pytest.mark.benchmark(timer=time.perf_counter)


@pytest.fixture(scope="module")
def data() -> VocFeatures:
    """Return features as after a ReLU, to which a class adds a direction; one class is on two images of five."""
    rng = np.random.default_rng(0)
    directions = 0.27 * rng.exponential(size=(CLASSES, D)) * (rng.random((CLASSES, D)) < 0.05)
    share = np.array([0.05] * (CLASSES - 1) + [0.4])

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        presence = np.where(rng.random((count, CLASSES)) < share, 1, -1).astype(np.int8)
        background = rng.exponential(size=(count, D)) * (rng.random((count, D)) < 0.5)
        return unit((background + (presence > 0) @ directions).astype(np.float32)), presence

    return VocFeatures(*images(TRAIN), *images(TEST))


def loop(data: VocFeatures, jobs: list[VocJob]) -> float:
    scores = []
    for job in jobs:
        rows = draw_voc(data.train_presence, PROTOCOL, 0, job)
        labels = np.where(data.train_presence[rows, job.label] == 1, 1, -1)
        machine = LinearSVC(C=0.5, class_weight={1: 2, -1: 1}, tol=1e-4, dual=True, max_iter=2000, random_state=0)
        machine.fit(data.train[rows], labels)
        scores.append(envelope_ap(machine.decision_function(data.test), data.test_presence[:, job.label] == 1))
    return float(np.mean(scores))


def ours(data: VocFeatures, jobs: list[VocJob]) -> float:
    alone = World(0, 1, torch.device("cpu"), None)
    work = [(job,) for job in jobs]
    parts = spread(partial(score_voc, data, PROTOCOL, 0), work, processes=own_cores(), world=alone)
    return float(np.mean([score.envelope for part in parts for [score] in part]))


PROVIDERS: dict[str, Callable[[VocFeatures, list[VocJob]], float]] = {"loop": loop, "ours": ours}


@pytest.mark.parametrize(("case", "provider"), [(case, name) for case in JOBS for name in PROVIDERS])
def test_svm(benchmark, data, case, provider):
    jobs = JOBS[case]
    benchmark.group = f"{case}, {len(jobs)} SVMs"
    described = {"SVMs": len(jobs), "shots": SHOTS if case == "few images" else "all", "processes": own_cores()}
    benchmark.extra_info.update(provider=provider, sizes=SIZES, case=described)
    found = benchmark.pedantic(PROVIDERS[provider], args=(data, jobs), warmup_rounds=1, rounds=ROUNDS)
    benchmark.extra_info["figures"] = {"mean_ap": round(found, 4)}
    if provider != "loop":
        assert found == pytest.approx(loop(data, jobs), abs=1e-4)

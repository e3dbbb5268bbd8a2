"""Images that are broken or extreme are named or handled, by worker processes too, and without a stack trace."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from pcl_fast.command import command
from pcl_fast.config import DataConfig, view_of
from pcl_fast.data import clustering_loader, find_images, training_loader
from pcl_fast.data.__main__ import main
from pcl_fast.data.loaders.resources import Resources
from pcl_fast.data.loaders.torchvision_loader import worker_options
from pcl_fast.data.views.pil import clustering_view
from pcl_fast.errors import ImageError
from pcl_fast.run.signals import StopSignals

CONFIG = DataConfig(size=16, loader="torchvision", workers=1)


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000)])
def test_an_extremely_long_image_is_used(tmp_path, alone, size):
    """Resized as a whole its clustering view takes 12 GB."""
    Image.new("RGB", size, (200, 30, 90)).save(tmp_path / "long.png")
    images = find_images(tmp_path)
    view = clustering_view(images.read(0), resize=256, size=224)
    assert view.shape == (224, 224, 3)
    assert (view == torch.tensor([200, 30, 90])).all()
    views = [view_of(CONFIG)] * 2
    training = training_loader(images, CONFIG, views=views, batch_size=1, seed=0, world=alone)
    assert next(training.epoch(0)).views[0].shape == (1, 16, 16, 3)


@pytest.mark.parametrize("size", [(640, 5), (5, 640), (641, 5)])
def test_what_is_cut_off_an_extremely_long_image_is_not_seen(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    whole = F.center_crop(F.resize(image, [8], antialias=True), [8])
    seen = clustering_view(image, resize=8, size=8)
    if size[0] != 641:  # whose middle is between two pixels
        assert np.abs(np.array(whole).astype(int) - seen.numpy()).max() <= 1
    assert seen.shape == (8, 8, 3)


@pytest.mark.parametrize("clustering", [False, True])
def test_a_broken_image_in_a_worker_is_one_sentence(tmp_path, image_folder, alone, clustering):
    whole = (image_folder / "class_0" / "00.jpg").read_bytes()
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(whole if number != 2 else whole[: len(whole) // 2])
    images = find_images(tmp_path)
    if clustering:
        batches = clustering_loader(images, CONFIG, batch_size=2, world=alone)
    else:
        batches = training_loader(images, CONFIG, views=[view_of(CONFIG)], batch_size=2, seed=0, world=alone).epoch(0)
    with pytest.raises(ImageError, match=rf"^cannot read image {tmp_path / '2.jpg'}") as raised:
        list(batches)
    assert "Traceback" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_check_may_be_read_in_part(image_folder, monkeypatch):
    """As by `head`: a closed output is no fault."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(sys, "argv", ["pcl_fast.data", "check", str(image_folder)])
        main()


class Waiting(torch.utils.data.Dataset):
    """Its first item has the number of the process that loads it, and the next takes longer than the test."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        time.sleep(60 * index)
        return os.getpid()


def signal_the_loader(number: int) -> None:
    options = worker_options(Resources(workers=1, prefetch=2, gpu=None, decoder_mib=0), prefetch=2)
    with StopSignals(), command("pcl_fast.train"):
        batches = iter(torch.utils.data.DataLoader(Waiting(), batch_size=None, **options))
        os.kill(int(next(batches)), number)
        next(batches)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "a process that loads images was ended by the system, most likely for lack of memory"),
        (signal.SIGTERM, "a process that loads images was ended by a signal, Terminated"),
        (signal.SIGHUP, "a process that loads images was ended by a signal, Hangup"),
    ],
)
def test_a_process_that_loads_images_and_is_ended_is_a_sentence(number, said, monkeypatch, capfd):
    """The trainer's signal handlers are not the loading process's."""
    # PyTorch installs its handler once in a process, and a command takes it away at its end.
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    with pytest.raises(SystemExit, match=f"^pcl_fast.train: {said}"):
        signal_the_loader(number)
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_about_a_loader_is_not_printed_where_it_cannot_be_raised(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    class Ending:
        def __init__(self, words: str):
            self.words = words

        def __del__(self):
            raise RuntimeError(self.words)

    with command("pcl_fast.train"):
        Ending("DataLoader worker (pid 7) is killed by signal: Terminated. ")
        Ending("something of ours")
    said = capsys.readouterr().err
    assert "something of ours" in said
    assert "DataLoader" not in said


def test_a_worker_whose_trainer_is_gone_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(os, "setpgid", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    worker_options(Resources(workers=1, prefetch=2, gpu=None, decoder_mib=0), prefetch=2)["worker_init_fn"](0)
    for error in (EOFError(), ConnectionResetError("reset"), ValueError("ours")):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "ValueError: ours\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_forked_process_from_its_first_moment(number):
    """It would raise in the midst of PyTorch's own lines, or be noted and forgotten."""
    with StopSignals() as signals, signals.at_once():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), number)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number
        assert not signals.asked
    before = signal.getsignal(signal.SIGTERM)
    if not (child := os.fork()):
        os._exit(signal.getsignal(signal.SIGTERM) is not before)
    assert os.waitpid(child, 0)[1] == 0  # nothing changes outside of it


class Large(torch.utils.data.Dataset):
    """Its items do not fit a file that the loading process may write."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        return torch.zeros(100_000)


def load_what_is_too_large() -> None:
    options = worker_options(Resources(workers=1, prefetch=2, gpu=None, decoder_mib=0), prefetch=2)
    with command("pcl_fast.train"):
        next(iter(torch.utils.data.DataLoader(Large(), batch_size=1, **options)))


def test_too_little_shared_memory_is_a_sentence():
    """Containers have 64 MB of it unless they are told otherwise."""
    with pytest.raises(SystemExit) as ended:
        load_what_is_too_large()
    assert "shared memory (/dev/shm) has no room" in str(ended.value)
    assert "--shm-size" in str(ended.value)
    assert "Traceback" not in str(ended.value)
    assert "\n" not in str(ended.value)

"""The rules for what the loaders use of a machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pcl_fast.config import DataConfig
from pcl_fast.data import describe_loader
from pcl_fast.data.loaders.resources import Resources, pick_resources
from pcl_fast.distributed import World

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def machine(monkeypatch):
    """Sets cores, ranks on this machine and bytes of GPU memory."""

    def set_up(cores: int, ranks: int = 1, memory: float = 0) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        properties = SimpleNamespace(total_memory=int(memory))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return set_up


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(2, 1, 2), (16, 4, 4), (128, 4, 16), (3, 4, 1), (40, 1, 16)])
def test_cores_are_divided_among_the_ranks(machine, cores, ranks, workers):
    machine(cores, ranks)
    assert pick_resources(DataConfig(), CPU) == Resources(workers, 2, None, 0)


@pytest.mark.parametrize(
    ("memory", "cores", "prefetch", "decoder_mib"),
    [(141e9, 16, 3, 16), (32e9, 8, 3, 16), (16e9, 16, 2, 9), (1e9, 16, 2, 1)],
)
def test_a_small_gpu_keeps_its_memory(machine, memory, cores, prefetch, decoder_mib):
    machine(cores, 1, memory)
    picked = pick_resources(DataConfig(), GPU)
    assert picked == Resources(cores, prefetch, GPU, decoder_mib)
    assert decoder_mib == 1 or 2 * decoder_mib * cores * 2**20 <= memory / 50


def test_what_is_asked_for_is_taken(machine):
    machine(64, 1, 16e9)
    asked = DataConfig(workers=3, prefetch=7, decoder_mib=40)
    assert pick_resources(asked, GPU) == Resources(3, 7, GPU, 40)
    by_cpu, by_gpu = (pick_resources(DataConfig(decode_on=decode_on), GPU) for decode_on in ("cpu", "gpu"))
    assert (by_cpu.gpu, by_cpu.decodes_on_gpu, by_gpu.decodes_on_gpu) == (GPU, False, True)
    assert not pick_resources(DataConfig(), CPU).decodes_on_gpu
    assert pick_resources(DataConfig(workers=0), CPU).workers == 0
    assert pick_resources(DataConfig(workers=0), CPU).threads == 1


def test_the_log_says_it(machine):
    machine(8, 2, 80e9)
    cpu, gpu = World(0, 1, CPU, None), World(0, 1, GPU, None)
    assert describe_loader(DataConfig(), cpu) == "images: dali, 4 threads, 2 batches ahead, decoding on the CPU"
    expected = "images: dali, 4 threads, 3 batches ahead, decoding on the GPU with 16 MiB a thread"
    assert describe_loader(DataConfig(), gpu) == expected
    expected = "images: dali, 4 threads, 3 batches ahead, decoding on the CPU"
    assert describe_loader(DataConfig(decode_on="cpu"), gpu) == expected
    expected = "images: torchvision, 5 processes, 2 batches ahead of each"
    assert describe_loader(DataConfig(loader="torchvision", workers=5), cpu) == expected

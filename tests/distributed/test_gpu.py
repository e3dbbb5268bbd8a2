"""A GPU that the installed PyTorch has no code for is refused by name, and the error says which stack to install."""

from __future__ import annotations

import pytest
import torch

from pcl_fast.distributed import connect
from pcl_fast.distributed.gpu import check_gpu, check_no_gpu, has_code_for

# What torch.cuda.get_arch_list() returns on a machine with a GPU, with requirements/cu13.txt and with v100.txt.
CU13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
V100 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


def test_the_lists_are_the_installed_ones():
    flags = torch._C._cuda_getArchFlags() or ""
    expected = {"2.11": CU13, "2.5": V100}.get(".".join(torch.__version__.split(".")[:2]))
    if not flags or expected is None:
        pytest.skip("neither of the two stacks")
    assert flags.split() == expected


@pytest.mark.parametrize(
    ("capability", "cu13", "v100"),
    [
        ((6, 1), False, True),
        ((7, 0), False, True),
        ((7, 2), False, True),
        ((7, 5), True, True),
        ((8, 0), True, True),
        ((8, 6), True, True),
        ((8, 9), True, True),  # code for sm_86 runs on later GPUs of the same major version
        ((9, 0), True, True),
        ((10, 0), True, False),
        ((10, 3), True, False),
        ((11, 0), False, False),
        ((12, 0), True, False),
        ((12, 1), True, False),
    ],
)
def test_which_stack_has_code_for_which_gpu(capability, cu13, v100):
    assert has_code_for(capability, CU13) == cu13
    assert has_code_for(capability, V100) == v100


@pytest.mark.parametrize(
    ("name", "runs_on", "not_on"),
    [
        ("sm_86", [(8, 6), (8, 7), (8, 9)], [(8, 0), (9, 0), (7, 5)]),
        ("compute_80", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
        ("sm_90a", [(9, 0)], [(9, 1), (8, 0), (10, 0)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(12, 0), (9, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0), (1, 2)]),
    ],
)
def test_what_code_runs_where(name, runs_on, not_on):
    assert all(has_code_for(capability, [name]) for capability in runs_on)
    assert not any(has_code_for(capability, [name]) for capability in not_on)


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that sets the machine's GPU and what PyTorch has code for."""

    def set_up(name: str, capability: tuple[int, int], architectures: list[str]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)

    return set_up


@pytest.mark.parametrize(
    ("name", "capability", "architectures", "advice"),
    [
        ("Tesla V100-SXM2-16GB", (7, 0), CU13, r"install requirements/v100\.txt \(`make setup STACK=v100`"),
        ("NVIDIA B200", (10, 0), V100, r"install requirements/cu13\.txt \(`make setup`"),
        ("NVIDIA GeForce RTX 5090", (12, 0), V100, r"install requirements/cu13\.txt \(`make setup`"),
        ("Tesla P100-PCIE-16GB", (6, 0), CU13, r"no stack supports GPUs older than Volta \(sm_70\)"),
        ("Tesla P100-PCIE-16GB", (6, 0), V100, r"no stack supports GPUs older than Volta \(sm_70\)"),
        ("NVIDIA Thor", (11, 0), CU13, r"neither of the stacks in requirements/ supports it yet"),
    ],
)
def test_the_error_names_the_gpu_and_the_stack(gpu, name, capability, architectures, advice):
    gpu(name, capability, architectures)
    expected = rf"{name} is sm_{capability[0]}{capability[1]}, which .*, {architectures[-1]}; {advice}"
    with pytest.raises(ValueError, match=expected):
        check_gpu(torch.device("cuda", 0))


def test_it_is_said_before_anything_uses_the_gpu(gpu, monkeypatch):
    gpu("Tesla V100-SXM2-16GB", (7, 0), CU13)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("too late"))
    with pytest.raises(ValueError, match="Tesla V100"):
        connect()


@pytest.mark.parametrize(
    ("capability", "architectures"), [((7, 0), V100), ((7, 5), CU13), ((9, 0), CU13), ((9, 0), V100), ((7, 0), [])]
)
def test_what_is_supported_passes(gpu, capability, architectures):
    gpu("a GPU", capability, architectures)
    check_gpu(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("hidden", "nodes", "refused"), [(None, 1, True), ("0", 1, True), ("", 1, False), (None, 0, False)]
)
def test_a_gpu_that_the_driver_keeps_from_pytorch_is_said(monkeypatch, hidden, nodes, refused):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr("pathlib.Path.glob", lambda path, pattern: iter([f"{path}/nvidia0"] * nodes))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if not refused:
        return check_no_gpu()
    with pytest.raises(ValueError, match=r"driver is too old for CUDA 13\.0 .*requirements/v100\.txt"):
        check_no_gpu()

"""Which kernels a run uses on its GPUs: those that compute right on all of them, decided at its start by all ranks."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pcl_fast.clustering import obstacle
from pcl_fast.config import Config
from pcl_fast.data.loaders.loader import pick_loader
from pcl_fast.distributed import World, gather_objects
from pcl_fast.kernels import assign, switches
from pcl_fast.losses.contrast import takes_kernels
from pcl_fast.nn.fused_batch_norm import takes_batch_norm
from pcl_fast.nn.max_pool import takes_pooling
from pcl_fast.nn.precision import encoder_dtype, loss_dtype
from pcl_fast.nn.stem import takes_stem
from pcl_fast.run.feature_choice import may_fuse_features
from pcl_fast.run.self_check import find_faults

# What each kernel is for, for people.
PURPOSE = {
    "contrast": "the loss",
    "assign_held": "the nearest centroids, by points held in registers",
    "assign": "the nearest centroids",
    "segment": "the sums over clusters",
    "normalise": "normalising images",
    "photometric": "colours and blur",
    "batch_norm": "the encoder's batch norms",
    "max_pool": "the encoder's max pooling",
    "stem": "the encoder's first convolution",
}
# What takes a kernel's place, where that is not plain PyTorch.
TWIN, PLAIN = {"assign_held": "the kernel assign"}, "plain PyTorch"


class Choice(NamedTuple):
    """off: the kernels that are left to their plain twins, sorted; notes: lines for the log; row: for the record, None
    where no kernel is used.
    """

    off: list[str]
    notes: list[str]
    row: dict[str, Any] | None


def choose_kernels(config: Config, settings: Sequence[str], world: World, *, off: Sequence[str] = ()) -> Choice:
    """Check the kernels that a run uses, and leave those that are wrong on any rank to their plain twins, on all ranks.
    All ranks call this together. Without a GPU no kernel is used, and nothing is checked.

    Args:
        settings: the method's own, see Method.settings.
        off: what was decided when the run began. It stays so, for it to compute as before; the others are checked
            again, since the GPU may be another one.

    Raises:
        ValueError: on all ranks, if a kernel is wrong that the recipe asks for by its backend, or any with
            config.strict_kernels.
        UserError: see `find_faults`.
    """
    switches.switch_off(())
    used = used_kernels(config, settings, world.device)
    if not used:
        return Choice(sorted(off), [], None)
    begin, checked = time.perf_counter(), [name for name in used if name not in off]
    faults = find_faults(checked, world.device, dim=config.model.dim, granularities=len(config.cluster.ks))
    found = agree(faults, world)
    now_off = sorted({*off, *found})
    switches.switch_off(now_off)
    _refuse(config, {name: found.get(name, "was found wrong when this run began") for name in now_off if name in used})
    seconds = round(time.perf_counter() - begin, 3)
    return Choice(
        now_off, _notes(off, found), {"checked": checked, "faults": found, "off": now_off, "seconds": seconds}
    )


def used_kernels(config: Config, settings: Sequence[str], device: torch.device) -> list[str]:
    """Return those of `switches.KERNELS` that a run would use if they are right."""
    if device.type != "cuda":
        return []
    dim, dtype = config.model.dim, loss_dtype(device)
    query, bank = torch.empty(1, dim, device=device), torch.empty(1, dim, device=device, dtype=dtype)
    clusters = bool(config.cluster.ks or config.evaluation.ks)
    searches = config.cluster.backend in ("auto", "triton") and obstacle(device, dtype, dim) is None
    fuses = _may_fuse(config) or may_fuse_features(config, device)
    used = {
        "contrast": "loss.backend" in settings and takes_kernels(config.loss.backend, query, bank),
        "assign_held": clusters and searches and assign.holds(bank),
        "assign": clusters and searches,
        "segment": clusters,
        "normalise": True,
        "photometric": pick_loader(config.data.loader) == "dali",
        "batch_norm": _may_fuse(config) and takes_batch_norm(encoder_dtype(device), device),
        "max_pool": fuses and takes_pooling(encoder_dtype(device), device),
        "stem": fuses and takes_stem(encoder_dtype(device), device),
    }
    return [name for name in switches.KERNELS if used[name]]


def _may_fuse(config: Config) -> bool:
    """Whether encoders may come to compute by triton, see fusion_choice.py."""
    return config.model.fusion == "triton" or (config.model.fusion == "auto" and not config.deterministic)


def agree(faults: dict[str, str], world: World) -> dict[str, str]:
    """Return what is wrong with each kernel on the first rank where it is, with that rank's name; the same on all."""
    told = gather_objects((socket.gethostname(), faults), world)
    found: dict[str, str] = {}
    for rank, (host, of_rank) in enumerate(told):
        for name, fault in of_rank.items():
            found.setdefault(name, fault if world.size == 1 else f"{fault} (rank {rank}, on {host})")
    return found


def _refuse(config: Config, off: dict[str, str]) -> None:
    """
    Raises:
        ValueError: see `choose_kernels`.
    """
    asked = {
        "contrast": ("--loss.backend", config.loss.backend),
        "assign": ("--cluster.backend", config.cluster.backend),
        "batch_norm": ("--model.fusion", config.model.fusion),
    }
    for name, fault in off.items():
        flag, backend = asked.get(name, ("", ""))
        if config.strict_kernels:
            raise ValueError(
                f"--strict-kernels: the kernel {name} {fault}; without that flag {TWIN.get(name, PLAIN)} would do it"
            )
        if backend == "triton":
            raise ValueError(f"{flag} triton: the kernel {name} {fault}; {flag} auto leaves it to plain PyTorch")


def _notes(before: Sequence[str], found: dict[str, str]) -> list[str]:
    kept = (
        [f"kernels that were found wrong when this run began stay off: {', '.join(sorted(before))}"] if before else []
    )
    return kept + [
        f"warning: the kernel {name} ({PURPOSE[name]}) {fault}. {_sentence(TWIN.get(name, PLAIN))} takes its "
        "place, which is slower"
        for name, fault in found.items()
    ]


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]

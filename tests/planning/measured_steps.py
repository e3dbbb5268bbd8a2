"""The formulas against measured steps: what they say of every step that the records hold, beside what it took.

A step with its loader: on a GPU the slower of the two; on a CPU, where both want the same cores, their times add up.
Not predicted is a step on a CPU beside the torchvision loader: its processes take the cores from the step's threads,
which wait for each other busily, so that both together take up to 1.5 times the sum. (Runs are planned on GPUs alone.)
Nor are the official code's steps: their encoder (channels first, on a GPU float32) is another one than that of
encoder-only, which the prediction begins with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pcl_fast.config import ModelConfig
from pcl_fast.planning.encoder import count
from pcl_fast.planning.figures import Record, Records
from pcl_fast.planning.ours import UPDATE_BYTES

_AT_HAND = "batch at hand"
_CPU_BANDWIDTH = 10e9  # bytes/s of every thread: assumed, what one core of a server copies


class MeasuredStep(NamedTuple):
    """Seconds per image."""

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, by what was measured."""
        return self.predicted / self.measured - 1


def with_loader(step: float, loader: float, *, on_cpu: bool) -> float:
    """Seconds per image of a step whose images a loader makes meanwhile."""
    return step + loader if on_cpu else max(step, loader)


def measured_steps(records: Records) -> Iterator[MeasuredStep]:
    """Of all records data.json and step.json."""
    for machine in records.machines.values():
        if "data" in machine:
            yield from _loader_steps(machine["data"])
        if "step" in machine:
            yield from _whole_steps(machine["step"], machine)


def _loader_steps(record: Record) -> Iterator[MeasuredStep]:
    """data.json: a step with one batch over and over, and a loader by itself, say what both take together."""
    for group, case in record.cases.items():
        providers = case["providers"]
        if not group.startswith("step of ") or _AT_HAND not in providers:
            continue
        alone = 1 / providers[_AT_HAND]["images_per_s"]
        for loader, figures in providers.items():
            rate = _views_of_step(record, loader)
            if rate is not None and not (_on_cpu(record) and loader == "torchvision"):
                predicted = with_loader(alone, 1 / rate, on_cpu=_on_cpu(record))
                name = f"{record.path.parent.name}, {group}, {loader}"
                yield MeasuredStep(name, 1 / figures["images_per_s"], predicted)


def _views_of_step(record: Record, loader: str) -> float | None:
    """Images/s of the loader by itself; where the step's views are of another size than ImageNet's, of that size."""
    groups = [group for group in record.cases if group.startswith("training views, ")]
    return record.figure(groups[0] if groups else "training views", loader, "images_per_s")


def _whole_steps(record: Record, machine: dict[str, Record]) -> Iterator[MeasuredStep]:
    """step.json: the encoder alone, and what the loss and the update add to it, say what our step takes; with a loader
    what they add to the encoder alone with that loader.
    """
    for group, case in record.cases.items():
        providers = case["providers"]
        if "encoder-only" not in providers or "ours" not in providers or case.get("method", "pcl") != "pcl":
            continue
        added = _added(case, record, machine)
        ours = [provider for provider in providers if provider.startswith("ours")]
        graphs = [provider.removeprefix("ours") for provider in ours if provider.endswith("+graph")]
        # Where there are graphs, what is not one may be bound by the host's launches, of which the plan knows nothing.
        for way in graphs or ("",):
            encoder = 1 / providers[f"encoder-only{way}"]["images_per_s"]
            more = added if case["loader"] == "off" else _beside_a_loader(added, case, record, encoder)
            name = f"{record.path.parent.name}, {group}{way}"
            yield MeasuredStep(name, _measured(providers[f"ours{way}"], encoder, by_turns=not way), encoder + more)


def _measured(figures: dict[str, float], encoder: float, *, by_turns: bool) -> float:
    """Seconds per image. By the ratio to the encoder alone if the two took turns, as the machine was then in the same
    state for both.
    """
    if by_turns and "share_of_encoder_only" in figures:
        return encoder / figures["share_of_encoder_only"]
    return 1 / figures["images_per_s"]


def _beside_a_loader(added: float, case: dict[str, Any], record: Record, encoder_with_loader: float) -> float:
    """On a CPU all of it; on a GPU what does not fit into the time that the encoder alone waits for the loader."""
    if _on_cpu(record):
        return added
    same = ("method", "arch", "size", "batch")
    alone = next(
        other["providers"]["encoder-only"]["images_per_s"]
        for other in record.cases.values()
        if other["loader"] == "off" and all(other.get(key) == case.get(key) for key in same)
    )
    return max(0.0, 1 / alone + added - encoder_with_loader)


def _added(case: dict[str, Any], record: Record, machine: dict[str, Record]) -> float:
    """Loss and update, seconds per image.

    The loss is loss.json's by the columns (on a GPU up to 64 rows share a pass over the banks), on a CPU by rows *
    columns (it is a product there); the update 32 bytes a parameter.
    """
    rows = case["batch"]
    columns = case["queue"] + sum(min(case["negatives"] or k, k) for k in case["ks"])
    loss = 0.0
    measured = _loss_by_column(machine["loss"]) if "loss" in machine else None
    if measured is not None:
        loss = measured * columns * (rows / 64 if _on_cpu(record) else max(1.0, rows / 64))
    parameters = case.get("parameters") or count(ModelConfig(arch=case["arch"]), case["size"]).parameters
    return (loss + UPDATE_BYTES * parameters / _bandwidth(record)) / rows


def _loss_by_column(record: Record) -> float | None:
    """Seconds of ours for 64 rows, by the columns, in the precision in which training computes it there."""
    wanted = 64, "float32" if _on_cpu(record) else "float16"
    group = next((name for name, case in record.cases.items() if (case.get("N"), case.get("dtype")) == wanted), "")
    figures = [record.figure(group, provider, "median_ms") for provider in ("triton+graph", "eager")]
    found = next((figure for figure in figures if figure is not None), None)
    return None if found is None else found / 1e3 / record.cases[group]["columns"]


def _on_cpu(record: Record) -> bool:
    """Whether encoder and loader share the cores."""
    return " CPU, " in record.content["machine"]


def _bandwidth(record: Record) -> float:
    """Bytes/s: of a GPU as measured, counting bytes read and written; of a CPU by its threads."""
    if not _on_cpu(record):
        return 1e9 * record.content["copy_gb_per_s"]
    return _CPU_BANDWIDTH * int(record.content["machine"].partition(" CPU, ")[2].split()[0])

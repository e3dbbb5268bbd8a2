"""What a run will take before anything is paid for: hours by phase, ours and the official way.

    python -m pcl_fast.plan PRESET --gpus 4 --gpu v100

Every number comes from a record of the benchmarks or from a publication, or is assumed; the table says which. A GPU
with records of its own (--results) is planned by these.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from pcl_fast.config import PRESETS
from pcl_fast.planning import costs, official
from pcl_fast.planning.constants import KINDS, Constant
from pcl_fast.planning.job import Job, Phase
from pcl_fast.planning.machines import Machine, machine
from pcl_fast.planning.picture import draw
from pcl_fast.planning.records import DEFAULT, Records

_IMAGENET = 1_281_167
_WIDTH = 150  # of the tables in a file or a pipe


@dataclass(frozen=True)
class Options:
    """What to run, and on what."""

    preset: tyro.conf.Suppress[str]
    epochs: int
    batch_size: int
    """Images per step over all GPUs together."""
    ks: tuple[int, ...]
    """Numbers of clusters; none is MoCo."""
    gpu: str = "v100"
    """v100, a100, h100 or h200."""
    gpus: int = 4
    """In every machine."""
    nodes: int = 1
    """Machines."""
    cores: int | None = None
    """Of every machine, for the loaders. None: the GPUs' share of NVIDIA's DGX."""
    gpu_link: float | None = None
    """GB/s of an all-reduce between the GPUs of a machine. None: as published."""
    node_link: float | None = None
    """GB/s between machines, of each. None: as NVIDIA's DGX has it."""
    cache: float | None = None
    """GB/s that each machine reads from a cache of the clustering view (--data.cache). None: decoded every time."""
    images: int = _IMAGENET
    price: float | None = None
    """Of a GPU for an hour, in any currency."""
    goal: float = 24.0
    """Hours; where the plan takes longer it says which phases are to blame."""
    results: Path = DEFAULT
    """Folder of the benchmarks' records."""
    output: Path = Path("plan.png")
    """Where the picture goes."""


class Plan(NamedTuple):
    """Phases of ours and of the official way, in the same order."""

    job: Job
    machine: Machine
    ours: list[Phase]
    official: list[Phase]


def _options(preset: str) -> Options:
    config = PRESETS[preset][1]
    return Options(preset, config.epochs, config.optim.batch_size, config.cluster.ks)


# The demo takes minutes, and its encoder is too small for a GPU's rates to mean anything.
CHOICES = {name: (description, _options(name)) for name, (description, _) in PRESETS.items() if name != "demo"}


def main() -> None:
    options = tyro.extras.overridable_config_cli(CHOICES, prog="pcl_fast.plan", description=__doc__)
    try:
        found = plan(options)
        draw(_bars(found), _title(options, found), options.output)
    except ValueError as error:
        # The message says what to do; a stack trace would hide it.
        sys.exit(f"pcl_fast.plan: {error}")
    console = Console()
    report(options, found, console if console.is_terminal else Console(width=_WIDTH))


def plan(options: Options) -> Plan:
    """
    Raises:
        ValueError: an option cannot be, or no record has what is needed.
    """
    config = PRESETS[options.preset][1]
    config = replace(
        config,
        epochs=options.epochs,
        optim=replace(config.optim, batch_size=options.batch_size),
        cluster=replace(config.cluster, ks=options.ks),
    )
    for flag, value in {
        "--gpu-link": options.gpu_link,
        "--node-link": options.node_link,
        "--cache": options.cache,
        "--price": options.price,
        "--goal": options.goal,
    }.items():
        if value is not None and not value > 0:
            raise ValueError(f"{flag} must be positive, got {value}")
    records = Records(options.results)
    where = _with_links(machine(options.gpu, records), options)
    cores = round(where.cores.value * options.gpus) if options.cores is None else options.cores
    job = Job(config, options.images, options.gpus, options.nodes, cores)
    return Plan(job, where, costs.plan(job, where), official.plan(job, where, records, options.gpu))


def _with_links(known: Machine, options: Options) -> Machine:
    """With the speeds that the user gave."""
    given = {"gpu_link": options.gpu_link, "node_link": options.node_link}
    changes = {
        name: replace(getattr(known, name), value=1e9 * value, source=f"assumed: --{name.replace('_', '-')}")
        for name, value in given.items()
        if value is not None
    }
    if options.cache is not None:
        name = "reading the clustering view's cache, each machine"
        changes["cache"] = Constant(name, 1e9 * options.cache, "B/s", "assumed: --cache")
    return replace(known, **changes)


def hours(phases: Sequence[Phase]) -> float:
    return sum(phase.hours for phase in phases)


def blame(phases: Sequence[Phase], goal: float) -> str:
    """Whether the goal is met, and else which phases take more than a twentieth of the whole, the longest first."""
    total = hours(phases)
    if total <= goal:
        return f"Within the goal of {goal:g} h."
    longest = sorted((phase for phase in phases if phase.hours > total / 20), key=lambda phase: -phase.hours)
    shares = ", ".join(f"{phase.name} {phase.hours:.1f} h ({phase.hours / total:.0%})" for phase in longest)
    return f"Over the goal of {goal:g} h by {total - goal:.1f} h. To blame: {shares}."


def report(options: Options, found: Plan, console: Console) -> None:
    """Print the table of phases, that of the constants, and what the two come to."""
    marks = _marks([*found.ours, *found.official])
    console.print(_phase_table(options, found, marks))
    console.print(_constant_table(marks))
    lines = [f"Ours: {blame(found.ours, options.goal)}"]
    if options.price is not None:
        ours, others = (hours(phases) * found.job.world * options.price for phases in (found.ours, found.official))
        lines.append(f"At {options.price:g} per GPU and hour: ours {ours:,.0f}, official {others:,.0f}.")
    if found.job.world == 1:
        lines.append("The official code does not run on one GPU: its column is what it would take if it did.")
    lines.append(_confidence(options.gpu, found, marks))
    lines.append(f"Picture: {options.output}")
    for line in lines:
        console.print(line, highlight=False)


def _confidence(gpu: str, found: Plan, marks: dict[Constant, str]) -> str:
    """What of ours rests on other than measurements, and on how many."""
    count = {kind: sum(constant.kind == kind for constant in marks) for kind in KINDS}
    phases = [phase for phase in found.ours if any(constant.kind != "measured" for constant in phase.constants)]
    return (
        f"Of ours not measured on the {gpu.upper()}: {'; '.join(phase.name for phase in phases) or 'nothing'}. Of "
        f"{len(marks)} constants {', '.join(f'{number} are {kind}' for kind, number in count.items())}."
    )


def _marks(phases: Sequence[Phase]) -> dict[Constant, str]:
    """constant -> m1, p2, a3, ...: its kind and a number, in the order of first use."""
    used = dict.fromkeys(constant for phase in phases for constant in phase.constants)
    return {constant: f"{constant.kind[0]}{number}" for number, constant in enumerate(used, start=1)}


def _phase_table(options: Options, found: Plan, marks: dict[Constant, str]) -> Table:
    table = Table(title=_title(options, found))
    for name in ("phase", "ours, h", "formula", "official, h", "formula"):
        table.add_column(name, justify="right" if name.endswith(" h") else "left", overflow="fold")
    for own, other in zip(found.ours, found.official, strict=True):
        table.add_row(own.name, f"{own.hours:.2f}", _cited(own, marks), f"{other.hours:.2f}", _cited(other, marks))
    table.add_section()
    table.add_row("sum", f"{hours(found.ours):.2f}", "", f"{hours(found.official):.2f}", "")
    return table


def _cited(phase: Phase, marks: dict[Constant, str]) -> str:
    return f"{phase.formula}\n{' '.join(marks[constant] for constant in phase.constants)}"


def _constant_table(marks: dict[Constant, str]) -> Table:
    table = Table(title="Where the numbers come from (m measured, p published, a assumed: neither)")
    for name in ("", "constant", "value", "source"):
        table.add_column(name, justify="right" if name == "value" else "left", overflow="fold")
    for constant, mark in marks.items():
        table.add_row(mark, constant.name, str(constant), constant.source)
    return table


def _bars(found: Plan) -> dict[str, list[Phase]]:
    return {"official": found.official, "ours": found.ours}


def _title(options: Options, found: Plan) -> str:
    machines = f"{found.job.nodes} machines of " if found.job.nodes > 1 else ""
    return (
        f"{options.preset}, {options.epochs} epochs of {options.images:,} images on {machines}{found.job.gpus} "
        f"{found.machine.name}, {found.job.cores} cores, {found.job.rows} images per GPU and step"
    )


if __name__ == "__main__":
    main()

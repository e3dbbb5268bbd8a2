"""What a run will take before anything is paid for: hours by phase, ours and the official way.

    python -m pcl_fast.plan PRESET --gpus 4 --gpu v100

Every number comes from a record of the benchmarks or from a publication, or is assumed; the table says which. A GPU
with records of its own (--results) is planned by these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from pcl_fast.command import command
from pcl_fast.command_line import Integers, parse_preset
from pcl_fast.config import PRESETS
from pcl_fast.planning import official, ours
from pcl_fast.planning.figures import DEFAULT, KINDS, Constant, Records
from pcl_fast.planning.job import ENCODER, FEATURES, PHASES, Job, Phase
from pcl_fast.planning.picture import draw
from pcl_fast.planning.rates import Machine, constant, machine

_IMAGENET = 1_281_167
_WIDTH = 150  # of the tables in a file or a pipe


@dataclass(frozen=True)
class Options:
    """What to run, and on what."""

    preset: tyro.conf.Suppress[str]
    epochs: int
    batch_size: int
    """Images per step over all GPUs together."""
    ks: Integers
    """Numbers of clusters; none is MoCo."""
    accumulate: int = 1
    """Parts in which a step is computed (--optim.accumulate)."""
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
    """Where the picture goes; into a folder as plan.png."""


# Costs are known of PCL, and of MoCo, which is PCL without prototypes; and of ResNet-50 on photographs: what the demo
# and other small encoders take, a GPU's rates do not tell.
CHOICES = {
    name: (description, Options(name, config.epochs, config.optim.batch_size, config.cluster.ks))
    for name, (description, config) in PRESETS.items()
    if getattr(config, "method", "pcl") == "pcl" and config.model.arch == "resnet50"
}


class Plan(NamedTuple):
    """What the run is, where it runs, and its phases by their names in job.PHASES: ours, as measured or published; ours
    as projected; and the official way's.
    """

    job: Job
    machine: Machine
    ours: dict[str, Phase]
    projected: dict[str, Phase]
    official: dict[str, Phase]


def main() -> None:
    with command("pcl_fast.plan"):
        options = parse_preset(CHOICES, prog="pcl_fast.plan", description=__doc__)
        if options.output.is_dir():
            options = replace(options, output=options.output / "plan.png")
        found = plan(options)
        draw({"official": found.official, "ours": found.ours}, _title(options, found), options.output)
        console = Console()
        report(options, found, console if console.is_terminal else Console(width=_WIDTH))


def plan(options: Options) -> Plan:
    """Plan the run by the records and by what is published.

    Raises:
        ValueError: an option cannot be, or no record has what is needed.
    """
    _check(options)
    config = PRESETS[options.preset][1]
    config = replace(
        config,
        epochs=options.epochs,
        optim=replace(config.optim, batch_size=options.batch_size, accumulate=options.accumulate),
        cluster=replace(config.cluster, ks=options.ks),
    )
    given = {
        name: constant(name, 1e9 * getattr(options, name), f"assumed: {_flag(name)}")
        for name in ("gpu_link", "node_link", "cache")
        if getattr(options, name) is not None
    }
    where = replace(machine(options.gpu, Records(options.results)), **given)
    cores = round(where.cores.value * options.gpus) if options.cores is None else options.cores
    job = Job(config, options.images, options.gpus, options.nodes, cores)
    whole = replace(job, config=replace(config, optim=replace(config.optim, accumulate=1)))
    return Plan(job, where, ours.plan(job, where), ours.projected(job, where), official.plan(whole, where))


def _check(options: Options) -> None:
    """
    Raises:
        ValueError: names the flag, its value and what to use instead.
    """
    for name, value in vars(options).items():
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise ValueError(f"{_flag(name)} must be {'finite' if value == math.inf else 'positive'}, got {value}")
    if any(k < 1 for k in options.ks):
        raise ValueError(f"--ks must be positive numbers of clusters, got {options.ks}")
    batch, images, world = options.batch_size, options.images, options.gpus * options.nodes
    if batch % world:
        raise ValueError(f"--batch-size {batch} does not divide among {world} GPUs; use a multiple of {world}")
    if batch // world % options.accumulate:
        raise ValueError(
            f"--accumulate {options.accumulate} does not divide a GPU's {batch // world} images; use a divisor of it"
        )
    if batch > images:
        raise ValueError(f"--batch-size {batch} is larger than the data set, --images {images}")
    if options.ks and max(options.ks) > images:
        raise ValueError(f"--ks: cannot make {max(options.ks)} clusters of {images} images; use smaller numbers")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def hours(phases: Mapping[str, Phase]) -> float:
    return sum(phase.hours for phase in phases.values())


def blame(phases: Mapping[str, Phase], goal: float) -> str:
    """Whether the goal is met, and else which phases take more than a twentieth of the whole, the longest first."""
    total = hours(phases)
    if total <= goal:
        return f"Within the goal of {goal:g} h."
    longest = sorted(phases.items(), key=lambda item: -item[1].hours)
    shares = [f"{name} {phase.hours:.1f} h ({phase.hours / total:.0%})" for name, phase in longest]
    blamed = sum(phase.hours > total / 20 for phase in phases.values())
    return f"Over the goal of {goal:g} h by {total - goal:.1f} h. To blame: {', '.join(shares[:blamed])}."


def report(options: Options, found: Plan, console: Console) -> None:
    """Print the table of phases, that of the constants, and what the two come to."""
    columns = (found.ours, found.official, found.projected)
    used = [each for phases in columns for phase in phases.values() for each in phase.constants]
    # In the order of first use: m1, p2, a3, ...
    marks = {each: f"{each.kind[0]}{number}" for number, each in enumerate(dict.fromkeys(used), start=1)}
    console.print(_phase_table(options, found, marks))
    console.print(_constant_table(marks))
    lines = [f"Ours: {blame(found.ours, options.goal)}"]
    if options.price is not None:
        own, others = (hours(phases) * found.job.world * options.price for phases in (found.ours, found.official))
        lines.append(f"At {options.price:g} per GPU and hour: ours {own:,.0f}, official {others:,.0f}.")
    if found.job.world == 1:
        lines.append("The official code does not run on one GPU: its column is what it would take if it did.")
    if found.job.parts > 1:
        lines.append("The official code takes a step as a whole: its column is what it would take if that fitted.")
    lines += [_confidence(options.gpu, found, marks), f"Picture: {options.output}"]
    for line in lines:
        console.print(line, highlight=False)


def _confidence(gpu: str, found: Plan, marks: dict[Constant, str]) -> str:
    """What of ours rests on other than measurements, and how many constants are of which kind."""
    kinds = [each.kind for each in marks]
    guessed = [name for name, phase in found.ours.items() if {each.kind for each in phase.constants} - {"measured"}]
    return (
        f"Of ours not measured on the {gpu.upper()}: {'; '.join(guessed) or 'nothing'}. Of {len(marks)} constants "
        f"{', '.join(f'{kinds.count(kind)} are {kind}' for kind in KINDS)}."
    )


def _phase_table(options: Options, found: Plan, marks: dict[Constant, str]) -> Table:
    table = _table(_title(options, found), "phase", "ours, h", "formula", "official, h", "formula")
    for name in PHASES:
        cells = [name]
        for phase in (found.ours[name], found.official[name]):
            cited = " ".join(marks[each] for each in phase.constants)
            cells += [f"{phase.hours:.2f}", f"{phase.formula}\n{cited}"]
        table.add_row(*cells)
    table.add_section()
    table.add_row("sum", f"{hours(found.ours):.2f}", "", f"{hours(found.official):.2f}", "")
    if hours(found.projected) != hours(found.ours):  # as where all of it is measured
        table.add_row("sum, projected", f"{hours(found.projected):.2f}", _projection(found, marks), "", "")
    return table


def _projection(found: Plan, marks: dict[Constant, str]) -> str:
    """What of the plan fusion should change, and on what that rests."""
    lines, cited = [], []
    for name, phase in found.projected.items():
        if phase.seconds != found.ours[name].seconds:
            lines.append(f"{name} {phase.hours:.2f}")
        if name in (ENCODER, FEATURES):
            cited += [marks[each] for each in phase.constants]
    return f"not measured: with fused batch norm and convolutions {', '.join(lines)}\n{' '.join(dict.fromkeys(cited))}"


def _constant_table(marks: dict[Constant, str]) -> Table:
    title = "Where the numbers come from (m measured, p published, a assumed: neither)"
    table = _table(title, "", "constant", "value", "source")
    for each, mark in marks.items():
        table.add_row(mark, each.name, str(each), each.source)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right" if name.endswith((" h", "value")) else "left", overflow="fold")
    return table


def _title(options: Options, found: Plan) -> str:
    job = found.job
    machines = f"{job.nodes} machines of " if job.nodes > 1 else ""
    parts = f" in {job.parts} parts" if job.parts > 1 else ""
    return (
        f"{options.preset}, {options.epochs} epochs of {options.images:,} images on {machines}{job.gpus} "
        f"{found.machine.name}, {job.cores} cores, {job.rows} images per GPU and step{parts}"
    )


if __name__ == "__main__":
    main()

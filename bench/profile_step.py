"""Where a step of ours spends its time: by phase, beside encoder-only's whole step, and by operator.

    python bench/profile_step.py [--batch 64] [--out bench/results/<machine>]

The loader is off. Phases are timed by the GPU's clock, if there is one, in steps that take turns with those of
encoder-only (see step.py); the medians are shown. Operators come from torch.profiler in a few more steps, which it
slows down. The results are step-profile.txt and step-profile.png; the picture also shows one of the profiled steps.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import device
import machine
import recipe
import step
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from pcl_fast.learner import Learner
from pcl_fast.methods import base, pcl

STEP = "step"
STEPS, PROFILED, TOP = (20 if device.CUDA else 8), 3, 18
COLOURS = {
    "query forward": "tab:blue",
    "key forward": "tab:cyan",
    "backward": "tab:purple",
    "inputs": "tab:gray",
    "normalise": "tab:olive",
    "shuffle": "tab:brown",
    "loss": "tab:red",
    "optimiser": "tab:orange",
    "momentum update": "gold",
    "queue": "tab:pink",
    "metrics": "black",
    "rest": "lightgray",
}
# Kinds of operators, by what their names contain; the first that fits counts.
KINDS = {
    "batch norm": ("batch_norm", "bn_fw", "bn_bw", "batchnorm"),
    "convolution": ("conv", "cudnn", "xmma", "cutlass", "winograd", "fprop", "dgrad", "wgrad"),
    "ReLU, addition": ("relu", "clamp", "threshold", "add"),
    "other": ("",),
}
KIND_COLOURS = dict(zip(KINDS, ("tab:green", "tab:blue", "tab:red", "lightgray"), strict=True))


class Phases:
    """The times of a learner's parts, step by step. It replaces the learner's functions by ones that take the time."""

    def __init__(self, learner: Learner):
        self.instants: list[tuple[str, Any, Any]] = []
        self.steps: list[dict[str, float]] = []  # seconds
        method = learner.method
        for phase, owner, name in (
            ("inputs", learner, "inputs"),
            ("normalise", base, "normalise"),
            ("shuffle", method.shuffle, "begin"),
            ("query forward", method.encoder, "forward"),
            ("key forward", method.momentum_encoder, "forward"),
            ("loss", pcl, "pcl_loss"),
            ("backward", torch.Tensor, "backward"),
            ("optimiser", learner.optimizer, "step"),
            ("momentum update", method.average, "update"),
            ("queue", method.queue, "enqueue"),
            ("metrics", pcl, "_metrics"),
        ):
            self._time(phase, owner, name)

    def _time(self, phase: str, owner: object, name: str) -> None:
        call = getattr(owner, name)

        def timed(*arguments, **options):
            with record_function(phase):
                begin = device.clock()
                result = call(*arguments, **options)
                self.instants.append((phase, begin, device.clock()))
            return result

        setattr(owner, name, timed)

    def step(self, run: Callable[[], object]) -> None:
        self.instants.clear()
        begin = device.clock()
        run()
        total = device.clock() - begin
        seconds = defaultdict(float)
        for phase, start, end in self.instants:
            seconds[phase] += end - start
        seconds["rest"] = total - sum(seconds.values())
        self.steps.append(seconds)

    def medians(self) -> dict[str, float]:
        """Return every phase's median time in milliseconds."""
        found = {phase: statistics.median(seconds[phase] for seconds in self.steps) for phase in COLOURS}
        return {phase: 1e3 * seconds for phase, seconds in found.items() if seconds}


class Operators:
    """What the profiler has seen: kernels if there is a GPU, otherwise operators, each without those that it calls."""

    def __init__(self, run: Callable[[], object]):
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.CUDA else [])]
        with profile(activities=activities) as trace:
            for _ in range(PROFILED):
                with record_function(STEP):
                    run()
            if device.CUDA:
                torch.cuda.synchronize()
        events = trace.events()
        self.steps = [event for event in events if event.name == STEP and on_host(event)]
        self.phases = [event for event in events if event.name in COLOURS and on_host(event)]
        work = [event for event in events if event.name != STEP and event.name not in COLOURS]
        self.work = [event for event in work if on_host(event) != device.CUDA]

    def totals(self) -> list[tuple[str, int, float]]:
        """Return (name, calls, milliseconds) over all profiled steps, the longest first."""
        found: dict[str, list[float]] = defaultdict(list)
        for event in self.work:
            took = event.time_range.elapsed_us() if device.CUDA else event.self_cpu_time_total
            found[event.name].append(took / 1e3)
        return sorted(((name, len(ms), sum(ms)) for name, ms in found.items()), key=lambda row: -row[2])


def on_host(event: FunctionEvent) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU


def kind_of(name: str) -> str:
    return next(kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts))


def table(title: str, phases: dict[str, float], encoder_ms: float, operators: Operators) -> str:
    total = sum(phases.values())
    lines = [title, "", f"{'phase':24}{'ms':>10}{'share':>9}"]
    lines += [f"{phase:24}{ms:10.3f}{ms / total:9.1%}" for phase, ms in phases.items()]
    lines += [f"{'together':24}{total:10.3f}", f"{'encoder-only':24}{encoder_ms:10.3f}{encoder_ms / total:9.1%}", ""]
    rows = operators.totals()
    everything = sum(ms for _, _, ms in rows)
    lines.append(f"{'kind':24}{'ms a step':>10}{'share':>9}")
    for kind in KINDS:
        ms = sum(ms for name, _, ms in rows if kind_of(name) == kind)
        lines.append(f"{kind:24}{ms / PROFILED:10.3f}{ms / everything:9.1%}")
    lines += ["", f"{'kernel' if device.CUDA else 'operator':64}{'calls':>8}{'ms a step':>11}{'share':>8}"]
    lines += [
        f"{name[:62]:64}{calls / PROFILED:8.0f}{ms / PROFILED:11.3f}{ms / everything:8.1%}"
        for name, calls, ms in rows[:TOP]
    ]
    return "\n".join(lines) + "\n"


def picture(title: str, phases: dict[str, float], encoder_ms: float, operators: Operators) -> Figure:
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1)
    start = 0.0
    for phase, ms in phases.items():
        above.barh("ours", ms, left=start, color=COLOURS[phase], label=f"{phase} {ms / sum(phases.values()):.1%}")
        start += ms
    above.barh("encoder-only", encoder_ms, color="tab:blue", alpha=0.4)
    above.set(title=title, xlabel="ms")
    above.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)

    last = operators.steps[-1].time_range
    lane(below, "phases", operators.phases, last, lambda name: COLOURS[name])
    lane(below, "kernels" if device.CUDA else "operators", operators.work, last, lambda n: KIND_COLOURS[kind_of(n)])
    for kind, colour in KIND_COLOURS.items():
        below.barh("phases", 0, color=colour, label=kind)
    below.set(title="one step under the profiler", xlabel="ms")
    below.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    for axes in (above, below):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def lane(axes: Axes, label: str, events: Iterable[FunctionEvent], step_range: Any, colour: Callable) -> None:
    """Draw the events of a step, and over an operator those that it calls. On a GPU these are the events that ended
    after the host began the step.
    """
    shown = [event for event in events if event.time_range.end > step_range.start]
    shown.sort(key=lambda event: -event.time_range.elapsed_us())
    lefts = [(event.time_range.start - step_range.start) / 1e3 for event in shown]
    widths = [event.time_range.elapsed_us() / 1e3 for event in shown]
    axes.barh([label] * len(shown), widths, left=lefts, color=[colour(event.name) for event in shown])


def main() -> None:
    found, slug = machine.describe()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=step.BATCHES[0])
    parser.add_argument("--out", type=Path, default=machine.HERE / "results" / slug)
    arguments = parser.parse_args()

    torch.backends.cudnn.benchmark = True
    case = step.Case(arguments.batch, "off")
    learner = recipe.ready_learner(case.config)
    ours = functools.partial(learner.step, step.batch_at_hand(case), 0)
    reference = step.encoder_only(case).step
    for _ in range(device.WARM_UP):
        ours(), reference()
    phases, seconds = Phases(learner), []
    for _ in range(STEPS):
        seconds.append(device.seconds(reference))
        phases.step(ours)
    title = f"{case}: {found['machine']}, torch {torch.__version__}"
    shown = title, phases.medians(), 1e3 * statistics.median(seconds), Operators(ours)

    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(*shown)
    (arguments.out / "step-profile.txt").write_text(text)
    picture(*shown).savefig(arguments.out / "step-profile.png", dpi=110)
    print(text)


if __name__ == "__main__":
    main()

"""In which way the encoders' passes are computed: the one that is fastest here, of those that compute right."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pcl_fast.config import Config, DataConfig
from pcl_fast.crop_sizes import in_proportion
from pcl_fast.distributed import World, gather_objects
from pcl_fast.nn.fusion import WAYS, use
from pcl_fast.run.encoder_passes import Passes

EAGER, AUTO, CAPTURED = WAYS[0], "auto", "+graph"
# Less is not worth other bits, and hardly to be told from chance.
_FASTER = 0.98
# Seconds that a run must last for torch.compile to be tried, for each size of crops, which takes a minute of it.
_LONG = 3600.0
# Seconds for each size of crops after which no other way is begun. One that has begun goes on: a compiler is not to be
# interrupted.
_TO_TRY = 60.0


class Choice(NamedTuple):
    """way: of `nn.fusion.WAYS`, in use now, and with CAPTURED behind it if steps are to be captured as a CUDA graph;
    notes: lines for the log; row: for the record, None where nothing was measured; kept: the way for the checkpoint,
    None where nothing has been decided yet.
    """

    way: str
    notes: list[str]
    row: dict[str, Any] | None
    kept: str | None


def choose_fusion(
    config: Config,
    encoders: Mapping[str, nn.Module],
    left: Mapping[DataConfig, int],
    world: World,
    *,
    kept: str | None = None,
    sides: Sequence[int] = (),
    graphs: bool = True,
) -> Choice:
    """Choose how the encoders compute, and let them. All ranks call this together, and get the same.

    With --model.fusion auto the passes are timed on a GPU at the run's own shapes, in every way that agrees with the
    eager one; the slowest rank counts. Where crops grow over the epochs a way must agree at every size that is left,
    and its time is the mean over the steps. Each is timed as a CUDA graph too, if steps can be captured: a way of many
    small launches can be the slowest from the host and the fastest in a graph. On a CPU, with --deterministic, and
    where no step is left, there is nothing to choose: eager.

    Args:
        encoders: the method's; "query" is the one with a backward pass.
        left: parts of steps that the run has left, by what their crops are.
        kept: what the run has decided before, which stays; on a CPU, with --deterministic and where a way is asked for
            by name it is not used.
        sides: of the method's views where crops have the run's size, see Passes.of_run.
        graphs: whether steps can be captured.

    Raises:
        ValueError: on all ranks, if the way that is asked for cannot be used.
    """
    asked = config.model.fusion
    if asked != AUTO:
        return Choice(_use_or_refuse(asked, encoders, world), [], None, kept)
    if config.deterministic or not _has_choice(world) or (kept is None and not left):
        return Choice(_use_or_refuse(EAGER, encoders, world), [], None, kept)
    if kept is not None:
        return _keep(kept, encoders, world)
    return _fastest(_Stages.of_run(config, encoders, left, world, sides), world, graphs)


def _has_choice(world: World) -> bool:
    """Whether there is more than one way on this device."""
    return world.device.type == "cuda"


def _keep(way: str, encoders: Mapping[str, nn.Module], world: World) -> Choice:
    fault = _agree({way: _try_to_use(way.removesuffix(CAPTURED), encoders)}, world).get(way)
    if fault is None:
        return Choice(way, [], None, way)
    _use_or_refuse(EAGER, encoders, world)
    note = f"warning: so far the encoders computed by {way}, which does not work here ({fault}); they go on by {EAGER}"
    return Choice(EAGER, [note], None, EAGER)


def _use_or_refuse(way: str, encoders: Mapping[str, nn.Module], world: World) -> str:
    if fault := _agree({way: _try_to_use(way, encoders)}, world):
        raise ValueError(f"--model.fusion {way}: {fault[way]}")
    return way


def _try_to_use(way: str, encoders: Mapping[str, nn.Module]) -> str:
    """Use it in all encoders, or in none; what is wrong, or ""."""
    try:
        for encoder in encoders.values():
            use(way, encoder)
    except Exception as error:  # compilers raise whatever they like
        for encoder in encoders.values():
            use(EAGER, encoder)
        return _line(error) or type(error).__name__
    return ""


def _agree(faults: dict[str, str], world: World) -> dict[str, str]:
    """The faults of the first rank that has any, for each way; the same on all ranks."""
    found: dict[str, str] = {}
    for of_rank in gather_objects(faults, world):
        for way, fault in of_rank.items():
            if fault:
                found.setdefault(way, fault)
    return found


class _Stages(NamedTuple):
    """passes: one for each size that crops have in what is left of the run; steps: how many of each are left."""

    passes: list[Passes]
    steps: list[int]

    @classmethod
    def of_run(
        cls,
        config: Config,
        encoders: Mapping[str, nn.Module],
        left: Mapping[DataConfig, int],
        world: World,
        sides: Sequence[int],
    ) -> _Stages:
        last = config.data.size
        at_sizes = [[in_proportion(side, data.size, last) for side in sides or [last]] for data in left]
        return cls([Passes.of_run(config, encoders, world, at_size) for at_size in at_sizes], list(left.values()))

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        return self.passes[0].encoders

    def milliseconds(self, **how: bool) -> float:
        """Those of a step, the mean over all."""
        return sum(passes.milliseconds(**how) * n for passes, n in zip(*self, strict=True)) / sum(self.steps)


def _fastest(stages: _Stages, world: World, graphs: bool) -> Choice:
    begin = time.perf_counter()
    with stages.passes[0].undisturbed():
        times, left_out = _measure(stages, world, graphs)
    way = min(times, key=times.get, default=EAGER)
    if EAGER in times and times[way] > _FASTER * times[EAGER]:
        way = EAGER
    _use_or_refuse(way.removesuffix(CAPTURED), stages.encoders, world)
    seconds = round(time.perf_counter() - begin, 1)
    told = ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items())
    notes = [f"the encoders compute by {way} ({told or 'nothing could be timed'}; found out in {seconds} s)"]
    notes += [f"not by {name}: {fault}" for name, fault in left_out.items()]
    row = {"way": way, "ms": times, "left_out": left_out, "seconds": seconds}
    return Choice(way, notes, row, way if times else None)


def _measure(stages: _Stages, world: World, graphs: bool) -> tuple[dict[str, float], dict[str, str]]:
    """
    Returns:
        Milliseconds of the slowest rank, for the ways that all ranks can use; why others are left out.
    """
    times: dict[str, float] = {}
    left_out: dict[str, str] = {}
    trial = _Trial(stages)
    begin, passed, limit = time.perf_counter(), 0.0, _TO_TRY * len(stages.steps)
    for way in WAYS:
        if way == "compile" and (fault := _too_short(stages, times.get(EAGER, 0.0))):
            left_out[way] = fault
            continue
        ways = {way: functools.partial(trial.of, way)} | ({way + CAPTURED: trial.captured} if graphs else {})
        for name, measure in ways.items():
            if passed > limit:
                left_out[name] = f"the ways before it took {passed:.0f} s, and after {limit:.0f} none is begun"
                break
            told = gather_objects((*measure(), time.perf_counter() - begin), world)
            passed = max(seconds for _, _, seconds in told)
            if faults := [fault for fault, _, _ in told if fault]:
                left_out[name] = faults[0]
                break
            times[name] = round(max(ms for _, ms, _ in told), 3)
        if EAGER in left_out:
            break  # nothing tells what is right
    return times, left_out


def _too_short(stages: _Stages, ms: float) -> str:
    """Why what is left of a run, by so many milliseconds a step, is not worth compiling for; "" if it is."""
    left, sizes = sum(stages.steps) * ms / 1e3, len(stages.steps)
    if left >= sizes * _LONG:
        return ""
    takes = "a minute" if sizes == 1 else f"{sizes} minutes for {sizes} sizes"
    return f"to compile takes {takes}, and some {left / 60:.0f} minutes of encoding are left"


class _Trial:
    """Tries ways one after another, eager first: what is right is told by how far that is from float32."""

    def __init__(self, stages: _Stages):
        self._stages = stages
        self._references: list[list[torch.Tensor]] = []
        self._tolerances: list[float] = []

    def of(self, way: str) -> tuple[str, float]:
        """What is wrong with a way, or ""; and its milliseconds. It stays in use."""
        if fault := _try_to_use(way, self._stages.encoders):
            return fault, 0.0
        try:
            if way == EAGER:
                self._references = [passes.reference() for passes in self._stages.passes]
            errors = self._errors()
            if way == EAGER:
                # Rounded elsewhere, or more often, but no more than twice as far off.
                self._tolerances = [2 * error + 1e-3 for error in errors]
            for error, tolerance in zip(errors, self._tolerances, strict=True):
                if not error <= tolerance:
                    return f"it is off by {error:.2g}, and rounding explains {tolerance:.2g}", 0.0
            return "", self._stages.milliseconds()
        except Exception as error:  # compilers, drivers and PyTorch raise whatever they like
            return f"{type(error).__name__}: {_line(error)}", 0.0

    def captured(self) -> tuple[str, float]:
        """What is wrong with the way in use as a CUDA graph, or ""; and its milliseconds."""
        try:
            return "", self._stages.milliseconds(captured=True)
        except Exception as error:  # drivers and PyTorch raise whatever they like
            return f"{type(error).__name__}: {_line(error)}", 0.0

    def _errors(self) -> list[float]:
        return [passes.error(of) for passes, of in zip(self._stages.passes, self._references, strict=True)]


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]

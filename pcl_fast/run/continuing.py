"""Whether a run may go on from a checkpoint, and what it may change then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcl_fast.config import Config, optim_config, recipe_differences, to_dict
from pcl_fast.methods import method_class
from pcl_fast.optim import learning_rate

# What `--resume-from` may change: how fast and how far a run goes on, not what it has learned so far.
_MAY_CHANGE = (
    "epochs", "seed", "data.sizes", "loss.temperature", "optim.lr", "optim.scale_lr", "optim.momentum",
    "optim.weight_decay", "optim.trust", "optim.schedule", "optim.final_share", "optim.milestones",
    "optim.warmup_epochs",
)  # fmt: skip


def check_same_run(state: dict[str, Any], config: Config, fingerprint: str) -> list[str]:
    """Refuse another run's checkpoint in config.output. The number of epochs may change where the learning rates so far
    would have been the same, and what the method has of its own that depends on it.

    Returns:
        Lines for the log about what has changed.

    Raises:
        ValueError: it belongs to another method, recipe or data set; names what differs, and what can be done.
    """
    _check_method(state, config, config.output)
    differences = _differences(state, config, fingerprint)
    if [line.partition(":")[0] for line in differences] == ["epochs"]:
        _check_length(config.output, config.epochs, state["epoch"] + (state["step"] > 0))
        _check_rates(state, config)
        _check_method_s_schedule(state, config)
        return differences
    if differences:
        raise ValueError(
            f"{config.output} holds a run under another recipe; choose another --output, or go back to its values:\n  "
            + "\n  ".join(differences)
        )
    return []


def check_taken_up(state: dict[str, Any], config: Config, fingerprint: str) -> list[str]:
    """Refuse a checkpoint of another folder, config.resume_from, from which this recipe cannot go on.

    Returns:
        Lines for the log: where the run comes from, and what has changed.

    Raises:
        ValueError: it belongs to another method or data set, or what differs may not; names it.
    """
    _check_method(state, config, config.resume_from)
    _check_length(config.resume_from, config.epochs, state["epoch"] + 1)
    differences = _differences(state, config, fingerprint)
    refused = [line for line in differences if line.partition(":")[0] not in _MAY_CHANGE]
    if refused:
        raise ValueError(
            f"a run cannot go on from {config.resume_from} with\n  " + "\n  ".join(refused) + "\nWhat may change: "
            f"{', '.join(_MAY_CHANGE)}"
        )
    epoch = state["epoch"]
    before = learning_rate(optim_config(state["config"]), epoch, state["config"]["epochs"])
    now = learning_rate(config.optim, epoch, config.epochs)
    if before != now:
        differences.append(f"learning rate of epoch {epoch + 1}: {before:.6g} -> {now:.6g}")
    return [f"taken up from {config.resume_from} after {epoch} epochs and {state['step']} steps", *differences]


def _check_method(state: dict[str, Any], config: Config, place: Path) -> None:
    method = state["config"]["method"]
    if method != config.method:
        raise ValueError(
            f"{place} holds a run of the method {method}, not of {config.method}; choose another --output, or go on "
            f"with its own preset, {state['config']['preset']}"
        )


def _check_length(place: Path, epochs: int, least: int) -> None:
    if epochs < least:
        raise ValueError(f"{place} has come too far for --epochs {epochs}: it must be {least} or more")


def _check_rates(state: dict[str, Any], config: Config) -> None:
    """Refuse another number of epochs if it changes the learning rates of those that are done."""
    saved, place = state["config"]["epochs"], config.output
    for epoch in range(state["epoch"] + (state["step"] > 0)):
        before, now = (learning_rate(config.optim, epoch, epochs) for epochs in (saved, config.epochs))
        if before != now:
            raise ValueError(
                f"the {config.optim.schedule} schedule of {config.epochs} epochs is not that of {saved}: in epoch "
                f"{epoch + 1} {place} had a learning rate of {before:.6g}, and would have had {now:.6g}. "
                + _ways_out(saved, config)
            )


def _check_method_s_schedule(state: dict[str, Any], config: Config) -> None:
    """Refuse another number of epochs if the method's own schedule depends on it, and a step is done."""
    saved, has_begun = state["config"]["epochs"], state["epoch"] or state["step"]
    if has_begun and method_class(config.method).knows_its_end:
        raise ValueError(
            f"what a step of {config.method} does depends on the run's length: those that {config.output} has done "
            f"would have been others with --epochs {config.epochs}. " + _ways_out(saved, config)
        )


def _ways_out(saved: int, config: Config) -> str:
    """saved: number of epochs of the run that is there."""
    return (
        f"Go back to --epochs {saved}, train anew in another --output, or accept the jump: --resume-from "
        f"{config.output / 'checkpoint.pt'} --output NEW --epochs {config.epochs}"
    )


def _differences(state: dict[str, Any], config: Config, fingerprint: str) -> list[str]:
    differences = recipe_differences(state["config"], to_dict(config))
    if state["data"] != fingerprint:
        differences.append(f"data set: {state['data']} -> {fingerprint}")
    return differences

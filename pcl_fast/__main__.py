"""All commands under one name: `pcl-fast train ...` is `python -m pcl_fast.train ...`."""

from __future__ import annotations

import runpy
import sys

from pcl_fast.interrupts import SCRIPT

# Each is the module of that name. What they do is said here: asking them takes the seconds of importing PyTorch.
COMMANDS = {
    "train": "pre-train an encoder, by a preset and flags",
    "launch": "start a command as several ranks on this machine",
    "plan": "what a run will cost, before you pay for it",
    "evaluate": "the paper's tables and figures, for any checkpoint",
    "export": "an encoder for torchvision, timm, Detectron2 or ONNX",
    "embed": "features and clusters of any images, as a table",
    "explore": "a site that shows a run's clusters and images",
    "demo": "the whole method on 5,000 digits, in minutes",
    "data": "look after a data set before training on it",
}


def main() -> None:
    """Run the command that comes first in sys.argv with the rest of it. Exits with 2 if there is none of that name."""
    name, rest = next(iter(sys.argv[1:]), "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name not in COMMANDS:
        print(f"{SCRIPT}: there is no command {name!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module = f"pcl_fast.{name}"
    sys.argv = [module, *rest]
    # As `python -m` does: processes that a loader starts then find the module again.
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _usage() -> str:
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [f"usage: {SCRIPT} COMMAND ...", "", *lines, "", f"{SCRIPT} COMMAND --help lists a command's flags."]
    )


if __name__ == "__main__":
    main()

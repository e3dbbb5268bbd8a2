"""How a run computes: found out at its start, the same on all ranks; what a GPU decided by time is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pcl_fast.captured import CapturedStep
from pcl_fast.config import Config, DataConfig
from pcl_fast.data import Batch
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import Method
from pcl_fast.run.feature_choice import choose_layers
from pcl_fast.run.fusion_choice import CAPTURED, EAGER, choose_fusion
from pcl_fast.run.kernel_choice import choose_kernels


class Choices:
    """kernels_off: kernels that were found wrong, see kernel_choice.py. fusion: how the encoders compute, see
    fusion_choice.py. unfused_layers: see feature_choice.py. All as the checkpoint holds them; None: not decided
    yet.
    """

    def __init__(self, kept: dict[str, Any] | None):
        """kept: what `state` of the run that goes on was; None for a new one."""
        self.kernels_off: list[str] = [] if kept is None else kept["kernels_off"]
        self.fusion: str | None = None if kept is None else kept["fusion"]
        self.unfused_layers: list[str] | str | None = None if kept is None else kept["unfused_layers"]
        self._way = EAGER

    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {name: getattr(self, name) for name in ("kernels_off", "fusion", "unfused_layers")}

    def make(
        self,
        config: Config,
        learner: Learner,
        left: Mapping[DataConfig, int],
        sizes: Sequence[int],
        world: World,
        say: Callable[[str], None],
    ) -> dict[str, dict[str, Any]]:
        """Choose what is not chosen yet, and let the run compute so. All ranks call this together.

        Args:
            left: steps that the run has left, by what their crops are.
            sizes: that images have in passes over them, in pixels; empty if there are no passes.
            say: is called with lines for the log.

        Returns:
            Rows for the record, by their kinds.

        Raises:
            ValueError: a kernel is wrong here, or a way does not work, that the recipe asks for.
        """
        method = learner.method
        kernels = choose_kernels(config, method.settings, world, off=self.kernels_off)
        sides, parts = [view.size for view in method.views], config.optim.accumulate
        left = {data: steps * parts for data, steps in left.items()}
        fusion = choose_fusion(
            config, method.encoders(), left, world, kept=self.fusion, sides=sides, graphs=_has_graphs(method)
        )
        encoder = method.encoders()[method.features().encoder]
        layers = choose_layers(config, encoder, sizes, world, kept=self.unfused_layers)
        self.kernels_off, self.fusion, self.unfused_layers = kernels.off, fusion.kept, layers.kept
        self._way, method.unfused_layers = fusion.way, layers.plain
        for choice in (kernels, fusion, layers):
            for line in choice.notes:
                say(line)
        rows = {"kernels": kernels.row, "fusion": fusion.row, "feature_pass": layers.row}
        return {kind: row for kind, row in rows.items() if row is not None}

    def step_of(self, learner: Learner) -> Callable[[Batch, int], dict[str, Any]]:
        """Return the function that takes a learner's steps as was chosen; `make` comes first."""
        captured = self._way.endswith(CAPTURED) and _has_graphs(learner.method)
        return CapturedStep(learner).step if captured else learner.step


def _has_graphs(method: Method) -> bool:
    """Whether its steps can be captured with these ranks."""
    return method.world.group is None or method.divisible

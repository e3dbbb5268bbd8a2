"""Settings that follow from the number of images."""

from __future__ import annotations

from dataclasses import replace

from pcl_fast.config import AUTO, Config

# Images per cluster: the paper's 25,000, 50,000 and 100,000 clusters of ImageNet's 1.28 million images.
_RATIOS = (51, 26, 13)


def automatic_ks(images: int) -> tuple[int, ...]:
    """Return the paper's numbers of clusters for so many images: at least 2, at most as many, all different."""
    return tuple(sorted({min(images, max(2, images // ratio)) for ratio in _RATIOS}))


def fit(config: Config, images: int) -> tuple[Config, list[str]]:
    """Replace cluster.ks "auto" by numbers, and bound what has to go with them.

    Returns:
        The recipe, and lines that say what was chosen; the same recipe and none where nothing is automatic.
    """
    if config.cluster.ks != AUTO:
        return config, []
    ks = automatic_ks(images)
    # More keys or prototypes than images are the same ones again.
    queue = min(config.model.queue_size, images)
    negatives = config.loss.num_negatives and min(config.loss.num_negatives, images)
    fitted = replace(
        config,
        cluster=replace(config.cluster, ks=ks),
        model=replace(config.model, queue_size=queue),
        loss=replace(config.loss, num_negatives=negatives),
    )
    chosen = (
        f"--cluster.ks {AUTO} for {images} images is {' '.join(map(str, ks))}, with --model.queue-size {queue} and "
        f"--loss.num-negatives {negatives}"
    )
    return fitted, [chosen]

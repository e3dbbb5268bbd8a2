"""How the detectors of the literature were trained."""

from __future__ import annotations

from dataclasses import replace

from pcl_fast.evaluation.detection.training import Recipe

# VOC with a frozen body (Table 6). Recalled, not found in a source.
VOC_FROZEN = Recipe(epochs=15, milestones=(12,), batch_size=8, lr=0.05, weight_decay=1e-4, warmup=500)
# VOC with a body that is trained too: MoCo's 24,000 steps on VOC07+12, with drops at 18,000 and 22,000, in epochs.
VOC_TUNED = Recipe(epochs=23, milestones=(17, 21), batch_size=16, lr=0.02, weight_decay=1e-4, warmup=500)
# COCO: torchvision's own.
COCO = Recipe(epochs=26, milestones=(16, 22), batch_size=16, lr=0.02, weight_decay=1e-4, warmup=1000)

# The shorter side in pixels, and the longer one at most: VOC's as in the first Faster R-CNN, COCO's as in torchvision.
VOC_SIZES, COCO_SIZES = (600, 1000), (800, 1333)


def adapted(
    recipe: Recipe,
    *,
    epochs: int | None = None,
    milestones: tuple[int, ...] | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup: int | None = None,
) -> Recipe:
    """Return a recipe with what is not None changed.

    With another number of epochs the milestones move along; with another batch the learning rate is scaled with it
    (Goyal et al. 2017), unless they are given themselves.
    """
    given = {"epochs": epochs, "batch_size": batch_size, "weight_decay": weight_decay, "warmup": warmup}
    found = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    moved = tuple(round(milestone * found.epochs / recipe.epochs) for milestone in recipe.milestones)
    scaled = recipe.lr * found.batch_size / recipe.batch_size
    return replace(found, milestones=moved if milestones is None else milestones, lr=scaled if lr is None else lr)

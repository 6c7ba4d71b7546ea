"""Recipes: which settings a name stands for, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Settings that are trained with unless an option says otherwise.

    Args:
        batch_size: images of a step over all devices; ``--scale-lr`` compares with it.
        lr: the highest learning rate.
        schedule: "step" divides the rate by 10 after each of ``milestones``; "cosine" lets it fall
            to 0 along half a cosine.
        milestones: fractions of all epochs, as numerator and denominator.
        warmup_epochs: the rate rises over them, linearly from a hundredth.
        ema: decay of the moving average of weights that is evaluated; 0 for none.
        mixup, cutmix: parameters of their Beta distributions; 0 for without.
        norm_decay: weight decay also on norms and biases.
    """

    n_epochs: int
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_decay: bool = True
    schedule: str = "step"
    milestones: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    drop_rate: float = 0.0
    ema: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: bool = False
    clip: float = 0.0


RECIPES = {
    # Section 4.2 of the DenseNet paper, arXiv:1608.06993.
    "cifar": Recipe(n_epochs=300),
    "svhn": Recipe(n_epochs=40, drop_rate=0.2),
    "imagenet": Recipe(n_epochs=90, batch_size=256, milestones=((1, 3), (2, 3))),
    # What has become usual since, without another optimizer.
    "modern": Recipe(
        n_epochs=300, batch_size=256, lr=0.2, norm_decay=False, schedule="cosine", warmup_epochs=5,
        label_smoothing=0.1, ema=0.999, mixup=0.2, cutmix=1.0, randaugment=True, clip=5.0,
    ),
    # Two minutes on two CPU cores are enough.
    "digits": Recipe(n_epochs=12, schedule="cosine", warmup_epochs=1),
}  # fmt: skip

DECAY = 0.1  # at each milestone
WARMUP_START = 0.01


def milestones(
    n_epochs: int, fractions: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))
) -> list[int]:
    """Epochs after which these fractions are done: at least 1, for a first epoch at full rate."""
    return [-(-n_epochs * numerator // denominator) for numerator, denominator in fractions]


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a step, as a fraction of the highest; a function of the step alone."""

    kind: str
    n_epochs: int
    steps_per_epoch: int
    warmup_epochs: int = 0
    fractions: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))

    def __call__(self, step: int) -> float:
        epoch = step / self.steps_per_epoch
        if epoch < self.warmup_epochs:
            return WARMUP_START + (1 - WARMUP_START) * epoch / self.warmup_epochs
        if self.kind == "step":
            done = step // self.steps_per_epoch
            passed = sum(
                milestone <= done for milestone in milestones(self.n_epochs, self.fractions)
            )
            return float(DECAY**passed)
        progress = (epoch - self.warmup_epochs) / max(1, self.n_epochs - self.warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

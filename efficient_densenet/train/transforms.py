"""Images as the network takes them, by torchvision.transforms.v2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .data import DATASETS, Kind

if TYPE_CHECKING:
    from .options import Options


def create_transforms(options: Options) -> tuple[Any, Any]:
    """Of an image to train with, and of one to evaluate; the same object where they are the same.

    Each takes an image of Pillow or ``uint8 [..., 1 or 3, H, W]``; the result is ``float32`` with
    three channels, normalised.
    """
    from torchvision.transforms import v2

    kind = DATASETS[options.dataset]
    is_folder = options.dataset == "imagefolder"
    size = options.image_size
    begin: list[Any] = [v2.ToImage(), v2.RGB()]
    end = [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(_three(kind.mean), _three(kind.deviation)),
    ]
    whole = [v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size)] if is_folder else []
    plain = v2.Compose([*begin, *whole, *end])
    random = _random_steps(options, kind, size, is_folder)
    return (v2.Compose([*begin, *random, *end]) if random else plain), plain


def _random_steps(options: Options, kind: Kind, size: int, is_folder: bool) -> list[Any]:
    from torchvision.transforms import v2

    steps: list[Any] = []
    if is_folder:
        steps.append(v2.RandomResizedCrop(size, antialias=True))
    elif kind.augments:
        steps.append(v2.RandomCrop(size, padding=4))
    if kind.augments:
        steps.append(v2.RandomHorizontalFlip())
    if options.randaugment:
        steps.append(v2.RandAugment())
    return steps


def create_mix(options: Options, num_classes: int) -> Any:
    """A function of the images and labels of a batch; None for neither mixup nor CutMix."""
    from torchvision.transforms import v2

    choices: list[Any] = []
    if options.mixup:
        choices.append(v2.MixUp(alpha=options.mixup, num_classes=num_classes))
    if options.cutmix:
        choices.append(v2.CutMix(alpha=options.cutmix, num_classes=num_classes))
    return v2.RandomChoice(choices) if choices else None


def _three(values: tuple[float, ...]) -> list[float]:
    return list(values) * (3 // len(values))

"""Losses and errors of a network on the images of all processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Loader
from .distributed import Process, reduce, synchronise

if TYPE_CHECKING:
    from .engine import Engine

TOP = 5


@dataclass(frozen=True)
class Evaluation:
    """Means over images: the loss, and errors in ``[0, 1]``.

    Args:
        confusion: of images of a class (row), how many were taken for a class (column).
    """

    images: int
    loss: float
    error: float
    top5_error: float
    confusion: Tensor


def count(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """The summed loss, the wrong answers and the images of a batch, ``float64 [3]``."""
    wrong = (logits.argmax(1) != labels).sum().double()
    images = torch.full_like(wrong, len(labels))
    return torch.stack([loss.detach().double() * images, wrong, images])


def not_in_top(logits: Tensor, labels: Tensor) -> Tensor:
    """How many images have their class not among the five largest logits."""
    top = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    return (top != labels[:, None]).all(1).sum().double()


@torch.no_grad()
def evaluate(
    engine: Engine,
    loader: Loader,
    num_classes: int,
    process: Process,
    before_batch: Callable[[], None],
) -> Evaluation:
    """Evaluate the network of process 0 on the images that the loaders of all processes have.

    Args:
        before_batch: is called equally often in all processes.
    """
    # No replica of DistributedDataParallel, which would wait for processes with one batch less.
    model = engine.evaluated
    synchronise(model)
    model.eval()
    device = process.device
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
    batches = torch.tensor(len(loader), device=device)
    most = int(reduce(batches, torch.distributed.ReduceOp.MAX))
    iterator = iter(loader)
    for _ in range(most):
        before_batch()
        batch = next(iterator, None)
        if batch is None:
            continue
        images, labels = engine.move(batch)
        with engine.autocast():
            logits = model(images)
        logits = logits.float()
        totals[:3] += count(logits, labels, F.cross_entropy(logits, labels))
        totals[3] += not_in_top(logits, labels)
        pairs = labels * num_classes + logits.argmax(1)
        confusion += torch.bincount(pairs, minlength=num_classes**2)
    sum_loss, wrong, seen, missed = reduce(totals).tolist()
    matrix = reduce(confusion).view(num_classes, num_classes).cpu()
    return Evaluation(int(seen), sum_loss / seen, wrong / seen, missed / seen, matrix)

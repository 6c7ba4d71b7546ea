"""One batch norm as the operators take it, and the update of running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _extension  # noqa: F401  registers the operators
from .subclasses import without_subclass


class BatchNorm(NamedTuple):
    """A batch norm over C channels; the meaning of each field is that of ``nn.BatchNorm2d``.

    Args:
        running_mean, running_var: ``[C]`` or None; updated in place where ``training``, required
            otherwise.
        weight, bias: ``[C]`` or None (1 and 0).
        training: normalise by the statistics of the batch instead of the running ones.
        momentum: weight of this batch in the running statistics; None for their cumulative average.
        eps: added to the variance, > 0.
        num_batches_tracked: int64 scalar or None; one is added per batch where ``training``.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None


def norm_without_subclasses(norm: BatchNorm) -> BatchNorm:
    """The same norm of plain tensors: see :func:`without_subclass`."""
    mean, var, weight, bias = map(without_subclass, norm[:4])
    count = without_subclass(norm.num_batches_tracked)
    return BatchNorm(mean, var, weight, bias, norm.training, norm.momentum, norm.eps, count)


class RunningUpdates:
    """The moves of running statistics that wait until everything else has succeeded.

    All of them are one launch. Their versions stay, as with torch's batch norm. That keeps them for
    its backward pass, which it would refuse where a norm runs once as a plain module and once here.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Any, ...]] = []

    def add(
        self,
        begins: Sequence[int],
        buffers: Sequence[Sequence[Tensor | None]],
        momenta: Sequence[float | None],
        mean: Tensor,
        var: Tensor,
        rows: int,
    ) -> None:
        """One batch, of norms that all train.

        Args:
            begins: each norm's first channel among those of mean and var.
            buffers: ``running_mean`` of all norms, ``running_var``, ``num_batches_tracked``.
            momenta: see :class:`BatchNorm`.
            mean, var: float64 statistics of the batch, of all channels; var is biased.
            rows: values per channel. An empty batch is counted and moves nothing else.
        """
        if any(buffer is not None for buffer in chain(*buffers)):
            self._batches.append((begins, *buffers, momenta, mean, var, rows))

    def add_norm(self, norm: BatchNorm, mean: Tensor, var: Tensor, rows: int) -> None:
        """One batch of one norm."""
        buffers = [norm.running_mean], [norm.running_var], [norm.num_batches_tracked]
        self.add([0], buffers, [norm.momentum], mean, var, rows)

    def move(self) -> None:
        """Once: nothing waits any more."""
        batches, self._batches = self._batches, []
        if not batches:
            return
        begins, *buffers, momenta, means, variances, rows = zip(*batches, strict=True)
        absent = means[0].new_empty(0)  # stands for a buffer that a norm does not have
        filled = [[absent if b is None else b for b in chain(*lists)] for lists in buffers]
        torch.ops.efficient_densenet.update_running_statistics(
            means, variances, rows,
            [i for i, norms in enumerate(begins) for _ in norms], [*chain(*begins)], *filled,
            [momentum or 0.0 for momentum in chain(*momenta)],
            [momentum is None for momentum in chain(*momenta)],
        )  # fmt: skip


def update_running_statistics(norm: BatchNorm, mean: Tensor, var: Tensor, rows: int) -> None:
    """Those of one norm that trains, at once: see :meth:`RunningUpdates.add`."""
    updates = RunningUpdates()
    updates.add_norm(norm, mean, var, rows)
    updates.move()


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the kernels take per-channel numbers, for features of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_parameter(per_channel: Tensor | None, features: Tensor) -> Tensor | None:
    """A per-channel tensor as the kernels take it; itself, where it is so already."""
    if per_channel is None:
        return None
    return per_channel.to(parameter_dtype(features.dtype)).contiguous()

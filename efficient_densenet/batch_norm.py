"""One batch norm as the operators take it, and the update of running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


def update_running_statistics(
    norms: Sequence[tuple[int, BatchNorm]], mean: Tensor, var: Tensor, rows: int
) -> None:
    """Moves the running statistics of several norms by one batch, in one launch.

    Their versions stay, as with torch's batch norm. That keeps them for its backward pass, which it
    would refuse where a norm runs once as a plain module and once here.

    Args:
        norms: each with its first channel among those of mean and var; frozen norms are skipped.
        mean, var: float64 statistics of the batch, of all channels; var is biased.
        rows: values per channel. An empty batch is counted and moves nothing else.
    """
    trained = [(begin, norm) for begin, norm in norms if norm.training]
    move_running_statistics(
        [begin for begin, _ in trained],
        [norm.running_mean for _, norm in trained],
        [norm.running_var for _, norm in trained],
        [norm.num_batches_tracked for _, norm in trained],
        [norm.momentum for _, norm in trained],
        mean,
        var,
        rows,
    )


def move_running_statistics(
    begins: Sequence[int],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
    batch_counts: Sequence[Tensor | None],
    momenta: Sequence[float | None],
    mean: Tensor,
    var: Tensor,
    rows: int,
) -> None:
    """:func:`update_running_statistics` of training norms, whose fields are lists."""
    if not running_means:
        return
    tracked = list(zip(running_means, running_vars, batch_counts, strict=True))
    used = [i for i, (m, v, n) in enumerate(tracked) if not (m is None and v is None and n is None)]
    if used:
        copies = _Copies()
        lists = [[copies.contiguous(tracked[i][field], mean) for i in used] for field in range(3)]
        torch.ops.efficient_densenet.update_running_statistics(
            mean, var, rows, [begins[i] for i in used], *lists,
            [momenta[i] or 0.0 for i in used], [momenta[i] is None for i in used],
        )  # fmt: skip
        copies.write_back()


class _Copies:
    """Buffers as the kernels take them, which is contiguous; the others by way of a copy."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def contiguous(self, buffer: Tensor | None, like: Tensor) -> Tensor:
        """An empty tensor stands for a buffer that the norm does not have."""
        if buffer is None:
            return like.new_empty(0)
        if buffer.is_contiguous():
            return buffer
        # One copy for a buffer that two norms share: it moves twice.
        return self._copies.setdefault(id(buffer), (buffer, buffer.contiguous()))[1]

    def write_back(self) -> None:
        for buffer, copy in self._copies.values():
            buffer.data.copy_(copy)


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the kernels take per-channel numbers, for features of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_parameter(per_channel: Tensor | None, features: Tensor) -> Tensor | None:
    """A per-channel tensor as the kernels take it; itself, where it is so already."""
    if per_channel is None:
        return None
    return per_channel.to(parameter_dtype(features.dtype)).contiguous()

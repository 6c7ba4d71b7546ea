"""One batch norm as the operators take it, and the update of running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _extension  # noqa: F401  registers the operators


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


class RunningStatistics:
    """The running statistics of several norms, which move by one batch in one launch.

    Their versions stay, as with torch's batch norm. That keeps them for its backward pass, which it
    would refuse where a norm runs once as a plain module and once here.

    Args:
        norms: training norms, each with its first channel among those of :meth:`update`.
    """

    def __init__(self, norms: Sequence[tuple[int, BatchNorm]]) -> None:
        self._begins: list[int] = []
        self._momenta: list[float] = []
        self._cumulative: list[bool] = []
        # Means, variances, counts; an empty tensor stands for none.
        self._tensors: tuple[list[Tensor], ...] = ([], [], [])
        for begin, norm in norms:
            tracked = norm.running_mean, norm.running_var, norm.num_batches_tracked
            present = [tensor for tensor in tracked if tensor is not None]
            if not present:
                continue
            self._begins.append(begin)
            self._momenta.append(0.0 if norm.momentum is None else norm.momentum)
            self._cumulative.append(norm.momentum is None)
            for tensors, tensor, dtype in zip(
                self._tensors, tracked, (None, None, torch.int64), strict=True
            ):
                tensors.append(present[0].new_empty(0, dtype=dtype) if tensor is None else tensor)
        self._all = [tensor for tensors in self._tensors for tensor in tensors]
        self._is_contiguous = all(tensor.is_contiguous() for tensor in self._all)

    def update_traced(self, mean: Tensor, var: Tensor, rows: int) -> None:
        """:meth:`update` as one node of a compiler's graph."""
        if self._begins:
            self._move(mean, var, rows, self._tensors)

    def _move(self, mean: Tensor, var: Tensor, rows: int, tensors: Sequence[list[Tensor]]) -> None:
        torch.ops.efficient_densenet.update_running_statistics(
            mean, var, rows, self._begins, *tensors, self._momenta, self._cumulative
        )

    def update(self, mean: Tensor, var: Tensor, rows: int) -> None:
        """Moves them by a batch.

        Args:
            mean, var: float64 statistics of the batch, of all channels; var is biased.
            rows: values per channel.
        """
        if not self._begins:
            return
        tensors: Sequence[list[Tensor]] = self._tensors
        if not self._is_contiguous:  # which the kernels want
            tensors = [[tensor.contiguous() for tensor in part] for part in tensors]
        self._move(mean, var, rows, tensors)
        if not self._is_contiguous:
            for tensor, used in zip(self._all, sum(tensors, []), strict=True):
                tensor.data.copy_(used)

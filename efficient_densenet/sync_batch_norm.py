"""Statistics of a batch that is spread over processes, as those of ``nn.SyncBatchNorm``.

Forward, one all-reduce of counts, means and sums of squares; backward, one of the two sums that the
gradient of each channel needs. Results are recomputed from what was saved, without communication.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .batch_norm import BatchNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ops = torch.ops.efficient_densenet


class Statistics(NamedTuple):
    """Of each channel: float64 mean and biased variance, and the number of values."""

    mean: Tensor
    var: Tensor
    rows: int


def group_to_synchronise(norm: BatchNorm, group: Any) -> ProcessGroup | None:
    """The group whose statistics the norm needs; None where those of this process are enough.

    Raises:
        TypeError: ``group`` is neither a process group nor None.
    """
    if group is None:
        return None
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group: expected a ProcessGroup or None, got {type(group).__name__}"
        )
    return group if norm.training and group.size() > 1 else None


def local_statistics(features: Sequence[Tensor], sizes: torch.Size) -> Statistics:
    """Of the batch of this process; 1 and 1 where it has no values.

    Args:
        sizes: of the concatenated features.
    """
    rows = sizes[0] * math.prod(sizes[2:])
    if rows > 0 and sizes[1] > 0:
        mean, var = _ops.concat_bn_stats(features)
        return Statistics(mean, var, rows)
    ones = torch.ones(sizes[1], dtype=torch.float64, device=features[0].device)
    return Statistics(ones, ones, rows)


def synchronise_statistics(local: Statistics, group: ProcessGroup) -> Statistics:
    """Of the batches of all processes.

    Raises:
        ValueError: on all processes, where there is one value per channel in all.
    """
    mean, var, rows = local
    # Each process fills a line of its own, so that their sum gathers the lines, on every backend.
    gathered = mean.new_zeros((group.size(), 2 * mean.numel() + 1))
    own = gathered[group.rank()]
    own[0] = rows
    if rows > 0:
        torch.cat([mean, var * rows], out=own[1:])
    torch.distributed.all_reduce(gathered, group=group)
    counts = gathered[:, :1]
    total = int(counts.sum())
    if total == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 on all processes"
        )
    if total == 0:
        return local
    # Chan, Golub, LeVeque (1983): sums of squares around each mean, moved to the joint mean.
    means, squares = gathered[:, 1:].chunk(2, 1)
    mean = (counts * means).sum(0) / total
    var = (squares + counts * (means - mean).square()).sum(0) / total
    return Statistics(mean, var, total)


def correct_gradients(
    statistics: Statistics,
    sums: tuple[Tensor, Tensor],
    weight: Tensor | None,
    eps: float,
    features: Sequence[Tensor],
    needed: Sequence[int],
    grad_features: Sequence[Tensor],
    group: ProcessGroup,
) -> None:
    """Makes gradients for constant statistics those for the statistics of the joint batch.

    Args:
        statistics: of the joint batch.
        sums: gradients of weight and bias, of this process. They stay as they are.
        grad_features: of ``features[i] for i in needed``; changed in place.
    """
    mean, var, rows = statistics
    joint = torch.stack(sums).double()
    torch.distributed.all_reduce(joint, group=group)
    if rows == 0:
        return
    inverse_std = (var + eps).rsqrt()
    scale = inverse_std if weight is None else inverse_std * weight
    # Per channel: grad_x = grad - (offset + (x - mean) * slope).
    slope = joint[0] * scale * inverse_std / rows
    offset = joint[1] * scale / rows
    begins = [0]
    for feature in features:
        begins.append(begins[-1] + feature.size(1))
    for i, grad in zip(needed, grad_features, strict=True):
        part, shape = slice(begins[i], begins[i + 1]), [-1, *[1] * (grad.dim() - 2)]
        rounded = mean[part].to(grad.dtype)
        # What rounding the mean takes away goes into the offset.
        rest = offset[part] - (mean[part] - rounded) * slope[part]
        centred = features[i] - rounded.view(shape)
        centred.mul_(slope[part].to(grad.dtype).view(shape)).add_(rest.to(grad.dtype).view(shape))
        grad.sub_(centred)

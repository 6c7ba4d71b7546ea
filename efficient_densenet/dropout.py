"""The dropout masks of a dense block, drawn as the plain modules would draw them.

Drawing is an operator of its own, so that a compiler which repeats or merges operators knows which
one is random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._extension import implement
from .layout import dense_strides, plain_formats

torch.library.define(
    "efficient_densenet::dropout_mask",
    "(Tensor x, Tensor[] conv1, Tensor[] conv2, ScalarType dtype, float drop_rate, "
    "bool drops_channels, Tensor? salt=None) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)


def dropout_mask(
    x: Tensor,
    conv1: Sequence[Tensor],
    conv2: Sequence[Tensor],
    dtype: torch.dtype,
    drop_rate: float,
    drops_channels: bool,
    salt: Tensor | None = None,
) -> Tensor:
    """Where dropout keeps the new features of each layer: bool ``[L, N, *spatial, k]``.

    Args:
        x: ``[N, C_0, *spatial]``, the block's input, in the memory format that it has.
        conv1, conv2: the weights of the layers, which decide the format of their results.
        dtype: that the block computes in.
        drop_rate: probability of dropout, in ``(0, 1)``.
        drops_channels: whole channels of an image, as ``nn.Dropout2d`` and ``nn.Dropout3d`` do.
        salt: a tensor made for this call, which is not read. Compilers before torch 2.14 merge
            calls with the same arguments, whatever the operator's tags say.
    """
    n, _, *spatial = x.shape
    growth = conv2[0].size(0)
    mask = x.new_empty((len(conv2), n, *spatial, growth), dtype=torch.bool)
    if drops_channels:
        drawn = _drawn_channels(x, growth, len(conv2), dtype, drop_rate)
    else:
        drawn = _drawn_features(x, list(zip(conv1, conv2, strict=True)), dtype, drop_rate)
    for layer, kept in zip(mask, drawn, strict=True):
        layer.copy_(kept.movedim(1, -1))
    return mask


def _fake(x: Tensor, conv1: Sequence[Tensor], conv2: Sequence[Tensor], *rest: object) -> Tensor:
    n, _, *spatial = x.shape
    return x.new_empty((len(conv2), n, *spatial, conv2[0].size(0)), dtype=torch.bool)


implement("dropout_mask", dropout_mask, _fake)


def _drawn_features(
    x: Tensor, convolutions: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype, drop_rate: float
) -> Iterator[Tensor]:
    """F.dropout draws in the order of memory, so the formats of the plain composition matter."""
    sizes = x.size(0), convolutions[0][1].size(0), *x.shape[2:]
    for channels_last in plain_formats(x, convolutions, dtype):
        ones = x.new_empty_strided(sizes, dense_strides(sizes, channels_last), dtype=dtype)
        yield F.dropout(ones.fill_(1), drop_rate)


def _drawn_channels(
    x: Tensor, growth: int, num_layers: int, dtype: torch.dtype, drop_rate: float
) -> Iterator[Tensor]:
    """One number per image and channel."""
    ones = x.new_ones((x.size(0), growth, *[1] * (x.dim() - 2)), dtype=dtype)
    for _ in range(num_layers):
        yield torch.feature_dropout(ones, drop_rate, True)

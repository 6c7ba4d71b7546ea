"""The description of a dense block: numbers and flags, without a tensor and without a module.

Modules are lowered to it (:mod:`efficient_densenet.lowering`), it may be kept between steps, and
:mod:`efficient_densenet.dense_block` runs it on the tensors that the modules hold at that moment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch

from .layout import dense_strides


class Pool:
    """What the last reader averages; the numbers are those of csrc/dense_block.

    They are plain integers, because compilers cannot make members of an enumeration.
    """

    NONE = 0
    WINDOWS = 1  # of 2, with stride 2, in every spatial dimension
    IMAGES = 2  # all pixels of an image


class BlockSpec:
    """A dense block of L layers, and its last reader where there is one. Nothing of it changes.

    Norms are numbered: norm1 of every layer, norm2 of every layer, the norm of the last reader.

    Args:
        dtype: of the features.
        conv1_shapes: ``(B, C_l)`` of each layer's first convolution.
        conv2_shape: ``(k, B, *kernel)``, of all layers.
        training: whether each norm uses the statistics of the batch.
        eps: of each norm.
        momentum: of each norm; None for the cumulative average.
        drop_rate: probability of dropout after each layer, in ``[0, 1)``.
        drops_channels: dropout zeroes whole channels of an image.
        keeps_bottlenecks: the B channels of each layer are kept for the backward pass.
        has_reader: the result is ``relu(batch_norm(features))``, averaged as ``pool`` says.
        pool: what the reader averages.
        projected_channels: the block's input is a 1x1 convolution of so many channels; 0 for none.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        conv1_shapes: Sequence[tuple[int, int]],
        conv2_shape: tuple[int, ...],
        training: Sequence[bool],
        eps: Sequence[float],
        momentum: Sequence[float | None],
        drop_rate: float = 0.0,
        drops_channels: bool = False,
        keeps_bottlenecks: bool = True,
        has_reader: bool = False,
        pool: int = Pool.NONE,
        projected_channels: int = 0,
    ) -> None:
        self.dtype = dtype
        self.num_layers = len(conv1_shapes)
        self.growth, self.bottleneck = conv2_shape[:2]
        self.kernel = tuple(conv2_shape[2:])
        self.in_channels = conv1_shapes[0][1]
        self.channels = self.in_channels + self.num_layers * self.growth
        self.training, self.eps, self.momentum = list(training), list(eps), list(momentum)
        self.drop_rate, self.drops_channels = drop_rate, drops_channels
        self.keeps_bottlenecks = keeps_bottlenecks
        self.has_reader, self.pool = has_reader, pool
        self.projected_channels = projected_channels
        read = [self.in_channels + layer * self.growth for layer in range(self.num_layers)]
        self.norm_channels = [*read, *[self.bottleneck] * self.num_layers]
        self.norm_channels += [self.channels] * has_reader
        self.frozen_norms = [i for i, trains in enumerate(training) if not trains]
        self.training_norms = [i for i, trains in enumerate(training) if trains]
        # Statistics of the batch: those of all features, then those of each layer's bottleneck.
        self.statistics_begins = [0] * self.num_layers
        self.statistics_begins += [
            self.channels + layer * self.bottleneck for layer in range(self.num_layers)
        ]
        self.statistics_begins += [0] * has_reader
        self.num_statistics = self.channels + self.num_layers * self.bottleneck
        # Of the weights' gradients as the backward pass writes them, all numbers in one list.
        conv1 = [[self.bottleneck, channels, *[1] * len(self.kernel)] for channels in read]
        self.conv1_sizes = list(chain(*conv1))
        self.conv1_strides = list(chain(*(dense_strides(sizes, False) for sizes in conv1)))

    def result_sizes(self, x_sizes: Sequence[int]) -> list[int]:
        """Of the block's result, from those of its input."""
        spatial = list(x_sizes[2:])
        if self.pool == Pool.IMAGES:
            spatial = [1] * len(spatial)
        elif self.pool == Pool.WINDOWS:
            spatial = [size // 2 for size in spatial]
        return [x_sizes[0], self.channels, *spatial]

    def kept_bytes(self, rows: int) -> tuple[int, int]:
        """Kept for the backward pass with so many pixels of all images: here, and by plain modules.

        The result counts in both. Plain modules keep what each norm and each convolution reads.
        """
        size, layers = self.dtype.itemsize, self.num_layers
        read = sum(self.norm_channels[: 2 * layers])
        bottlenecks = layers * self.bottleneck if self.keeps_bottlenecks else 0
        kept = rows * size * (self.channels + bottlenecks) + 2 * 8 * self.num_statistics
        return kept, rows * size * (2 * read + self.channels)


def count_rows(sizes: Sequence[int]) -> int:
    """Pixels of all images of ``[N, C, *spatial]``."""
    return sizes[0] * math.prod(sizes[2:])

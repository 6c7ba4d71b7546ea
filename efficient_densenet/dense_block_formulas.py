"""The formulas of a dense block: what its two doors have in common.

:func:`forward` and :func:`backward` allocate, pack and call the loops over layers of
csrc/dense_block. The doors (:mod:`efficient_densenet.dense_block` for eager mode,
:mod:`efficient_densenet.dense_block_operators` for compilers) bring the tensors and carry what is
saved from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _extension  # noqa: F401  registers the operators
from .batch_norm import BatchNorm
from .block_spec import BlockSpec, count_rows
from .layout import dense_strides, with_strides
from .out_of_memory import out_of_memory_as_torch_raises_it
from .precision import settings as precision_settings
from .subclasses import without_subclass

_ops = torch.ops.efficient_densenet


class DenseLayer(NamedTuple):
    """``conv2(relu(norm2(conv1(relu(norm1(x))))))``, from C to k channels.

    Args:
        norm1: over C channels.
        conv1: ``[B, C, 1, ...]``, one 1 per spatial dimension.
        norm2: over B channels.
        conv2: ``[k, B, *kernel]`` with odd sizes; stride 1, padded to keep the spatial sizes.
    """

    norm1: BatchNorm
    conv1: Tensor
    norm2: BatchNorm
    conv2: Tensor


class BlockTensors(NamedTuple):
    """What a block's norms and convolutions hold, read anew for every call.

    Lists of norms are in the order of :class:`BlockSpec`, those of convolutions in that of layers.
    """

    weights: list[Tensor | None]
    biases: list[Tensor | None]
    running_means: list[Tensor | None]
    running_vars: list[Tensor | None]
    batch_counts: list[Tensor | None]
    conv1: list[Tensor]
    conv2: list[Tensor]
    projection: Tensor | None = None

    def without_subclasses(self) -> BlockTensors:
        """The same memory as plain tensors."""
        lists: list[Any] = [list(map(without_subclass, tensors)) for tensors in self[:7]]
        weights, biases, means, variances, counts, conv1, conv2 = lists
        projection = without_subclass(self.projection)
        return BlockTensors(weights, biases, means, variances, counts, conv1, conv2, projection)

    def differentiable(self) -> list[Tensor | None]:
        """In the order in which gradients come back."""
        return [self.projection, *self.weights, *self.biases, *self.conv1, *self.conv2]


class Saved(NamedTuple):
    """What the backward pass needs besides inputs and result."""

    features: Tensor | None  # None: they are the result
    bottlenecks: Tensor | None  # [L, M, B]
    statistics: Tensor  # [2, C + L B], float64
    affine: Tensor | None  # weights and biases of all norms, [2, .], at least float32
    frozen: Tensor | None  # mean and var of the norms without batch statistics, [2, .], float64


def forward(
    spec: BlockSpec, tensors: BlockTensors, x: Tensor, mask: Tensor | None, keeps: bool
) -> tuple[Tensor, Saved]:
    features = _new_features(spec, x)
    result = features
    if spec.has_reader:
        result = _new_channels_last(spec.result_sizes(x.shape), features)
    # Nobody takes those that only frozen norms would read.
    new = x.new_zeros if spec.frozen_norms else x.new_empty
    statistics = new((2, spec.num_statistics), dtype=torch.float64)
    kept_features = features if spec.has_reader else None
    rows = count_rows(x.shape)
    if rows == 0:
        return result, Saved(kept_features, None, statistics, None, None)
    bottlenecks = None
    if keeps and spec.keeps_bottlenecks:
        bottlenecks = features.new_empty((spec.num_layers, rows, spec.bottleneck))
    affine, frozen = _pack_norms(spec, tensors, x)
    saved = Saved(kept_features, bottlenecks, statistics, affine, frozen)
    with out_of_memory_as_torch_raises_it(x.device):
        _ops.dense_block_layers(
            *_input(spec, x, tensors.projection), features, bottlenecks, statistics,
            _readable(tensors.conv1, spec.dtype), _readable(tensors.conv2, spec.dtype),
            affine, frozen, *_settings(spec, x, mask), not keeps,
            result if spec.has_reader else None,
        )  # fmt: skip
    return result, saved


class Gradients(NamedTuple):
    """Those of the packed operands."""

    x: Tensor | None
    projection: Tensor | None  # [C_0, P]
    affine: Tensor  # as it is saved
    conv1: Tensor | None  # [B, C_l] of all layers, one after the other; at least float32
    conv2: Tensor | None  # [layers that need it, k, B, *kernel], as parameters lie in memory


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    projection: bool
    norms: list[bool]  # weights, then biases
    conv1: list[bool]
    conv2: list[bool]


def backward(
    spec: BlockSpec,
    saved: Saved,
    x: Tensor | None,
    projection: Tensor | None,
    conv1: Sequence[Tensor],
    conv2: Sequence[Tensor],
    mask: Tensor | None,
    grad_result: Tensor,
    needs: Needs,
) -> Gradients:
    """Of what crossed autograd, only values, shapes and dtypes are relied on: hooks may have
    changed the memory format.
    """
    assert saved.features is not None and saved.affine is not None
    features = _in_channels_last(saved.features, spec.dtype)
    n, _, *spatial = features.shape
    wide = torch.promote_types(spec.dtype, torch.float32)
    # At least float32: docs/design.md, "The dense block".
    grad_features = _new_channels_last(features.shape, features, wide)
    if spec.has_reader:
        grad_result = _in_channels_last(grad_result, spec.dtype)
    grad_x = grad_projection = None
    if needs.x or needs.projection:
        grad_x = _new_channels_last((n, spec.in_channels, *spatial), features)
    affine = saved.affine.contiguous()
    grad_affine = torch.empty_like(affine)
    grad_conv1 = grad_conv2 = None
    if any(needs.conv1):  # at least float32: sums over chunks of rows, of 16-bit products
        grad_conv1 = features.new_empty(sum(weight.numel() for weight in conv1), dtype=wide)
    if any(needs.conv2):
        grad_conv2 = _new_conv2_gradients(spec, features, conv2, needs)
    with out_of_memory_as_torch_raises_it(features.device):
        _ops.dense_block_layers_backward(
            grad_result, features, _contiguous(saved.bottlenecks), saved.statistics.contiguous(),
            _readable(conv1, spec.dtype), _readable(conv2, spec.dtype), affine,
            _contiguous(saved.frozen),
            *_settings(spec, features, mask), spec.has_reader, grad_features, grad_x, grad_affine,
            grad_conv1, needs.conv1, grad_conv2, needs.conv2,
        )  # fmt: skip
    if projection is not None and x is not None and grad_x is not None:
        del grad_features  # the largest tensor of the backward pass
        grad_x, grad_projection = _backward_projection(spec, grad_x, x, projection, needs)
    return Gradients(grad_x, grad_projection, grad_affine, grad_conv1, grad_conv2)


def _backward_projection(
    spec: BlockSpec, grad: Tensor, x: Tensor, projection: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of what the projection read and of its weight, from that of its result."""
    x, weight = _input(spec, x, projection)
    grad_x = _new_channels_last(x.shape, grad) if needs.x else None
    grad_weight = None
    if needs.projection:
        grad_weight = grad.new_empty((spec.in_channels, spec.projected_channels))
    _, products_match = precision_settings(x.device, spec.dtype)
    with out_of_memory_as_torch_raises_it(x.device):
        _ops.projection_backward(grad, x, weight, products_match, grad_x, grad_weight)
    return grad_x, grad_weight


def _input(spec: BlockSpec, x: Tensor, projection: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and the weight of its convolution, as csrc/dense_block reads them."""
    if projection is None:
        return x, None
    return _in_channels_last(x, spec.dtype), projection.to(spec.dtype).contiguous()


def _settings(spec: BlockSpec, x: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    """What both operators of csrc/dense_block take alike, in their order."""
    scale = 1 / (1 - spec.drop_rate)
    precision = precision_settings(x.device, spec.dtype)
    return (spec.frozen_norms, spec.eps, _contiguous(mask), scale, spec.pool, *precision)


# ------------------------------------------------------------------------------------------------
# Packing


def _pack_norms(spec: BlockSpec, tensors: BlockTensors, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``affine`` and ``frozen`` of csrc/dense_block."""
    wide = torch.promote_types(spec.dtype, torch.float32)
    affine = [
        x.new_full((channels,), default, dtype=wide) if tensor is None else tensor
        for parameters, default in ((tensors.weights, 1), (tensors.biases, 0))
        for tensor, channels in zip(parameters, spec.norm_channels, strict=True)
    ]
    frozen = None
    if spec.frozen_norms:
        running = [
            statistics[i]
            for statistics in (tensors.running_means, tensors.running_vars)
            for i in spec.frozen_norms
        ]
        frozen = torch.cat([t for t in running if t is not None]).to(torch.float64).view(2, -1)
    return torch.cat(affine).to(wide).view(2, -1), frozen


def _readable(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Weights as csrc/dense_block reads them: all of this dtype, or all of float32."""
    dtypes = {weight.dtype for weight in weights}
    if dtypes <= {dtype} or dtypes <= {torch.float32}:
        return list(weights)
    return [weight.to(dtype) for weight in weights]


class ParameterLayout(NamedTuple):
    """Dtypes and strides that the gradients of the parameters have."""

    norm_dtype: torch.dtype | None
    conv1_dtype: torch.dtype
    conv1_strides: list[tuple[int, ...]]
    conv2_dtype: torch.dtype
    conv2_strides: list[tuple[int, ...]]


def parameter_layout(tensors: BlockTensors) -> ParameterLayout:
    norms = (p.dtype for p in chain(tensors.weights, tensors.biases) if p is not None)
    return ParameterLayout(
        next(norms, None),
        *(tensors.conv1[0].dtype, list(map(Tensor.stride, tensors.conv1))),
        *(tensors.conv2[0].dtype, list(map(Tensor.stride, tensors.conv2))),
    )


def _unpack(
    spec: BlockSpec, layout: ParameterLayout, gradients: Gradients, needs: Needs
) -> list[Tensor | None]:
    """The gradients of ``tensors.differentiable()`` but the first."""
    affine = gradients.affine.to(layout.norm_dtype or gradients.affine.dtype)
    norms = torch.split_with_sizes(affine.view(-1), 2 * spec.norm_channels)
    unpacked = _asked(norms, needs.norms)
    dims = 2 + len(spec.kernel)
    if gradients.conv1 is None:
        unpacked += [None] * spec.num_layers
    else:
        strides = list(chain(*layout.conv1_strides))
        packed = gradients.conv1.to(layout.conv1_dtype)
        cut = _ops.cut_gradients(packed, 0, dims, spec.conv1_sizes, spec.conv1_strides, strides)
        unpacked += _asked(cut, needs.conv1)
    if gradients.conv2 is None:
        return unpacked + [None] * spec.num_layers
    present = list(compress(layout.conv2_strides, needs.conv2))
    packed = gradients.conv2.to(layout.conv2_dtype)
    sizes, old, new = packed.shape[1:], packed.stride()[1:], chain(*present)
    numbers = list(sizes) * len(present), list(old) * len(present), list(new)
    parts = iter(_ops.cut_gradients(packed, 0, dims, *numbers))
    return unpacked + [next(parts) if needed else None for needed in needs.conv2]


def _asked(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [g if needed else None for g, needed in zip(gradients, needs, strict=True)]


def input_gradients(
    spec: BlockSpec,
    layout: ParameterLayout,
    gradients: Gradients,
    needs: Needs,
    x_dtype: torch.dtype,
    projection: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of x and of ``tensors.differentiable()``."""
    grad_x = None if gradients.x is None else gradients.x.to(x_dtype)
    grad_projection = gradients.projection
    if grad_projection is not None and projection is not None:
        grad_projection = grad_projection.to(projection.dtype).view(projection.shape)
        grad_projection = with_strides(grad_projection, projection.stride())
    return [grad_x, grad_projection, *_unpack(spec, layout, gradients, needs)]


def _new_conv2_gradients(
    spec: BlockSpec, like: Tensor, conv2: Sequence[Tensor], needs: Needs
) -> Tensor:
    """Of the layers that need one, as their weights lie in memory."""
    sizes = spec.growth, spec.bottleneck, *spec.kernel
    strides = dense_strides(sizes, channels_last=conv2[0].stride(1) == 1)
    is_float = all(weight.dtype == torch.float32 for weight in conv2)
    return like.new_empty_strided(
        (sum(needs.conv2), *sizes), (math.prod(sizes), *strides),
        dtype=torch.float32 if is_float else spec.dtype,
    )  # fmt: skip


def zero_gradients(
    spec: BlockSpec, x_shape: torch.Size, like: Tensor, conv2: Sequence[Tensor], needs: Needs
) -> Gradients:
    """The gradients of an empty batch."""
    wide = torch.promote_types(spec.dtype, torch.float32)
    conv1_count = spec.bottleneck * sum(spec.norm_channels[: spec.num_layers])
    return Gradients(
        like.new_zeros(x_shape) if needs.x else None,
        like.new_zeros(spec.in_channels, spec.projected_channels) if needs.projection else None,
        like.new_zeros(2, sum(spec.norm_channels), dtype=wide),
        like.new_zeros(conv1_count, dtype=wide),
        _new_conv2_gradients(spec, like, conv2, needs).zero_(),
    )


# ------------------------------------------------------------------------------------------------
# Memory


def _new_channels_last(
    sizes: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    strides = dense_strides(sizes, channels_last=True)
    return like.new_empty_strided(tuple(sizes), strides, dtype=dtype)


def _in_channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with its channels next to each other and its pixels one row after the other."""
    pixels, row = [*range(2, x.dim())], x.size(1)
    if x.dtype == dtype and (x.size(1) == 1 or x.stride(1) == 1):
        fits, step = True, None
        for d in [*reversed(pixels), 0]:
            if x.size(d) == 1:
                continue
            step = x.stride(d) if step is None else step
            fits = fits and x.stride(d) == step and step >= row
            step *= x.size(d)
        if fits:
            return x
    return torch.empty_strided(
        x.shape, dense_strides(x.shape, channels_last=True), dtype=dtype, device=x.device
    ).copy_(x)


def _new_features(spec: BlockSpec, x: Tensor) -> Tensor:
    """The block's buffer; its rows are padded where nobody sees it, for wide accesses."""
    padded = [x.size(0), spec.channels, *x.shape[2:]]
    if spec.has_reader:
        padded[1] = -(-spec.channels // 8) * 8
    strides = dense_strides(padded, channels_last=True)
    sizes = x.size(0), spec.channels, *x.shape[2:]
    return x.new_empty_strided(sizes, strides, dtype=spec.dtype)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()

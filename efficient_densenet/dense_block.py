"""A whole dense block as one operator: linear memory, and a loop over layers in C++.

Every layer appends its new features to one buffer, which is the block's output, so nothing is ever
concatenated. The statistics of a channel are taken once, and gradients are added up in place in one
buffer of the same shape. What a layer normalises is scratch, recomputed in the backward pass
(arXiv:1707.06990; docs/design.md, "The dense block").

The operators ``torch.ops.efficient_densenet.dense_block*`` (csrc/dense_block.cpp) do the work; this
module adds autograd, autocast and the packing of weights.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from . import _extension  # noqa: F401  registers the operators
from ._arguments import check_block_arguments, check_more_than_one_value
from ._once import check_transforms, differentiable_once
from ._out_of_memory import out_of_memory_as_torch_raises_it
from .batch_norm import BatchNorm, RunningStatistics
from .bn_relu_conv1x1 import kernel_path, settings
from .layout import dense_strides, is_channels_last, plain_formats

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


def dense_block(
    x: Tensor,
    layers: Sequence[DenseLayer],
    drop_rate: float = 0.0,
    recompute: str = "bottleneck",
) -> Tensor:
    """A dense block: every layer reads all features so far and appends k new ones.

    Equals, in values, gradients and running statistics::

        for layer in layers:
            y = F.conv2d(F.relu(batch_norm(x, layer.norm1)), layer.conv1)
            y = F.conv2d(F.relu(batch_norm(y, layer.norm2)), layer.conv2, padding=1)
            x = torch.cat([x, F.dropout(y, drop_rate)], 1)

    The result is channels-last and **is itself kept for the backward pass**: writing to it in place
    raises autograd's error there. Running statistics are updated once per call, after everything
    else has succeeded. Once differentiable.

    Args:
        x: ``[N, C_0, *spatial]`` with 1 to 3 spatial dimensions, any strides; float64, float32,
            float16 or bfloat16; CPU or CUDA.
        layers: at least one; all with the same B and k, ``layers[l]`` reading ``C_0 + l k``
            channels. Convolutions have the dtype of x (under autocast they are cast to its dtype
            with x), norms too, or float32 where that is a 16-bit type.
        drop_rate: probability of dropout after each layer, in ``[0, 1)``; masks are those of
            ``F.dropout`` for the same seed.
        recompute: what is kept for the backward pass besides the features. ``"bottleneck"``: the
            B channels of each layer's bottleneck, so that only normalisations are recomputed.
            ``"features"``: nothing, for about a fifth of the memory at B = 4 k; the 1x1
            convolutions are then recomputed too.

    Returns:
        ``[N, C_0 + L k, *spatial]``, of the dtype of x.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing was changed.
        torch.OutOfMemoryError: running statistics are as before.
    """
    result: Tensor = Plan(x, layers, drop_rate, recompute).run(x)
    return result


def statistics_begins(layers: Sequence[DenseLayer]) -> list[int]:
    """Where the statistics of each norm begin: norm1 reads those of the features, norm2 of z."""
    growth, bottleneck = layers[0].conv2.shape[:2]
    channels = layers[-1].conv1.size(1) + growth
    return [0] * len(layers) + [channels + i * bottleneck for i in range(len(layers))]


class Pool(enum.IntEnum):
    """What the last reader averages; numbered as in csrc/dense_block.cpp."""

    NONE = 0
    WINDOWS = 1  # of 2, with stride 2, in every spatial dimension
    IMAGES = 2  # all pixels of an image

    def sizes(self, spatial: Sequence[int]) -> list[int]:
        """Spatial sizes of the result."""
        if self == Pool.IMAGES:
            return [1] * len(spatial)
        return [size // 2 if self == Pool.WINDOWS else size for size in spatial]


class Plan:
    """A dense block, and its last reader where one is given, ready to run on inputs like ``x``.

    Arguments are those of :func:`dense_block`, checked here once, and:

    Args:
        reader: the result is ``relu(batch_norm(features, reader))``, and the features are kept
            inside. The reader shares the statistics and the gradient buffer of the block. The
            result is channels-last.
        pool: average the result.
        drops_channels: dropout zeroes whole channels of an image, with the masks of
            ``nn.Dropout2d`` and ``nn.Dropout3d`` for the same seed.
        entry: weight ``[C_0, P, 1, ...]`` of a 1x1 convolution without a bias. The block's input is
            then what it makes of ``x``, ``[N, P, *spatial]``, and is written nowhere but to the
            features. Not with dropout.
    """

    def __init__(
        self,
        x: Tensor,
        layers: Sequence[DenseLayer],
        drop_rate: float = 0.0,
        recompute: str = "bottleneck",
        reader: BatchNorm | None = None,
        pool: Pool = Pool.NONE,
        drops_channels: bool = False,
        entry: Tensor | None = None,
    ) -> None:
        self.dtype = check_block_arguments(x, layers, drop_rate, recompute, reader, entry)
        self.layers = tuple(layers)
        self.drop_rate = float(drop_rate)
        self.drops_channels = drops_channels
        self.keeps_bottlenecks = recompute == "bottleneck"
        self.reads = reader is not None
        self.pool = pool
        self.entry = entry
        # In the order of csrc/dense_block.cpp.
        self.norms = [*(la.norm1 for la in layers), *(la.norm2 for la in layers)]
        self.norms += [] if reader is None else [reader]
        self.growth, self.bottleneck = layers[0].conv2.shape[:2]
        in_channels = [layer.conv1.size(1) for layer in layers]
        self.in_channels, self.channels = in_channels[0], in_channels[-1] + self.growth
        self.norm_channels = [*in_channels, *[self.bottleneck] * len(layers)]
        self.norm_channels += [self.channels] * self.reads
        self.frozen_norms = [i for i, norm in enumerate(self.norms) if not norm.training]
        self.trains_norms = len(self.frozen_norms) < len(self.norms)
        self.eps = [float(norm.eps) for norm in self.norms]
        self.weights = [norm.weight for norm in self.norms]
        self.biases = [norm.bias for norm in self.norms]
        self.conv1 = [layer.conv1 for layer in layers]
        self.conv2 = [layer.conv2 for layer in layers]
        # Everything but x and entry that a gradient can be wanted for.
        self.parameters = [*self.weights, *self.biases, *self.conv1, *self.conv2]
        begins = [*statistics_begins(layers), *[0] * self.reads]
        self.running_statistics = RunningStatistics(
            [(begin, n) for begin, n in zip(begins, self.norms, strict=True) if n.training]
        )

    @torch.compiler.disable  # memory shared between layers is not for a compiler to trace
    def run(self, x: Tensor) -> Tensor:
        if self.trains_norms:
            check_more_than_one_value(x, self.in_channels)
        inputs = (x, self.entry, *self.parameters)
        keeps = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in inputs
        )
        check_transforms("dense_block", *inputs)
        if keeps:
            result: Tensor = _DenseBlock.apply(self, *inputs)
        else:
            with torch.no_grad():
                result = _forward(self, x, keeps=False).result
        if self.entry is not None:
            return result
        # As torch.cat of a float32 input and 16-bit features under autocast.
        return result.to(torch.promote_types(x.dtype, self.dtype))

    def kernel_path(self, x: Tensor) -> str:
        """See :meth:`efficient_densenet.DenseBlock.kernel_path`."""
        sizes = x.size(0), self.channels, *x.shape[2:]
        name, why_not_conv1, why_not_conv2 = kernel_path(
            x.device, self.dtype, sizes, self.growth, self.bottleneck, self.conv2[0].shape[2:],
            self.drop_rate > 0,
        )  # fmt: skip
        if why_not_conv1:
            return f"{name}: {why_not_conv1}"
        return f"{name} but for conv2: {why_not_conv2}" if why_not_conv2 else name

    def kept_bytes(self, rows: int) -> tuple[int, int]:
        """Kept for the backward pass with so many pixels of all images: here, and by plain modules.

        The result counts in both. Plain modules keep what each norm and each convolution reads.
        """
        layers, size = len(self.layers), self.dtype.itemsize
        read = sum(self.norm_channels[:layers]) + layers * self.bottleneck
        bottlenecks = layers * self.bottleneck if self.keeps_bottlenecks else 0
        statistics = 2 * 8 * (self.channels + layers * self.bottleneck)
        kept = rows * size * (self.channels + bottlenecks) + statistics
        return kept, rows * size * (2 * read + self.channels)

    def count_batch(self) -> None:
        """What an empty batch changes."""
        for norm in self.norms:
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)


class _Kept(NamedTuple):
    """What the backward pass needs besides the convolutions' weights."""

    features: Tensor
    bottlenecks: Tensor | None
    statistics: Tensor
    affine: Tensor
    frozen: Tensor | None
    dropout_mask: Tensor | None


class _Forward(NamedTuple):
    result: Tensor
    kept: _Kept | None
    convolved: Tensor | None  # what the entry read


def _forward(plan: Plan, x: Tensor, keeps: bool) -> _Forward:
    sizes = x.size(0), plan.channels, *x.shape[2:]
    features = _new_features(plan, sizes, x)
    result = features
    if plan.reads:
        result = _new_channels_last((*sizes[:2], *plan.pool.sizes(sizes[2:])), features)
    convolved, projection = (x, None) if plan.entry is None else _project(plan, x)
    rows = x.numel() // x.size(1)
    if rows == 0:
        plan.count_batch()
        return _Forward(result, None, convolved)
    layers = len(plan.layers)
    # Nobody takes those that only frozen norms would read.
    new = x.new_zeros if plan.frozen_norms else x.new_empty
    statistics = new((2, plan.channels + layers * plan.bottleneck), dtype=torch.float64)
    bottlenecks = None
    if keeps and plan.keeps_bottlenecks:
        bottlenecks = features.new_empty((layers, rows, plan.bottleneck))
    mask = _dropout_mask(plan, x) if plan.drop_rate > 0 else None
    kept = _Kept(features, bottlenecks, statistics, *_pack_norms(plan, x), mask)
    with out_of_memory_as_torch_raises_it(x.device):
        _ops.dense_block_layers(
            convolved, projection, features, bottlenecks, statistics,
            _pack_conv1(plan.conv1, plan.dtype), _pack_conv2(plan.conv2, plan.dtype),
            *_settings(plan, kept), not keeps, result if plan.reads else None,
        )  # fmt: skip
    # Last, so that an error leaves them as they were.
    plan.running_statistics.update(statistics[0], statistics[1], rows)
    return _Forward(result, kept, None if plan.entry is None else convolved)


def _project(plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
    assert plan.entry is not None
    weight = plan.entry.to(plan.dtype).contiguous()
    return _in_channels_last(x, plan.dtype), weight


def _settings(plan: Plan, kept: _Kept) -> tuple[Any, ...]:
    """What both operators take alike, in their order."""
    return (
        kept.affine, kept.frozen, plan.frozen_norms, plan.eps, kept.dropout_mask,
        1 / (1 - plan.drop_rate), plan.pool, *settings(kept.features.device, plan.dtype),
    )  # fmt: skip


class _DenseBlock(torch.autograd.Function):
    """Saves the features, per-channel numbers and, if asked to, bottlenecks; and the weights."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, x: Tensor, entry: Tensor | None, *parameters: Tensor | None
    ) -> Tensor:
        result, kept, convolved = _forward(plan, x, keeps=True)
        ctx.plan = plan
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        if kept is not None:
            entered = (convolved, entry) if any(ctx.needs_input_grad[1:3]) else (None, None)
            ctx.save_for_backward(*entered, *kept, *plan.conv1, *plan.conv2)
        return result

    @staticmethod
    @differentiable_once("dense_block")
    def backward(ctx: Any, grad_result: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_result is None:
            return (None,) * len(ctx.needs_input_grad)
        plan, needed, saved = ctx.plan, ctx.needs_input_grad[1:], ctx.saved_tensors
        if not saved:  # an empty batch
            x = grad_result.new_zeros(ctx.x_shape, dtype=ctx.x_dtype)
            parameters = (plan.entry, *plan.parameters)
            zeros = [x, *(None if p is None else torch.zeros_like(p) for p in parameters)]
            return None, *(g if needs else None for g, needs in zip(zeros, needed, strict=True))
        (convolved, entry, *saved), (needs_x, needs_entry, *needs) = saved, needed
        kind = grad_result.device.type
        # The forward pass has done its casts.
        autocast = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            grad_x, grad_entry, *gradients = _backward(
                plan, saved, grad_result, [needs_x, *needs], convolved,
                entry if needs_x or needs_entry else None, needs_entry
            )  # fmt: skip
            grad_entry = None if grad_entry is None else grad_entry.to(entry.dtype)
        return None, None if grad_x is None else grad_x.to(ctx.x_dtype), grad_entry, *gradients


def _backward(
    plan: Plan,
    saved: Sequence[Any],
    grad_result: Tensor,
    needed: Sequence[bool],
    convolved: Tensor | None = None,
    entry: Tensor | None = None,
    needs_entry: bool = False,
) -> list[Tensor | None]:
    """Gradients of the block's input and of the plan's parameters."""
    layers = len(plan.layers)
    kept = _Kept(*saved[: -2 * layers])
    # Packed again, so that only one block's copies exist at a time.
    conv1 = _pack_conv1(saved[-2 * layers : -layers], plan.dtype)
    conv2 = _pack_conv2(saved[-layers:], plan.dtype)
    needs_conv1, needs_conv2 = list(needed[-2 * layers : -layers]), list(needed[-layers:])
    features = kept.features
    # At least float32: docs/design.md, "The dense block".
    wide = torch.promote_types(features.dtype, torch.float32)
    grad_features = _new_channels_last(features.shape, features, wide)
    if plan.reads:
        grad_result = _in_channels_last(grad_result, features.dtype)
    projection = None if entry is None else entry.to(plan.dtype).contiguous()
    grad_x = grad_entry = None
    if needed[0]:
        channels = plan.in_channels if projection is None else projection.size(1)
        grad_x = _new_channels_last((features.size(0), channels, *features.shape[2:]), features)
    if needs_entry and projection is not None:
        grad_entry = torch.empty_like(projection)
    grad_affine = torch.empty_like(kept.affine)
    # Of 16-bit products, sums over chunks of rows.
    grad_conv1 = torch.empty_like(conv1, dtype=wide) if any(needs_conv1) else None
    wanted = sum(needs_conv2)
    grad_conv2 = torch.empty_like(conv2[:wanted]) if wanted else None
    with out_of_memory_as_torch_raises_it(features.device):
        _ops.dense_block_layers_backward(
            grad_result, features if convolved is None else convolved, projection, features,
            kept.bottlenecks, kept.statistics, conv1, conv2, *_settings(plan, kept), plan.reads,
            grad_features, grad_x, grad_entry, grad_affine, grad_conv1, needs_conv1, grad_conv2,
            needs_conv2,
        )  # fmt: skip
    gradients = _unpack_gradients(plan, grad_affine, grad_conv1, grad_conv2, needs_conv2)
    gradients.insert(0, grad_x)
    found = [g if needs else None for g, needs in zip(gradients, needed, strict=True)]
    return [found[0], grad_entry, *found[1:]]


# ------------------------------------------------------------------------------------------------
# Packing


def _pack_norms(plan: Plan, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``affine`` and ``frozen`` of csrc/dense_block.cpp."""
    wide = torch.promote_types(plan.dtype, torch.float32)
    affine = [
        x.new_full((channels,), default, dtype=wide) if tensor is None else tensor
        for tensors, default in ((plan.weights, 1), (plan.biases, 0))
        for tensor, channels in zip(tensors, plan.norm_channels, strict=True)
    ]
    frozen = None
    if plan.frozen_norms:
        used = [plan.norms[i] for i in plan.frozen_norms]
        running = [*(norm.running_mean for norm in used), *(norm.running_var for norm in used)]
        frozen = torch.cat([t for t in running if t is not None]).to(torch.float64).view(2, -1)
    return torch.cat(affine).to(wide).view(2, -1), frozen


def _pack_conv1(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The ``[B, C_l]`` one after the other."""
    flat: Tensor = _flatten_dense_tensors(weights)  # type: ignore[no-untyped-call]
    return flat.to(dtype)


def _pack_conv2(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``[L, k, *kernel, B]``, contiguous."""
    inner = torch.cat(list(weights)).to(dtype).movedim(1, -1).contiguous()
    return inner.view(len(weights), -1, *inner.shape[1:])


def _unpack_gradients(
    plan: Plan,
    grad_affine: Tensor,
    grad_conv1: Tensor | None,
    grad_conv2: Tensor | None,
    needs_conv2: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the parameters, each with the dtype and memory format of its own."""
    dtype = next((p.dtype for p in (*plan.weights, *plan.biases) if p is not None), None)
    rows = grad_affine if dtype is None else grad_affine.to(dtype)
    gradients: list[Tensor | None] = []
    for row in rows.unbind(0):
        gradients += torch.split(row, plan.norm_channels)
    if grad_conv1 is None:
        gradients += [None] * len(plan.conv1)
    else:
        flat = grad_conv1.to(plan.conv1[0].dtype)
        gradients += _unflatten_dense_tensors(flat, plan.conv1)  # type: ignore[no-untyped-call]
    if grad_conv2 is None:
        gradients += [None] * len(plan.conv2)
    else:
        images = grad_conv2.to(plan.conv2[0].dtype).movedim(-1, 2)  # channels-last, each
        images = images if is_channels_last(plan.conv2[0]) else images.contiguous()
        layers = iter(images.unbind(0))
        gradients += [next(layers) if needs else None for needs in needs_conv2]
    return [
        g if g is None or p is None or g.dtype == p.dtype else g.to(p.dtype)
        for g, p in zip(gradients, plan.parameters, strict=True)
    ]


# ------------------------------------------------------------------------------------------------
# Memory


def _new_channels_last(
    sizes: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    strides = dense_strides(sizes, channels_last=True)
    return like.new_empty_strided(tuple(sizes), strides, dtype=dtype)


def _in_channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    strides = dense_strides(x.shape, channels_last=True)
    fits = all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True))
    if x.dtype == dtype and fits:
        return x
    return torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device).copy_(x)


def _new_features(plan: Plan, sizes: Sequence[int], x: Tensor) -> Tensor:
    """The block's buffer; its rows are padded where nobody sees it, for wide accesses."""
    padded = [*sizes]
    if plan.reads:
        padded[1] = -(-plan.channels // 8) * 8
    strides = dense_strides(padded, channels_last=True)
    return x.new_empty_strided(tuple(sizes), strides, dtype=plan.dtype)


def _dropout_mask(plan: Plan, x: Tensor) -> Tensor:
    """``[L, N, *spatial, k]``: where dropout keeps the new features of each layer."""
    n, _, *spatial = x.shape
    mask = x.new_empty((len(plan.layers), n, *spatial, plan.growth), dtype=torch.bool)
    draw = _drawn_channels if plan.drops_channels else _drawn_features
    for layer, kept in zip(mask, draw(plan, x), strict=True):
        layer.copy_(kept.movedim(1, -1))
    return mask


def _drawn_features(plan: Plan, x: Tensor) -> Iterator[Tensor]:
    """F.dropout draws in the order of memory, so the formats of the plain composition matter."""
    sizes = x.size(0), plan.growth, *x.shape[2:]
    convolutions = [(layer.conv1, layer.conv2) for layer in plan.layers]
    for channels_last in plain_formats(x, convolutions, plan.dtype):
        ones = x.new_empty_strided(sizes, dense_strides(sizes, channels_last), dtype=plan.dtype)
        yield F.dropout(ones.fill_(1), plan.drop_rate)


def _drawn_channels(plan: Plan, x: Tensor) -> Iterator[Tensor]:
    """What nn.Dropout2d and nn.Dropout3d draw: one number per image and channel."""
    ones = x.new_ones((x.size(0), plan.growth, *[1] * (x.dim() - 2)), dtype=plan.dtype)
    for _ in plan.layers:
        yield torch.feature_dropout(ones, plan.drop_rate, True)

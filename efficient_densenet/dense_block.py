"""A whole dense block as one operator: linear memory, and a loop over layers in C++.

Every layer appends its new features to one buffer, which is the block's output, so nothing is ever
concatenated. The statistics of a channel are taken once, and gradients are added up in place in one
buffer of the same shape. What a layer normalises is scratch, recomputed in the backward pass
(arXiv:1707.06990; docs/design.md, "The dense block").

:func:`_forward` and :func:`_backward` are the only formulas. Two doors lead to them: an autograd
function for eager mode, and the operators ``torch.ops.efficient_densenet.dense_block`` and
``dense_block_backward`` for whoever traces. Both run the loops of csrc/dense_block.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import _extension  # noqa: F401  registers the operators
from .arguments import check_block_arguments, check_more_than_one_value
from .batch_norm import BatchNorm
from .block_spec import BlockSpec, Pool, count_rows
from .differentiation import (
    check_transforms,
    refuse_second_derivatives,
    second_derivative_error,
)
from .dropout import dropout_mask
from .layout import dense_strides, with_strides
from .out_of_memory import out_of_memory_as_torch_raises_it
from .precision import settings as precision_settings

_ops = torch.ops.efficient_densenet
_RECOMPUTE_KEEPS_BOTTLENECKS = {"bottleneck": True, "features": False}


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

    def differentiable(self) -> list[Tensor | None]:
        """In the order in which gradients come back."""
        return [self.projection, *self.weights, *self.biases, *self.conv1, *self.conv2]


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
    raises an error there. Running statistics are updated once per call, after everything
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
    if has_torch_function_unary(x):  # type: ignore[no-untyped-call]
        result: Tensor = handle_torch_function(
            dense_block, (x,), x, layers, drop_rate, recompute
        )
        return result
    return run(*describe(x, layers, drop_rate, recompute), x)


def describe(
    x: Tensor,
    layers: Sequence[DenseLayer],
    drop_rate: float = 0.0,
    recompute: str = "bottleneck",
    reader: BatchNorm | None = None,
    pool: int = Pool.NONE,
    drops_channels: bool = False,
    projection: Tensor | None = None,
) -> tuple[BlockSpec, BlockTensors]:
    """A block and its tensors, for :func:`run`. Arguments are checked as in :func:`dense_block`.

    Args:
        reader: the result is ``relu(batch_norm(features, reader))``, and the features are kept
            inside. The reader shares the statistics and the gradient buffer of the block. The
            result is channels-last.
        pool: average the reader's result.
        drops_channels: dropout zeroes whole channels of an image, with the masks of
            ``nn.Dropout2d`` and ``nn.Dropout3d`` for the same seed.
        projection: weight ``[C_0, P, 1, ...]`` of a 1x1 convolution without a bias. The block's
            input is then what it makes of ``x``, ``[N, P, *spatial]``, and is written nowhere but
            to the features. Not with dropout.
    """
    dtype = check_block_arguments(x, layers, drop_rate, recompute, reader, projection)
    norms = [*(layer.norm1 for layer in layers), *(layer.norm2 for layer in layers)]
    norms += [] if reader is None else [reader]
    conv1, conv2 = [layer.conv1 for layer in layers], [layer.conv2 for layer in layers]
    spec = BlockSpec(
        dtype,
        [(weight.size(0), weight.size(1)) for weight in conv1],
        tuple(conv2[0].shape),
        [norm.training for norm in norms],
        [float(norm.eps) for norm in norms],
        [norm.momentum for norm in norms],
        float(drop_rate),
        drops_channels,
        _RECOMPUTE_KEEPS_BOTTLENECKS[recompute],
        reader is not None,
        pool,
        0 if projection is None else projection.size(1),
    )
    tensors = BlockTensors(
        [norm.weight for norm in norms],
        [norm.bias for norm in norms],
        [norm.running_mean for norm in norms],
        [norm.running_var for norm in norms],
        [norm.num_batches_tracked for norm in norms],
        conv1,
        conv2,
        projection,
    )
    return spec, tensors


def run(spec: BlockSpec, tensors: BlockTensors, x: Tensor, name: str = "") -> Tensor:
    """Runs a block on its input.

    Args:
        name: of the module, for messages.
    """
    if spec.training_norms:
        check_more_than_one_value(x, spec.in_channels)
    inputs = [x, *tensors.differentiable()]
    check_transforms("dense_block", *inputs)
    mask = None
    if spec.drop_rate > 0:
        draw = _ops.dropout_mask if torch.compiler.is_compiling() else dropout_mask
        mask = draw(
            x, tensors.conv1, tensors.conv2, spec.dtype, spec.drop_rate, spec.drops_channels
        )
    if torch.compiler.is_compiling():
        result, _, _, statistics, *_ = _ops.dense_block(*_operands(spec, tensors, x, mask))
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        call = _Call(spec, tensors, mask, name)
        result, statistics, _ = _DenseBlock.apply(call, *inputs)
    else:
        with torch.no_grad():
            result, saved = _forward(spec, tensors, x, mask, keeps=False)
            statistics = saved.statistics
    # Last, so that an error leaves them as they were.
    _update_running_statistics(spec, tensors, statistics, count_rows(x.shape))
    if spec.projected_channels:
        return result
    # As torch.cat of a float32 input and 16-bit features under autocast.
    return result.to(torch.promote_types(x.dtype, spec.dtype))


def _update_running_statistics(
    spec: BlockSpec, tensors: BlockTensors, statistics: Tensor, rows: int
) -> None:
    lists = [], [], []  # type: tuple[list[Tensor], list[Tensor], list[Tensor]]
    begins, momenta, cumulative = [], [], []
    empty = statistics.new_empty(0)
    for i in spec.training_norms:
        found = tensors.running_means[i], tensors.running_vars[i], tensors.batch_counts[i]
        if found == (None, None, None):
            continue
        for tensor, to in zip(found, lists, strict=True):
            to.append(empty if tensor is None else tensor)
        momentum = spec.momentum[i]
        begins.append(spec.statistics_begins[i])
        momenta.append(0.0 if momentum is None else momentum)
        cumulative.append(momentum is None)
    if begins:
        mean, var = statistics.detach().unbind(0)
        _ops.update_running_statistics(mean, var, rows, begins, *lists, momenta, cumulative)


# ------------------------------------------------------------------------------------------------
# The formulas


class _Saved(NamedTuple):
    """What the backward pass needs besides inputs and result."""

    features: Tensor | None  # None: they are the result
    bottlenecks: Tensor | None  # [L, M, B]
    statistics: Tensor  # [2, C + L B], float64
    affine: Tensor | None  # weights and biases of all norms, [2, .], at least float32
    frozen: Tensor | None  # mean and var of the norms without batch statistics, [2, .], float64


def _forward(
    spec: BlockSpec, tensors: BlockTensors, x: Tensor, mask: Tensor | None, keeps: bool
) -> tuple[Tensor, _Saved]:
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
        return result, _Saved(kept_features, None, statistics, None, None)
    bottlenecks = None
    if keeps and spec.keeps_bottlenecks:
        bottlenecks = features.new_empty((spec.num_layers, rows, spec.bottleneck))
    affine, frozen = _pack_norms(spec, tensors, x)
    saved = _Saved(kept_features, bottlenecks, statistics, affine, frozen)
    with out_of_memory_as_torch_raises_it(x.device):
        _ops.dense_block_layers(
            *_input(spec, x, tensors.projection), features, bottlenecks, statistics,
            _pack_conv1(tensors.conv1, spec.dtype), _pack_conv2(tensors.conv2, spec.dtype),
            affine, frozen, *_settings(spec, x, mask), not keeps,
            result if spec.has_reader else None,
        )  # fmt: skip
    return result, saved


class _Gradients(NamedTuple):
    """Those of the packed operands."""

    x: Tensor | None
    projection: Tensor | None  # [C_0, P]
    affine: Tensor  # as it is saved
    conv1: Tensor | None  # [B, C_l] of all layers, one after the other; at least float32
    conv2: Tensor | None  # [layers that need it, k, *kernel, B]


class _Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    projection: bool
    norms: list[bool]  # weights, then biases
    conv1: list[bool]
    conv2: list[bool]


def _backward(
    spec: BlockSpec,
    saved: _Saved,
    x: Tensor | None,
    projection: Tensor | None,
    conv1: Sequence[Tensor],
    conv2: Sequence[Tensor],
    mask: Tensor | None,
    grad_result: Tensor,
    needs: _Needs,
) -> _Gradients:
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
    if needs.x:
        channels = spec.projected_channels or spec.in_channels
        grad_x = _new_channels_last((n, channels, *spatial), features)
    if needs.projection:
        grad_projection = features.new_empty((spec.in_channels, spec.projected_channels))
    packed1, packed2 = _pack_conv1(conv1, spec.dtype), _pack_conv2(conv2, spec.dtype)
    affine = saved.affine.contiguous()
    grad_affine = torch.empty_like(affine)
    # Sums over chunks of rows, of 16-bit products.
    grad_conv1 = torch.empty_like(packed1, dtype=wide) if any(needs.conv1) else None
    count = sum(needs.conv2)
    grad_conv2 = torch.empty_like(packed2[:count]) if count else None
    read = features if x is None else x  # without a projection nobody reads the input again
    with out_of_memory_as_torch_raises_it(features.device):
        _ops.dense_block_layers_backward(
            grad_result, *_input(spec, read, projection), features,
            _contiguous(saved.bottlenecks), saved.statistics.contiguous(), packed1, packed2,
            affine, _contiguous(saved.frozen), *_settings(spec, features, mask), spec.has_reader,
            grad_features, grad_x, grad_projection, grad_affine, grad_conv1, needs.conv1,
            grad_conv2, needs.conv2,
        )  # fmt: skip
    return _Gradients(grad_x, grad_projection, grad_affine, grad_conv1, grad_conv2)


def _input(
    spec: BlockSpec, x: Tensor, projection: Tensor | None
) -> tuple[Tensor, Tensor | None]:
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


def _pack_conv1(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The ``[B, C_l]`` one after the other."""
    flat: Tensor = _flatten_dense_tensors(weights)  # type: ignore[no-untyped-call]
    return flat.to(dtype)


def _pack_conv2(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``[L, k, *kernel, B]``, contiguous."""
    inner = torch.cat(list(weights)).to(dtype).movedim(1, -1).contiguous()
    return inner.view(len(weights), -1, *inner.shape[1:])


class _Parameters(NamedTuple):
    """Dtypes, shapes and strides that the gradients of the parameters have."""

    norm_dtype: torch.dtype | None
    conv1: list[tuple[torch.dtype, torch.Size, tuple[int, ...]]]
    conv2: list[tuple[torch.dtype, torch.Size, tuple[int, ...]]]


def _facts(tensors: BlockTensors) -> _Parameters:
    dtypes = (p.dtype for p in (*tensors.weights, *tensors.biases) if p is not None)
    conv1, conv2 = (
        [(weight.dtype, weight.shape, weight.stride()) for weight in weights]
        for weights in (tensors.conv1, tensors.conv2)
    )
    return _Parameters(next(dtypes, None), conv1, conv2)


def _unpack(
    spec: BlockSpec, parameters: _Parameters, gradients: _Gradients, needs: _Needs
) -> list[Tensor | None]:
    """The gradients of ``tensors.differentiable()`` but the first."""
    affine = gradients.affine
    if parameters.norm_dtype is not None:
        affine = affine.to(parameters.norm_dtype)
    unpacked: list[Tensor | None] = []
    for row in affine.unbind(0):
        unpacked += torch.split(row, spec.norm_channels)
    unpacked = [g if needed else None for g, needed in zip(unpacked, needs.norms, strict=True)]
    if gradients.conv1 is None:
        unpacked += [None] * spec.num_layers
    else:
        flat = gradients.conv1.to(parameters.conv1[0][0])
        parts = torch.split(flat, [shape.numel() for _, shape, _ in parameters.conv1])
        for part, (_, shape, strides), needed in zip(
            parts, parameters.conv1, needs.conv1, strict=True
        ):
            unpacked.append(with_strides(part.view(shape), strides) if needed else None)
    if gradients.conv2 is None:
        return unpacked + [None] * spec.num_layers
    images = gradients.conv2.to(parameters.conv2[0][0]).movedim(-1, 2)  # each channels-last
    if parameters.conv2[0][2][1] != 1:  # one copy for all layers
        images = images.contiguous()
    layers = iter(images.unbind(0))
    for (_, _, strides), needed in zip(parameters.conv2, needs.conv2, strict=True):
        unpacked.append(with_strides(next(layers), strides) if needed else None)
    return unpacked


# ------------------------------------------------------------------------------------------------
# The first door: eager mode


class _Call(NamedTuple):
    """A call of the autograd function, besides the tensors that it differentiates by."""

    spec: BlockSpec
    tensors: BlockTensors
    mask: Tensor | None
    name: str


class _DenseBlock(torch.autograd.Function):
    """Saves the features, per-channel numbers and, if asked to, bottlenecks; and the weights.

    Results are the block's, the statistics of the batch, and an empty tensor by which a second
    derivative finds the way to its refusal (:mod:`efficient_densenet.differentiation`).
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *parameters: Tensor | None) -> Any:
        spec, tensors = call.spec, call.tensors
        result, saved = _forward(spec, tensors, x, call.mask, keeps=True)
        token = x.new_empty(0)
        ctx.spec, ctx.name, ctx.parameters = spec, call.name, _facts(tensors)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved.statistics)
        ctx.save_for_backward(
            token, result if saved.features is None else saved.features, *saved[1:], call.mask,
            x if tensors.projection is not None else None, tensors.projection,
            *tensors.conv1, *tensors.conv2,
        )  # fmt: skip
        return result, saved.statistics, token

    @staticmethod
    def backward(ctx: Any, grad_result: Tensor | None, *others: Tensor | None) -> Any:
        if grad_result is None:
            return (None,) * len(ctx.needs_input_grad)
        spec, (needs_x, needs_projection, *rest) = ctx.spec, ctx.needs_input_grad[1:]
        norms, layers = 2 * len(spec.eps), spec.num_layers
        needs = _Needs(
            needs_x, needs_projection, rest[:norms], rest[norms:-layers], rest[-layers:]
        )
        token, features, *kept = _saved_tensors(ctx)
        saved = _Saved(features, *kept[:4])
        mask, x, projection, *weights = kept[4:]
        with torch.no_grad(), _without_autocast(grad_result.device.type):
            if count_rows(ctx.x_shape) == 0:
                gradients = _zeros(spec, ctx.x_shape, grad_result, needs)
            else:
                gradients = _backward(
                    spec, saved, x, projection, weights[:layers], weights[layers:], mask,
                    grad_result, needs,
                )  # fmt: skip
            results = _results(spec, ctx.parameters, gradients, needs, ctx.x_dtype, projection)
        check_transforms("dense_block", grad_result)
        return None, *refuse_second_derivatives("dense_block", results, token, grad_result)


def _results(
    spec: BlockSpec,
    parameters: _Parameters,
    gradients: _Gradients,
    needs: _Needs,
    x_dtype: torch.dtype,
    projection: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of x and of ``tensors.differentiable()``."""
    grad_x = None if gradients.x is None else gradients.x.to(x_dtype)
    grad_projection = gradients.projection
    if grad_projection is not None and projection is not None:
        grad_projection = grad_projection.to(projection.dtype).view(projection.shape)
        grad_projection = with_strides(grad_projection, projection.stride())
    return [grad_x, grad_projection, *_unpack(spec, parameters, gradients, needs)]


def _saved_tensors(ctx: Any) -> Any:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        which = f" of {ctx.name}" if ctx.name else ""
        raise RuntimeError(
            f"dense_block: the result{which}, or a weight, was changed in place before the backward "
            "pass. A block's result is itself kept for the backward pass: use inplace=False in the "
            "module or hook behind it, or let that work on result.clone(). "
            f"({error})"
        ) from error


def _without_autocast(kind: str) -> Any:
    """The forward pass has done its casts. (Autocast does not know the meta device.)"""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _zeros(
    spec: BlockSpec, x_shape: torch.Size, like: Tensor, needs: _Needs
) -> _Gradients:
    """The gradients of an empty batch."""
    wide = torch.promote_types(spec.dtype, torch.float32)
    conv1 = spec.bottleneck * sum(spec.norm_channels[: spec.num_layers])
    conv2 = sum(needs.conv2), spec.growth, *spec.kernel, spec.bottleneck
    return _Gradients(
        like.new_zeros(x_shape) if needs.x else None,
        like.new_zeros(spec.in_channels, spec.projected_channels) if needs.projection else None,
        like.new_zeros(2, sum(spec.norm_channels), dtype=wide),
        like.new_zeros(conv1, dtype=wide),
        like.new_zeros(conv2),
    )


# ------------------------------------------------------------------------------------------------
# The second door: operators that mutate nothing, for compilers. Lists hold no None: weights and
# biases are those of the norms that have some, running statistics those of the frozen norms.

_LISTS = ("weights", "biases", "running_means", "running_vars", "conv1", "conv2")
_FLAGS = (
    "bool[] has_weight, bool[] has_bias, bool[] training, float[] eps, ScalarType dtype, "
    "float drop_rate, bool keeps_bottlenecks, bool has_reader, int pool"
)
torch.library.define(
    "efficient_densenet::dense_block",
    f"(Tensor x, Tensor? projection, Tensor? dropout_mask, "
    f"{', '.join(f'Tensor[] {name}' for name in _LISTS)}, {_FLAGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "efficient_densenet::dense_block_backward",
    "(Tensor grad_result, Tensor features, Tensor bottlenecks, Tensor statistics, Tensor affine, "
    "Tensor frozen, Tensor? dropout_mask, Tensor? x, Tensor? projection, Tensor[] conv1, "
    "Tensor[] conv2, bool[] training, float[] eps, ScalarType dtype, float drop_rate, "
    "bool keeps_bottlenecks, bool has_reader, int pool, int[] x_sizes, bool needs_x, "
    "bool needs_projection, bool[] needs_conv1, bool[] needs_conv2) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_NUM_LISTS = len(_LISTS)
_Flags = tuple[Any, ...]


def _operands(
    spec: BlockSpec, tensors: BlockTensors, x: Tensor, mask: Tensor | None
) -> tuple[Any, ...]:
    """Of the operator, from what the eager function takes."""
    weights, biases, running_means, running_vars = (list(part) for part in tensors[:4])
    return (
        x, tensors.projection, mask,
        [weight for weight in weights if weight is not None],
        [bias for bias in biases if bias is not None],
        [running_means[i] for i in spec.frozen_norms],
        [running_vars[i] for i in spec.frozen_norms],
        tensors.conv1, tensors.conv2,
        [weight is not None for weight in weights], [bias is not None for bias in biases],
        spec.training, spec.eps, spec.dtype, spec.drop_rate, spec.keeps_bottlenecks,
        spec.has_reader, int(spec.pool),
    )  # fmt: skip


def _from_operands(
    x: Tensor, projection: Tensor | None, lists: Sequence[Sequence[Tensor]], flags: _Flags
) -> tuple[BlockSpec, BlockTensors]:
    """The way back, with all checks."""
    has_weight, has_bias, training, eps, dtype, drop_rate, keeps_bottlenecks, has_reader, pool = (
        flags
    )
    conv1, conv2 = lists[4:]
    count = 2 * len(conv1) + has_reader
    present = {"has_weight": has_weight, "has_bias": has_bias, "training": training, "eps": eps}
    for name, values in present.items():
        if len(values) != count:
            raise ValueError(f"{name}: expected {count} values, one per norm, got {len(values)}")
    frozen = [not trains for trains in training]
    columns = [
        _spread(name, tensors, present)
        for name, tensors, present in zip(
            _LISTS, lists[:4], (has_weight, has_bias, frozen, frozen), strict=False
        )
    ]
    norms = [
        BatchNorm(mean, var, weight, bias, training=trains, eps=e)
        for weight, bias, mean, var, trains, e in zip(*columns, training, eps, strict=True)
    ]
    layers = zip(norms, conv1, norms[len(conv1) :], conv2, strict=False)
    check_block_arguments(
        x, [DenseLayer(*layer) for layer in layers], drop_rate, _recompute(keeps_bottlenecks),
        norms[-1] if has_reader else None, projection, dtype,
    )  # fmt: skip
    spec = BlockSpec(
        dtype, [(weight.size(0), weight.size(1)) for weight in conv1], tuple(conv2[0].shape),
        training, eps, [0.0] * count, drop_rate, False, keeps_bottlenecks, has_reader, pool,
        0 if projection is None else projection.size(1),
    )  # fmt: skip
    nones: list[Tensor | None] = [None] * count
    return spec, BlockTensors(*columns, nones, list(conv1), list(conv2), projection)


def _recompute(keeps_bottlenecks: bool) -> str:
    return "bottleneck" if keeps_bottlenecks else "features"


def _spread(
    name: str, tensors: Sequence[Tensor], present: Sequence[bool]
) -> list[Tensor | None]:
    """The tensors at the places where there is one."""
    if len(tensors) != sum(present):
        raise ValueError(f"{name}: expected {sum(present)} tensors, got {len(tensors)}")
    remaining = iter(tensors)
    return [next(remaining) if here else None for here in present]


def _filled(x: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """An empty tensor for None, which operators cannot return."""
    return [x.new_empty(0) if tensor is None else tensor for tensor in tensors]


def _given(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.dim() > 1 or tensor.size(0) else None


def _dense_block_operator(
    x: Tensor, projection: Tensor | None, mask: Tensor | None, *operands: Any
) -> tuple[Tensor, ...]:
    lists, flags = operands[:_NUM_LISTS], operands[_NUM_LISTS:]
    spec, tensors = _from_operands(x, projection, lists, flags)
    result, saved = _forward(spec, tensors, x, mask, keeps=True)
    return result, *_filled(x, saved)


def _dense_block_backward_operator(
    grad_result: Tensor,
    features: Tensor,
    bottlenecks: Tensor,
    statistics: Tensor,
    affine: Tensor,
    frozen: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    projection: Tensor | None,
    conv1: Sequence[Tensor],
    conv2: Sequence[Tensor],
    training: Sequence[bool],
    eps: Sequence[float],
    dtype: torch.dtype,
    drop_rate: float,
    keeps_bottlenecks: bool,
    has_reader: bool,
    pool: int,
    x_sizes: Sequence[int],
    needs_x: bool,
    needs_projection: bool,
    needs_conv1: Sequence[bool],
    needs_conv2: Sequence[bool],
) -> tuple[Tensor, ...]:
    spec = BlockSpec(
        dtype, [(weight.size(0), weight.size(1)) for weight in conv1], tuple(conv2[0].shape),
        training, eps, [0.0] * len(eps), drop_rate, False, keeps_bottlenecks, has_reader, pool,
        0 if projection is None else projection.size(1),
    )  # fmt: skip
    needs = _Needs(needs_x, needs_projection, [], list(needs_conv1), list(needs_conv2))
    if count_rows(x_sizes) == 0:
        return tuple(_filled(features, _zeros(spec, torch.Size(x_sizes), features, needs)))
    saved = _Saved(features, _given(bottlenecks), statistics, affine, _given(frozen))
    gradients = _backward(spec, saved, x, projection, conv1, conv2, mask, grad_result, needs)
    return tuple(_filled(features, gradients))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (x, projection, mask), lists = inputs[:3], inputs[3 : 3 + _NUM_LISTS]
    flags = inputs[3 + _NUM_LISTS :]
    weights, biases, _, _, conv1, conv2 = lists
    ctx.flags, ctx.x_dtype, ctx.x_sizes = flags, x.dtype, x.shape
    nones: list[Tensor | None] = []
    ctx.parameters = _facts(
        BlockTensors(list(weights), list(biases), nones, nones, nones, list(conv1), list(conv2))
    )
    result, features, *kept = output
    has_reader = flags[-2]
    ctx.save_for_backward(
        features if has_reader else result, *kept, mask,
        None if projection is None else x, projection, *conv1, *conv2,
    )  # fmt: skip


def _differentiate(ctx: Any, grad_result: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The gradients of the operator's inputs."""
    features, *rest = ctx.saved_tensors
    kept, (mask, x, projection), weights = rest[:4], rest[4:7], rest[7:]
    layers = len(weights) // 2
    conv1, conv2 = weights[:layers], weights[layers:]
    has_weight, has_bias, training, eps, *numbers = ctx.flags
    needs_x, needs_projection, _, *needs_lists = ctx.needs_input_grad[: 3 + _NUM_LISTS]
    needs_norms = [
        bool(need)
        for present, needs in ((has_weight, needs_lists[0]), (has_bias, needs_lists[1]))
        for need in _spread("needs", needs, present)
    ]
    needs = _Needs(needs_x, bool(needs_projection), needs_norms, *map(list, needs_lists[4:]))
    outputs = _ops.dense_block_backward(
        grad_result, features, *kept, mask, x, projection, conv1, conv2, training, eps, *numbers,
        ctx.x_sizes, needs.x, needs.projection, needs.conv1, needs.conv2,
    )  # fmt: skip
    asked = needs.x, needs.projection, True, any(needs.conv1), any(needs.conv2)
    gradients = _Gradients(*(g if need else None for g, need in zip(outputs, asked, strict=True)))
    dtype, drop_rate, keeps_bottlenecks, has_reader, pool = numbers
    spec = BlockSpec(
        dtype, [(weight.size(0), weight.size(1)) for weight in conv1], tuple(conv2[0].shape),
        training, eps, [0.0] * len(eps), drop_rate, False, keeps_bottlenecks, has_reader, pool,
    )  # fmt: skip
    results = _results(spec, ctx.parameters, gradients, needs, ctx.x_dtype, projection)
    grad_x, grad_projection, *parameters = results
    norms = len(eps)
    by_list = [
        [g for g, here in zip(parameters[:norms], has_weight, strict=True) if here],
        [g for g, here in zip(parameters[norms : 2 * norms], has_bias, strict=True) if here],
        [None] * len(needs_lists[2]),
        [None] * len(needs_lists[3]),
        parameters[2 * norms : -layers],
        parameters[-layers:],
    ]
    return grad_x, grad_projection, None, *by_list, *[None] * len(ctx.flags)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise second_derivative_error("dense_block")


for _name, _function in (
    ("dense_block", _dense_block_operator),
    ("dense_block_backward", _dense_block_backward_operator),
):
    torch.library.impl(f"efficient_densenet::{_name}", ("cpu", "cuda"))(_function)
    # Without data the same function gives the shapes and strides: its kernels then do nothing.
    torch.library.register_fake(f"efficient_densenet::{_name}")(_function)
torch.library.register_autograd(
    "efficient_densenet::dense_block", _differentiate, setup_context=_keep_for_backward
)
torch.library.register_autograd("efficient_densenet::dense_block_backward", _refuse)


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

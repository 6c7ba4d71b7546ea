"""A whole dense block as one operator: linear memory, and a loop over layers in C++.

Every layer appends its new features to one buffer, which is the block's output, so nothing is ever
concatenated. The statistics of a channel are taken once, and gradients are added up in place in one
buffer of the same shape. What a layer normalises is scratch, recomputed in the backward pass
(arXiv:1707.06990; docs/design.md, "The dense block").

There is one formula (:mod:`efficient_densenet.dense_block_formulas`) and two doors to it: the
autograd function of this module for eager mode, and the operators
``torch.ops.efficient_densenet.dense_block`` and ``dense_block_backward`` for compilers. Eager mode
does not take the operator because its step is slower: 19.8 ms instead of 16.8 for a DenseNet-BC-100
with two images of 8 x 8 on one CPU thread, where the host's work dominates, and 6.7 ms instead of
5.6 without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ._extension import _C
from .arguments import check_block_arguments, check_more_than_one_value, check_pixels
from .batch_norm import BatchNorm, RunningUpdates
from .block_spec import BlockSpec, Pool, count_rows
from .dense_block_formulas import (
    BlockTensors,
    DenseLayer,
    Needs,
    Saved,
    backward,
    forward,
    input_gradients,
    parameter_layout,
    zero_gradients,
)
from .dense_block_operators import operands
from .differentiation import backward_pass, check_transforms, refuse_second_derivatives
from .dropout import dropout_mask
from .precision import settings as precision_settings
from .subclasses import without_subclass

_ops = torch.ops.efficient_densenet
_PLAIN_TYPES = frozenset((Tensor, nn.Parameter, type(None)))
_RECOMPUTE_KEEPS_BOTTLENECKS = {"bottleneck": True, "features": False}


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
        RuntimeError: x has no pixels, as torch's convolutions raise it.
        torch.OutOfMemoryError: running statistics are as before.
    """
    given = _tensors_of(x, layers)
    if has_torch_function(given):
        result: Tensor = handle_torch_function(dense_block, given, x, layers, drop_rate, recompute)
        return result
    return run_dense_block(*describe(x, layers, drop_rate, recompute), x)


def _tensors_of(x: Tensor, layers: Any) -> list[Any]:
    """Those whose classes may want to see the call; nothing is known of the arguments yet."""
    parts = (
        [part for layer in layers if isinstance(layer, DenseLayer) for part in layer]
        if isinstance(layers, (list, tuple))
        else []
    )
    norms = [part for part in parts if isinstance(part, BatchNorm)]
    return [x, *parts, *(field for norm in norms for field in norm[:4])]


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
    """A block and its tensors, for :func:`run_dense_block`, from checked arguments.

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


def run_dense_block(
    spec: BlockSpec,
    tensors: BlockTensors,
    x: Tensor,
    name: str = "",
    updates: RunningUpdates | None = None,
) -> Tensor:
    """Runs a block on its input. Subclasses of Tensor see it as one function.

    Args:
        name: of the module, for messages.
        updates: gets those of the running statistics, for whoever moves them later; None to move
            them here.
    """
    inputs = [x, *tensors.differentiable()]
    if has_torch_function(inputs):
        arguments = spec, tensors, x, name, updates
        seen: Tensor = handle_torch_function(run_dense_block, inputs, *arguments)
        return seen
    if not _PLAIN_TYPES.issuperset(map(type, inputs)):
        x, tensors = without_subclass(x), tensors.without_subclasses()
        inputs = [x, *tensors.differentiable()]
    check_pixels(x)
    if spec.training_norms:
        check_more_than_one_value(x, spec.in_channels)
    check_transforms("dense_block", *inputs)
    result: Tensor
    mask = None
    if spec.drop_rate > 0:
        settings = spec.dtype, spec.drop_rate, spec.drops_channels
        if torch.compiler.is_compiling():
            salt = torch.empty(0, device=x.device)
            mask = _ops.dropout_mask(x, tensors.conv1, tensors.conv2, *settings, salt)
        else:
            mask = dropout_mask(x, tensors.conv1, tensors.conv2, *settings)
    if torch.compiler.is_compiling():
        result, _, _, statistics, *_ = _ops.dense_block(*operands(spec, tensors, x, mask))
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        call = _Call(spec, tensors, mask, name)
        result, statistics, _ = _DenseBlock.apply(call, *inputs)
    else:
        with torch.no_grad():
            result, saved = forward(spec, tensors, x, mask, keeps=False)
            statistics = saved.statistics
    _update_running_statistics(spec, tensors, statistics, count_rows(x.shape), updates)
    if spec.projected_channels:
        return result
    # As torch.cat of a float32 input and 16-bit features under autocast.
    return result.to(torch.promote_types(x.dtype, spec.dtype))


def kernel_path(spec: BlockSpec, x: Tensor) -> str:
    """See :meth:`efficient_densenet.DenseBlock.kernel_path`."""
    index = x.device.index or 0
    path, why, why_not_conv2 = _C.kernel_path(
        x.device.type, index, spec.dtype.itemsize, *precision_settings(x.device, spec.dtype),
        [x.size(0), spec.channels, *x.shape[2:]], spec.growth, spec.bottleneck, list(spec.kernel),
        spec.drop_rate > 0,
    )  # fmt: skip
    if path != "tensor cores":
        return f"{path}: {why}"
    return f"{path} but for conv2: {why_not_conv2}" if why_not_conv2 else path


def _update_running_statistics(
    spec: BlockSpec,
    tensors: BlockTensors,
    statistics: Tensor,
    rows: int,
    later: RunningUpdates | None,
) -> None:
    """Last, so that an error leaves them as they were."""
    trained = spec.training_norms
    if not trained:
        return
    begins = [spec.statistics_begins[i] for i in trained]
    momenta = [spec.momentum[i] for i in trained]
    running = tensors.running_means, tensors.running_vars, tensors.batch_counts
    buffers = [[of_norms[i] for i in trained] for of_norms in running]
    updates = RunningUpdates() if later is None else later
    mean, var = statistics.detach().unbind(0)
    updates.add(begins, buffers, momenta, mean, var, rows)
    if later is None:
        updates.move()


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
        result, saved = forward(spec, tensors, x, call.mask, keeps=True)
        token = x.new_empty(0)
        ctx.spec, ctx.name, ctx.layout = spec, call.name, parameter_layout(tensors)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        projects = tensors.projection is not None and any(ctx.needs_input_grad[1:3])
        ctx.mark_non_differentiable(saved.statistics)
        ctx.save_for_backward(
            token, result if saved.features is None else saved.features, *saved[1:], call.mask,
            *((x, tensors.projection) if projects else (None, None)),
            *tensors.conv1, *tensors.conv2,
        )  # fmt: skip
        return result, saved.statistics, token

    @staticmethod
    def backward(ctx: Any, grad_result: Tensor | None, *others: Tensor | None) -> Any:
        if grad_result is None:
            return (None,) * len(ctx.needs_input_grad)
        spec, (needs_x, needs_projection, *rest) = ctx.spec, ctx.needs_input_grad[1:]
        norms, layers = 2 * len(spec.eps), spec.num_layers
        needs = Needs(needs_x, needs_projection, rest[:norms], rest[norms:-layers], rest[-layers:])
        with backward_pass("dense_block", grad_result), _without_autocast(grad_result.device.type):
            token, features, *kept = _saved_tensors(ctx)
            saved = Saved(features, *kept[:4])
            mask, x, projection, *weights = kept[4:]
            if count_rows(ctx.x_shape) == 0:
                gradients = zero_gradients(spec, ctx.x_shape, grad_result, weights[layers:], needs)
            else:
                gradients = backward(
                    spec, saved, x, projection, weights[:layers], weights[layers:], mask,
                    grad_result, needs,
                )  # fmt: skip
            results = input_gradients(spec, ctx.layout, gradients, needs, ctx.x_dtype, projection)
        return None, *refuse_second_derivatives("dense_block", results, token, grad_result)


def _saved_tensors(ctx: Any) -> Any:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        which = f" of {ctx.name}" if ctx.name else ""
        raise RuntimeError(
            f"dense_block: the result{which}, or a weight, was changed in place before the "
            "backward pass, for which a block's result is itself kept: use inplace=False in the "
            "module or hook behind it, or let that work on result.clone(). "
            f"({error})"
        ) from error


def _without_autocast(kind: str) -> Any:
    """The forward pass has done its casts. (Autocast does not know the meta device.)"""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)

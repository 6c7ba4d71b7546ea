"""``relu(batch_norm(cat(features, 1)))`` that keeps neither the concatenation nor the result.

The operators ``torch.ops.efficient_densenet.concat_bn_*`` (csrc/concat_bn_relu.cpp) do the
arithmetic; this module adds arguments' checks, autograd, autocast and the shared storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.overrides import handle_torch_function, has_torch_function

from ._extension import check_one_device
from .arguments import check_arguments
from .batch_norm import (
    BatchNorm,
    as_parameter,
    norm_without_subclasses,
    parameter_dtype,
    update_running_statistics,
)
from .differentiation import backward_pass, check_transforms, refuse_second_derivatives
from .layout import dense_strides, is_channels_last
from .recomputation import recompute_in_backward, set_origin
from .storage import SharedStorage
from .subclasses import without_subclass
from .sync_batch_norm import (
    Statistics,
    correct_gradients,
    group_to_synchronise,
    local_statistics,
    synchronise_statistics,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["concat_bn_relu", "recompute_in_backward"]

_ops = torch.ops.efficient_densenet


def concat_bn_relu(
    features: Sequence[Tensor],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    storage: SharedStorage | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """``relu(F.batch_norm(torch.cat(features, 1), ...))`` without a concatenated copy.

    The result is written into ``storage`` and **is valid until the storage is next written**, that
    is, until the next call with the same storage. For the backward pass only the features and
    per-channel numbers are kept; run the consumer under :func:`recompute_in_backward`, which
    recomputes the result before the consumer's backward::

        y = concat_bn_relu(features, mean, var, weight, bias, training=True, storage=storage)
        with recompute_in_backward(y):
            z = conv(y)

    A consumer outside of it keeps ``y`` itself, as any operator does, and raises autograd's
    ``RuntimeError`` in its backward if the storage was overwritten.

    A function with these lines needs ``torch.compiler.disable`` where it may be compiled.

    Running statistics are updated once per call with ``training=True``, never by a recomputation.
    Without gradient mode nothing is kept, and the result gets memory of its own.

    Args:
        features: tensors ``[N, C_i, *spatial]`` with 0 to 3 spatial dimensions, equal in all but
            ``C_i``; any strides, mixed in one call; one dtype of float64, float32, float16,
            bfloat16 (under autocast, all but float64 are cast to its dtype); CPU or CUDA.
        running_mean, running_var: ``[sum(C_i)]`` or None; updated in place when training,
            required otherwise. Like ``weight`` and ``bias`` they have the dtype of the features, or
            float32 where that is a 16-bit type.
        weight, bias: ``[sum(C_i)]`` or None (1 and 0).
        training: normalise by the statistics of this batch instead of the running ones.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance, > 0.
        storage: where the result goes; None for memory of its own.
        process_group: normalise by the statistics of this batch on all processes of the group, as
            ``nn.SyncBatchNorm``; None for those of this process. Only where training.

    Returns:
        ``[N, sum(C_i), *spatial]`` in the memory format that ``torch.cat`` would choose.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: an argument is wrong; nothing was changed.
    """
    given = running_mean, running_var, weight, bias
    if isinstance(features, (list, tuple)) and has_torch_function((*features, *given)):
        result: Tensor = handle_torch_function(
            concat_bn_relu, (*features, *given), features, *given, training, momentum, eps,
            storage, process_group,
        )  # fmt: skip
        return result
    norm = BatchNorm(*given, training, momentum, eps)
    group = group_to_synchronise(norm, process_group)
    dtype = check_arguments(features, norm, storage, group is not None)
    norm = norm_without_subclasses(norm)
    features = [without_subclass(feature) for feature in features]
    weight, bias = norm.weight, norm.bias
    check_transforms("concat_bn_relu", weight, bias, *features)
    settings = _Settings(dtype, training, float(eps), storage, group)
    if not torch.is_grad_enabled():
        # Nothing needs the storage, and threads may share a module that only predicts.
        return _forward(settings._replace(storage=None), norm, features).y
    differentiable = any(x is not None and x.requires_grad for x in (weight, bias, *features))
    # Where nothing here needs a gradient, the consumer's weight may, and then the result has to be
    # recomputed: an input that does need one makes autograd keep what that takes.
    anchor = None
    if not differentiable:
        anchor = torch.empty(0, device=features[0].device, requires_grad=True)
    result = _ConcatBNReLU.apply(settings, norm, anchor, weight, bias, *features)
    y = result if differentiable else result.detach()
    set_origin(y, result)
    return y


class _Settings(NamedTuple):
    dtype: torch.dtype  # of the result; features of another (autocast) are kept as they came
    training: bool
    eps: float
    storage: SharedStorage | None
    group: ProcessGroup | None  # whose statistics are used


class _Forward(NamedTuple):
    y: Tensor
    statistics: Statistics


class _ConcatBNReLU(torch.autograd.Function):
    """Saves features, weight, bias, mean and var: nothing of the size of the result."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        norm: BatchNorm,
        anchor: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *features: Tensor,
    ) -> Tensor:
        y, (mean, var, rows) = _forward(settings, norm, features)
        ctx.settings, ctx.rows = settings, rows
        ctx.sizes, ctx.strides = y.size(), y.stride()
        ctx.unpacked = None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, var, weight, bias, *features)
        return y

    @staticmethod
    def recompute(ctx: Any, shares_memory: bool) -> Tensor:
        """The result again, for a consumer whose backward pass runs before that of this node."""
        mean, var, weight, bias, *features = _unpack(ctx)
        settings: _Settings = ctx.settings
        if not shares_memory:
            settings = settings._replace(storage=None)
        with torch._C.DisableTorchFunctionSubclass():
            used = _cast(features, settings.dtype)
            # The layout is that of the first time: saved-tensor hooks keep values, not strides.
            y = _allocate(settings, used[0], ctx.sizes, ctx.strides)
            _normalise(settings.eps, used, mean, var, weight, bias, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        with backward_pass("concat_bn_relu", grad_y):
            saved = _unpack(ctx)
            ctx.unpacked = None
            gradients = _backward(ctx, grad_y, saved)
        refusing = refuse_second_derivatives("concat_bn_relu", gradients, *saved, grad_y)
        return (None, None, None, *refusing)


def _unpack(ctx: Any) -> Sequence[Any]:
    """What the node has saved, unpacked once per backward pass.

    Activation checkpointing allows no more, and with other hooks it may be expensive. Here a
    consumer that recomputes the result comes first, and then the node itself, which lets go of it.
    """
    task = torch._C._current_graph_task_id()
    if ctx.unpacked is not None and ctx.unpacked[0] == task:
        tensors: Sequence[Any] = ctx.unpacked[1]
        return tensors
    tensors = ctx.saved_tensors
    ctx.unpacked = None if task < 0 else (task, tensors)
    return tensors


def _forward(settings: _Settings, norm: BatchNorm, features: Sequence[Tensor]) -> _Forward:
    used = _cast(features, settings.dtype)
    first = used[0]
    sizes = torch.Size([first.size(0), sum(x.size(1) for x in used), *first.shape[2:]])
    strides = dense_strides(sizes, all(map(is_channels_last, used)))
    # Before the running statistics change: running out of memory must leave them as they were.
    y = _allocate(settings, first, sizes, strides)
    statistics = _statistics(settings, norm, used, sizes)
    _normalise(settings.eps, used, statistics.mean, statistics.var, norm.weight, norm.bias, y)
    return _Forward(y, statistics)


def _cast(features: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The features as the kernels read them; under autocast these are copies that nobody keeps."""
    return [x if x.dtype == dtype else x.to(dtype) for x in features]


def _allocate(
    settings: _Settings, like: Tensor, sizes: Sequence[int], strides: Sequence[int]
) -> Tensor:
    if settings.storage is None:
        return torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device)
    return settings.storage.allocate(sizes, strides, like=like)


def _statistics(
    settings: _Settings, norm: BatchNorm, features: Sequence[Tensor], sizes: torch.Size
) -> Statistics:
    """What the result is normalised by; moves the running statistics where those are trained."""
    if not settings.training:
        assert norm.running_mean is not None and norm.running_var is not None  # checked
        # Copies: a later batch moves the running statistics, which marks nothing as modified.
        mean, var = (x.to(torch.float64, copy=True) for x in (norm.running_mean, norm.running_var))
        return Statistics(mean, var, 0)
    statistics = local_statistics(features, sizes)
    if settings.group is not None:
        statistics = synchronise_statistics(statistics, settings.group)
    mean, var, rows = statistics
    if rows > 0 and mean.numel() > 0:  # else as F.batch_norm, which leaves them alone
        update_running_statistics(norm, mean, var, rows)
    return statistics


def _normalise(
    eps: float,
    features: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    weight, bias = as_parameter(weight, y), as_parameter(bias, y)
    _ops.concat_bn_relu(features, mean.contiguous(), var.contiguous(), weight, bias, eps, y)
    # The kernels write through a pointer, which autograd does not see.
    increment_version(y)


def _backward(ctx: Any, grad_y: Tensor, saved: Sequence[Any]) -> list[Tensor | None]:
    """Gradients of weight, bias and features, where they are needed."""
    _, _, _, needs_weight, needs_bias, *needs_features = ctx.needs_input_grad
    _, _, weight, bias, *features = saved
    needed = [i for i, needs in enumerate(needs_features) if needs]
    grad_weight, grad_bias, grad_features = _gradients(ctx, grad_y, saved, needed)
    gradients: list[Tensor | None] = [None] * len(features)
    for i, grad in zip(needed, grad_features, strict=True):
        gradients[i] = grad.to(features[i].dtype)
    return [
        grad_weight.to(weight.dtype) if needs_weight else None,
        grad_bias.to(bias.dtype) if needs_bias else None,
        *gradients,
    ]


def _gradients(
    ctx: Any, grad_y: Tensor, saved: Sequence[Any], needed: Sequence[int]
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Gradients of weight, of bias, and of ``features[i] for i in needed``."""
    settings: _Settings = ctx.settings
    group = settings.group
    mean, var, weight, bias, *features = saved
    # The correction of synchronised statistics is a second pass, before which nothing is rounded.
    dtype = settings.dtype if group is None else parameter_dtype(settings.dtype)
    grad_y, used = grad_y.to(dtype), _cast(features, dtype)
    mean, var = mean.contiguous(), var.contiguous()
    grad_features = [torch.empty_like(used[i]) for i in needed]
    if grad_y.numel() == 0:
        grad_weight, grad_bias = mean.new_zeros((2, mean.numel()), dtype=parameter_dtype(dtype))
    else:
        weight, bias = as_parameter(weight, grad_y), as_parameter(bias, grad_y)
        batch_statistics = settings.training and group is None
        grad_weight, grad_bias = _ops.concat_bn_relu_backward(
            grad_y, used, mean, var, weight, bias, settings.eps, batch_statistics, needed,
            grad_features,
        )  # fmt: skip
    if group is not None:
        statistics = Statistics(mean, var, ctx.rows)
        sums = grad_weight, grad_bias
        correct_gradients(
            statistics, sums, weight, settings.eps, used, needed, grad_features, group
        )
    return grad_weight, grad_bias, grad_features


@torch.library.register_fake("efficient_densenet::concat_bn_stats")
def _(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    check_one_device(features)
    channels = sum(feature.size(1) for feature in features)
    mean = features[0].new_empty(channels, dtype=torch.float64)
    return mean, torch.empty_like(mean)


@torch.library.register_fake("efficient_densenet::concat_bn_relu_backward")
def _(grad_y: Tensor, features: object, mean: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    check_one_device(grad_y, features, mean, *rest)
    grad_weight = torch.empty_like(mean, dtype=parameter_dtype(grad_y.dtype))
    return grad_weight, torch.empty_like(grad_weight)

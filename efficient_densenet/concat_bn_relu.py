"""``relu(batch_norm(cat(features, 1)))`` that keeps neither the concatenation nor the result.

The operators ``torch.ops.efficient_densenet.concat_bn_*`` (csrc/concat_bn_relu.cpp) do the
arithmetic; this module adds arguments' checks, autograd, autocast and the shared storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import (
    GradientEdge,
    get_gradient_edge,
    increment_version,
    saved_tensors_hooks,
)

from . import _extension  # noqa: F401  registers the operators
from ._arguments import check_arguments
from ._once import check_transforms, differentiable_once
from .batch_norm import BatchNorm, RunningStatistics
from .layout import dense_strides, is_channels_last
from .storage import SharedStorage

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

    Returns:
        ``[N, sum(C_i), *spatial]`` in the memory format that ``torch.cat`` would choose.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is wrong; nothing was changed.
    """
    dtype = check_arguments(
        features, running_mean, running_var, weight, bias, training, momentum, eps, storage
    )
    check_transforms("concat_bn_relu", weight, bias, *features)
    settings = _Settings(dtype, training, float(momentum), float(eps), storage)
    norm = running_mean, running_var, weight, bias
    if not torch.is_grad_enabled():
        # Nothing needs the storage, and threads may share a module that only predicts.
        return _forward(settings._replace(storage=None), *norm, *features).y
    differentiable = any(x is not None and x.requires_grad for x in (weight, bias, *features))
    # Where nothing here wants a gradient, the consumer's weight may, and then the result has to be
    # recomputed: an input that does want one makes autograd keep what that takes.
    anchor = None if differentiable else torch.empty(0, requires_grad=True)
    result: Tensor = _ConcatBNReLU.apply(settings, anchor, *norm, *features)
    y = result if differentiable else result.detach()
    y._origin = _Origin(  # type: ignore[attr-defined]
        get_gradient_edge(result), y._version
    )
    return y


@contextmanager
def recompute_in_backward(y: Tensor) -> Iterator[None]:
    """Within this context, operators that save ``y`` for backward save how to recompute it.

    Args:
        y: the result of :func:`concat_bn_relu`, not overwritten yet.

    Raises:
        TypeError: ``y`` is not a result of :func:`concat_bn_relu`.
        RuntimeError: ``y`` was overwritten before the context was entered or left, so what was
            computed from it is wrong (say, two threads with one storage, device and stream).
    """
    if not torch.is_grad_enabled():
        yield
        return
    origin = getattr(y, "_origin", None)
    if origin is None:
        raise TypeError("y: expected a result of concat_bn_relu that was computed in gradient mode")
    _check_not_overwritten(y)
    memory, start = y.untyped_storage()._cdata, y.storage_offset()
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(tensor: Tensor) -> Any:
        is_result = tensor.untyped_storage()._cdata == memory and tensor._version == origin.version
        if is_result:
            offset = int(tensor.storage_offset() - start)
            return _Recomputed(origin.edge, tensor.size(), tensor.stride(), offset)
        if outer is not None:
            return _PackedOutside(outer[1], outer[0](tensor))
        return _Kept(tensor.detach(), tensor._version)

    with saved_tensors_hooks(pack, lambda packed: packed.unpack()):
        yield
    _check_not_overwritten(y)


def _check_not_overwritten(y: Tensor) -> None:
    origin: _Origin = y._origin  # type: ignore[attr-defined]
    if y._version != origin.version:
        raise RuntimeError(
            "y: overwritten before its consumer was done. One SharedStorage serves one thread per "
            "device and stream; give each thread its own, or its own copy of the model"
        )


class _Origin(NamedTuple):
    """Where a result comes from, as an attribute of the result."""

    edge: GradientEdge  # not the bare node, which would not keep its saved tensors alive
    version: int  # of the memory, once the result was written


class _Recomputed(NamedTuple):
    """In place of a saved result: whose inputs to recompute it from, and which part was saved."""

    edge: GradientEdge
    sizes: torch.Size
    strides: tuple[int, ...]
    offset: int

    def unpack(self) -> Tensor:
        with torch.no_grad():
            node: Any = self.edge.node  # of _ConcatBNReLU
            mean, var, weight, bias, *features = node.saved_tensors
            settings: _Settings = node.settings
            features = _cast(features, settings.dtype)
            y = _allocate(settings, features)
            _normalise(settings, features, mean, var, weight, bias, y)
        return y.as_strided(self.sizes, self.strides, y.storage_offset() + self.offset)


class _Kept(NamedTuple):
    """In place of any other saved tensor: hooks switch off autograd's check, so it is here."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{self.tensor.type()} {list(self.tensor.shape)}] is at "
                f"version {self.tensor._version}; expected version {self.version} instead."
            )
        return self.tensor


class _PackedOutside(NamedTuple):
    """In place of any other saved tensor under the user's own saved-tensor hooks."""

    unpack_hook: Any
    packed: Any

    def unpack(self) -> Tensor:
        tensor: Tensor = self.unpack_hook(self.packed)
        return tensor


class _Settings(NamedTuple):
    dtype: torch.dtype  # of the result; features of another (autocast) are kept as they came
    training: bool
    momentum: float
    eps: float
    storage: SharedStorage | None


class _Forward(NamedTuple):
    y: Tensor
    mean: Tensor
    var: Tensor


class _ConcatBNReLU(torch.autograd.Function):
    """Saves features, weight, bias, mean and var: nothing of the size of the result."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        anchor: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *features: Tensor,
    ) -> Tensor:
        result = _forward(settings, running_mean, running_var, weight, bias, *features)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(result.mean, result.var, weight, bias, *features)
        return result.y

    @staticmethod
    @differentiable_once("concat_bn_relu")
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        no_gradients = (None,) * len(ctx.needs_input_grad)
        if grad_y is None:
            return no_gradients
        _, _, _, _, needs_weight, needs_bias, *needs_features = ctx.needs_input_grad
        mean, var, weight, bias, *features = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(needs_features) if needed]
        used = _cast(features, ctx.settings.dtype)
        grad_features = [torch.empty_like(used[i]) for i in wanted]
        grad_weight, grad_bias = _gradients(
            ctx.settings, grad_y, used, mean, var, weight, bias, wanted, grad_features
        )
        by_feature = dict(zip(wanted, grad_features, strict=True))
        for i, grad in by_feature.items():
            if grad.dtype != features[i].dtype:  # autocast
                by_feature[i] = grad.to(features[i].dtype)
        return (
            *no_gradients[:4],
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(bias.dtype) if needs_bias else None,
            *(by_feature.get(i) for i in range(len(features))),
        )


def _forward(
    settings: _Settings,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *features: Tensor,
) -> _Forward:
    used = _cast(features, settings.dtype)
    # Before the running statistics change: running out of memory must leave them as they were.
    y = _allocate(settings, used)
    if not settings.training:
        assert running_mean is not None and running_var is not None  # checked
        # Copies: a later batch moves the running statistics, which marks nothing as modified.
        mean, var = (x.to(torch.float64, copy=True) for x in (running_mean, running_var))
    elif y.numel() == 0:  # like F.batch_norm, which leaves the running statistics alone
        mean = var = torch.ones(y.size(1), dtype=torch.float64, device=y.device)
    else:
        mean, var = _batch_statistics(settings, used, running_mean, running_var)
    _normalise(settings, used, mean, var, weight, bias, y)
    return _Forward(y, mean, var)


def _cast(features: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The features as the kernels read them; under autocast these are copies that nobody keeps."""
    return [x if x.dtype == dtype else x.to(dtype) for x in features]


def _allocate(settings: _Settings, features: Sequence[Tensor]) -> Tensor:
    first = features[0]
    sizes = [first.size(0), sum(feature.size(1) for feature in features), *first.shape[2:]]
    strides = dense_strides(sizes, all(map(is_channels_last, features)))
    if settings.storage is None:
        return torch.empty_strided(sizes, strides, dtype=first.dtype, device=first.device)
    return settings.storage.allocate(sizes, strides, like=first)


def _batch_statistics(
    settings: _Settings,
    features: Sequence[Tensor],
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> tuple[Tensor, Tensor]:
    mean, var = _ops.concat_bn_stats(features)
    rows = features[0].numel() // features[0].size(1)
    norm = BatchNorm(running_mean, running_var, momentum=settings.momentum)
    RunningStatistics([(0, norm)]).update(mean, var, rows)
    return mean, var


def _normalise(
    settings: _Settings,
    features: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    weight, bias = _as_parameter(weight, y), _as_parameter(bias, y)
    _ops.concat_bn_relu(features, mean, var, weight, bias, settings.eps, y)
    # The kernels write through a pointer, which autograd does not see.
    increment_version(y)


def _gradients(
    settings: _Settings,
    grad_y: Tensor,
    features: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[int],
    grad_features: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Writes ``grad_features``, the gradients of ``features[i] for i in wanted``."""
    if grad_y.numel() == 0:
        zeros = mean.new_zeros((2, mean.numel()), dtype=_parameter_type(grad_y))
        return zeros[0], zeros[1]
    weight, bias = _as_parameter(weight, grad_y), _as_parameter(bias, grad_y)
    grad_weight, grad_bias = _ops.concat_bn_relu_backward(
        grad_y,
        features,
        mean,
        var,
        weight,
        bias,
        settings.eps,
        settings.training,
        wanted,
        grad_features,
    )
    return grad_weight, grad_bias


def _parameter_type(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _as_parameter(per_channel: Tensor | None, features: Tensor) -> Tensor | None:
    """A per-channel tensor as the kernels take it; itself, where it is so already."""
    if per_channel is None:
        return None
    dtype = _parameter_type(features)
    if per_channel.dtype == dtype and per_channel.is_contiguous():
        return per_channel
    return per_channel.to(dtype).contiguous()


@torch.library.register_fake("efficient_densenet::concat_bn_stats")
def _(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    _extension.check_one_device(features)
    channels = sum(feature.size(1) for feature in features)
    mean = features[0].new_empty(channels, dtype=torch.float64)
    return mean, torch.empty_like(mean)


@torch.library.register_fake("efficient_densenet::concat_bn_relu_backward")
def _(grad_y: Tensor, features: object, mean: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    _extension.check_one_device(grad_y, features, mean, rest)
    grad_weight = torch.empty_like(mean, dtype=_parameter_type(grad_y))
    return grad_weight, torch.empty_like(grad_weight)

"""``max_pool(relu(batch_norm(x)))`` in one pass that keeps neither of what is between.

The operators ``torch.ops.efficient_densenet.bn_relu_max_pool*`` (csrc/bn_relu_max_pool.cpp) do the
arithmetic; this module adds arguments' checks, autograd and autocast.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _extension  # noqa: F401  registers the operators
from ._arguments import check_pooling_arguments
from ._once import check_transforms, differentiable_once
from .batch_norm import BatchNorm, RunningStatistics
from .concat_bn_relu import _as_parameter, _parameter_type
from .layout import dense_strides, is_channels_last

_ops = torch.ops.efficient_densenet


@torch.compiler.disable
def bn_relu_max_pool(x: Tensor, norm: BatchNorm) -> Tensor:
    """``F.max_pool2d(F.relu(batch_norm(x, norm)), 3, stride=2, padding=1)`` as one operator.

    Or its relative in 1 or 3 dimensions: what follows the first convolution of a DenseNet for large
    images. For the backward pass it keeps x, per-channel numbers and a byte per element of the
    result. Running statistics are updated once per call, after everything else has succeeded. Once
    differentiable.

    Args:
        x: ``[N, C, *spatial]`` with 1 to 3 spatial dimensions, any strides; float64, float32,
            float16 or bfloat16 (under autocast, all but float64 are cast to its dtype); CPU or
            CUDA.
        norm: over C channels, of the dtype of x, or float32 where that is a 16-bit type.

    Returns:
        ``[N, C, *pooled]``, half of each spatial size, rounded up; channels-last if x is.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is wrong; nothing was changed.
    """
    dtype = check_pooling_arguments(x, norm)
    differentiable = x, norm.weight, norm.bias
    check_transforms("bn_relu_max_pool", *differentiable)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        result: Tensor = _BNReLUMaxPool.apply(norm, dtype, *differentiable)
        return result
    with torch.no_grad():
        return _forward(norm, x.to(dtype), keeps=False).y


class _Forward(NamedTuple):
    y: Tensor
    mean: Tensor
    var: Tensor
    winners: Tensor | None  # which place of its window each element of y comes from


class _BNReLUMaxPool(torch.autograd.Function):
    """Saves x, weight, bias, mean, var and a byte per element of the result."""

    @staticmethod
    def forward(
        ctx: Any,
        norm: BatchNorm,
        dtype: torch.dtype,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        y, mean, var, winners = _forward(norm, x.to(dtype), keeps=True)
        ctx.norm_eps, ctx.norm_training = float(norm.eps), norm.training
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, var, winners)
        return y

    @staticmethod
    @differentiable_once("bn_relu_max_pool")
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 5
        x, weight, bias, mean, var, winners = ctx.saved_tensors
        used = x.to(grad_y.dtype)
        grad_x = torch.empty_like(used)
        if grad_y.numel() == 0:
            numbers = mean.new_zeros((2, mean.numel()), dtype=_parameter_type(used))
        else:
            if grad_y.stride() != winners.stride():
                grad_y = torch.empty_like(winners, dtype=grad_y.dtype).copy_(grad_y)
            numbers = _ops.bn_relu_max_pool_backward(
                grad_y,
                winners,
                used,
                mean,
                var,
                _as_parameter(weight, used),
                _as_parameter(bias, used),
                ctx.norm_eps,
                ctx.norm_training,
                grad_x,
            )
        _, _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            None,
            None,
            grad_x.to(x.dtype) if needs_x else None,
            numbers[0].to(weight.dtype) if needs_weight else None,
            numbers[1].to(bias.dtype) if needs_bias else None,
        )


def _forward(norm: BatchNorm, x: Tensor, keeps: bool) -> _Forward:
    sizes = [*x.shape[:2], *((size + 1) // 2 for size in x.shape[2:])]
    strides = dense_strides(sizes, is_channels_last(x))
    y = x.new_empty_strided(sizes, strides)
    winners = x.new_empty_strided(sizes, strides, dtype=torch.uint8) if keeps else None
    if x.numel() == 0:  # like nn.BatchNorm2d, which counts it and leaves the statistics alone
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        mean = var = x.new_ones(x.size(1), dtype=torch.float64)
        return _Forward(y, mean, var, winners)
    if norm.training:
        mean, var = _ops.concat_bn_stats([x])
    else:
        assert norm.running_mean is not None and norm.running_var is not None  # checked
        mean, var = norm.running_mean.double(), norm.running_var.double()
    weight, bias = _as_parameter(norm.weight, x), _as_parameter(norm.bias, x)
    _ops.bn_relu_max_pool(x, mean, var, weight, bias, float(norm.eps), y, winners)
    if norm.training:  # last, so that an error leaves them as they were
        RunningStatistics([(0, norm)]).update(mean, var, x.numel() // x.size(1))
    return _Forward(y, mean, var, winners)


@torch.library.register_fake("efficient_densenet::bn_relu_max_pool_backward")
def _(grad_y: Tensor, winners: Tensor, x: Tensor, mean: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _extension.check_one_device(grad_y, winners, x, mean, rest)
    grad_weight = torch.empty_like(mean, dtype=_parameter_type(x))
    return grad_weight, torch.empty_like(grad_weight)

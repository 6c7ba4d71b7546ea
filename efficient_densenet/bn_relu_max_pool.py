"""``max_pool(relu(batch_norm(x)))`` in one pass that keeps neither of what is between.

The operators ``torch.ops.efficient_densenet.bn_relu_max_pool*`` (csrc/bn_relu_max_pool.cpp) do the
arithmetic; this module adds arguments' checks, autograd and autocast. Autograd and compilers see
``functional_bn_relu_max_pool`` and its backward, which mutate nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ._extension import check_one_device, implement
from .arguments import check_pooling_arguments
from .batch_norm import (
    BatchNorm,
    RunningUpdates,
    as_parameter,
    norm_without_subclasses,
    parameter_dtype,
)
from .differentiation import check_gradients, check_transforms, raise_second_derivative
from .layout import dense_strides, is_channels_last
from .subclasses import without_subclass

_ops = torch.ops.efficient_densenet


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
        TypeError, ValueError, IndexError, RuntimeError: an argument is wrong; nothing was changed.
    """
    tensors = _tensors_of(x, norm)
    if has_torch_function(tensors):
        result: Tensor = handle_torch_function(bn_relu_max_pool, tensors, x, norm)
        return result
    updates = RunningUpdates()
    y = _run(x, norm, updates)
    updates.move()  # last, so that an error leaves them as they were
    return y


def _tensors_of(x: Tensor, norm: BatchNorm) -> tuple[Tensor | None, ...]:
    return (x, *norm[:4]) if isinstance(norm, BatchNorm) else (x,)


def run_bn_relu_max_pool(x: Tensor, norm: BatchNorm, updates: RunningUpdates) -> Tensor:
    """:func:`bn_relu_max_pool` whose running statistics somebody moves later."""
    tensors = _tensors_of(x, norm)
    if has_torch_function(tensors):
        arguments = x, norm, updates
        result: Tensor = handle_torch_function(run_bn_relu_max_pool, tensors, *arguments)
        return result
    return _run(x, norm, updates)


def _run(x: Tensor, norm: BatchNorm, updates: RunningUpdates) -> Tensor:
    dtype = check_pooling_arguments(x, norm)
    x, norm = without_subclass(x), norm_without_subclasses(norm)
    differentiable = x, norm.weight, norm.bias
    check_transforms("bn_relu_max_pool", *differentiable)
    needs_grad = any(tensor is not None and tensor.requires_grad for tensor in differentiable)
    running = (None, None) if norm.training else (norm.running_mean, norm.running_var)
    y: Tensor
    y, mean, var, _ = _ops.functional_bn_relu_max_pool(
        x.to(dtype), norm.weight, norm.bias, *running, float(norm.eps),
        needs_grad and torch.is_grad_enabled(),
    )  # fmt: skip
    if norm.training:
        rows = x.size(0) * math.prod(x.shape[2:])
        updates.add_norm(norm, mean.detach(), var.detach(), rows)
    return y


# ------------------------------------------------------------------------------------------------
# What runs


class _Forward(NamedTuple):
    y: Tensor
    mean: Tensor
    var: Tensor
    winners: Tensor  # which place of its window each element of y comes from; empty if not kept


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    keeps_winners: bool,
) -> _Forward:
    """Without running statistics, those of the batch."""
    y, mean, var, winners = _allocate(x, keeps_winners)
    if x.numel() == 0:
        return _Forward(y, mean.fill_(1), var.fill_(1), winners)
    if running_mean is None or running_var is None:
        mean, var = _ops.concat_bn_stats([x])
    else:
        mean.copy_(running_mean)
        var.copy_(running_var)
    weight, bias = as_parameter(weight, x), as_parameter(bias, x)
    _ops.bn_relu_max_pool(x, mean, var, weight, bias, eps, y, winners if keeps_winners else None)
    return _Forward(y, mean, var, winners)


def _allocate(x: Tensor, keeps_winners: bool) -> _Forward:
    sizes = [*x.shape[:2], *((size + 1) // 2 for size in x.shape[2:])]
    strides = dense_strides(sizes, is_channels_last(x))
    y = x.new_empty_strided(sizes, strides)
    mean, var = (x.new_empty(x.size(1), dtype=torch.float64) for _ in range(2))
    if not keeps_winners:
        return _Forward(y, mean, var, x.new_empty(0, dtype=torch.uint8))
    winners = x.new_empty_strided(sizes, strides, dtype=torch.uint8)
    return _Forward(y, mean, var, winners)


def _backward(
    grad_y: Tensor,
    winners: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias. Saved-tensor hooks may have changed all strides."""
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        zeros = mean.new_zeros((2, mean.numel()), dtype=parameter_dtype(x.dtype))
        return grad_x, zeros[0], zeros[1].clone()
    strides = dense_strides(grad_y.shape, is_channels_last(x))
    grad_y, winners = (_with_strides(t, strides) for t in (grad_y.to(x.dtype), winners))
    mean, var = mean.contiguous(), var.contiguous()
    weight, bias = as_parameter(weight, x), as_parameter(bias, x)
    grad_weight, grad_bias = _ops.bn_relu_max_pool_backward(
        grad_y, winners, x, mean, var, weight, bias, eps, training, grad_x
    )
    return grad_x, grad_weight, grad_bias


def _with_strides(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    if list(tensor.stride()) == list(strides):
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


# ------------------------------------------------------------------------------------------------
# What autograd and compilers see

torch.library.define(
    "efficient_densenet::functional_bn_relu_max_pool",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "float eps, bool keeps_winners) -> (Tensor y, Tensor mean, Tensor var, Tensor winners)",
)
torch.library.define(
    "efficient_densenet::functional_bn_relu_max_pool_backward",
    "(Tensor grad_y, Tensor winners, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, float eps, bool training) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
)


def _fake(x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _allocate(x, keeps_winners=inputs[-1])


def _fake_backward(
    grad_y: Tensor, winners: Tensor, x: Tensor, weight: object, bias: object, mean: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = torch.empty_like(mean, dtype=parameter_dtype(x.dtype))
    return torch.empty_like(x), grad_weight, torch.empty_like(grad_weight)


implement("functional_bn_relu_max_pool", _forward, _fake)
implement("functional_bn_relu_max_pool_backward", _backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, running_mean, _, ctx.eps, _ = inputs
    _, mean, var, winners = output
    ctx.training = running_mean is None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(winners, x, weight, bias, mean, var)


def _differentiate(ctx: Any, grad_y: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * len(ctx.needs_input_grad)
    check_gradients("bn_relu_max_pool", grad_y)
    saved = ctx.saved_tensors
    gradients = _ops.functional_bn_relu_max_pool_backward(grad_y, *saved, ctx.eps, ctx.training)
    found = zip(gradients, saved[1:4], ctx.needs_input_grad[:3], strict=True)
    cast = [gradient.to(tensor.dtype) if needs else None for gradient, tensor, needs in found]
    return (*cast, *[None] * 4)


def _refuse(ctx: Any, *gradients: object) -> None:
    raise_second_derivative("bn_relu_max_pool")


torch.library.register_autograd(
    "efficient_densenet::functional_bn_relu_max_pool",
    _differentiate,
    setup_context=_setup_context,
)
torch.library.register_autograd("efficient_densenet::functional_bn_relu_max_pool_backward", _refuse)


@torch.library.register_fake("efficient_densenet::bn_relu_max_pool_backward")
def _(grad_y: Tensor, winners: Tensor, x: Tensor, mean: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    check_one_device(grad_y, winners, x, mean, *rest)
    grad_weight = torch.empty_like(mean, dtype=parameter_dtype(x.dtype))
    return grad_weight, torch.empty_like(grad_weight)

"""The dense block as operators that mutate nothing, for ``torch.compile`` and ``torch.export``.

A compiler cannot look into the autograd function of :mod:`efficient_densenet.dense_block`.
Here it is one operator forward and one backward, with shapes for fake tensors and an autograd
formula, so that a graph with a dense block in it has no break. Running statistics are moved by the
operator that moves them everywhere, as one more node of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import computed_dtype
from .batch_norm import BatchNorm, RunningStatistics
from .dense_block import (
    DenseLayer,
    Plan,
    _backward,
    _forward,
    _new_channels_last,
    statistics_begins,
)

_ops = torch.ops.efficient_densenet

# The operands that both operators share. Autograd takes no lists with None in them: weights and
# biases are those of the norms that have some, running statistics those of the frozen norms.
_OPERANDS = (
    "Tensor[] weights, Tensor[] biases, Tensor[] running_means, Tensor[] running_vars, "
    "Tensor[] conv1, Tensor[] conv2, bool[] has_weight, bool[] has_bias, bool[] training, "
    "float[] eps, float drop_rate, bool drops_channels, str recompute"
)
_LISTS = 6  # of tensors
_RUNNING = (2, 3)  # which of the lists want no gradient
torch.library.define(
    "efficient_densenet::functional_dense_block",
    f"(Tensor x, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "efficient_densenet::functional_dense_block_backward",
    f"(Tensor grad, Tensor x, Tensor features, Tensor bottlenecks, Tensor statistics, "
    f"Tensor affine, Tensor frozen, Tensor dropout_mask, bool[] needed, {_OPERANDS}) -> Tensor[]",
)


def is_wanted() -> bool:
    """Whether a graph is made for running here: exported ones are better off with plain modules.

    On torch 2.11 the compiler takes ``torch.compiler.is_exporting()`` for True always.
    """
    return torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag


def dense_block(
    x: Tensor,
    layers: Sequence[DenseLayer],
    drop_rate: float,
    recompute: str,
    drops_channels: bool = False,
) -> Tensor:
    """As ``Plan.run`` without a reader; every step of it can be traced."""
    dtype, given = computed_dtype(x), x.dtype
    norms = [*(layer.norm1 for layer in layers), *(layer.norm2 for layer in layers)]
    outputs = _ops.functional_dense_block(
        x.to(dtype),
        [norm.weight for norm in norms if norm.weight is not None],
        [norm.bias for norm in norms if norm.bias is not None],
        [norm.running_mean for norm in norms if not norm.training],
        [norm.running_var for norm in norms if not norm.training],
        [layer.conv1.to(dtype) for layer in layers],
        [layer.conv2.to(dtype) for layer in layers],
        [norm.weight is not None for norm in norms],
        [norm.bias is not None for norm in norms],
        [norm.training for norm in norms],
        [float(norm.eps) for norm in norms],
        float(drop_rate),
        drops_channels,
        recompute,
    )
    begins = zip(statistics_begins(layers), norms, strict=True)
    trained = [(begin, norm) for begin, norm in begins if norm.training]
    mean, var = outputs[2].detach().unbind(0)
    RunningStatistics(trained).update_traced(mean, var, x.numel() // x.size(1))
    result: Tensor = outputs[0]
    return result.to(torch.promote_types(given, dtype))


def _plan(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    conv1: Sequence[Tensor],
    conv2: Sequence[Tensor],
    has_weight: Sequence[bool],
    has_bias: Sequence[bool],
    training: Sequence[bool],
    eps: Sequence[float],
    drop_rate: float,
    drops_channels: bool,
    recompute: str,
) -> Plan:
    frozen = [not trains for trains in training]
    numbers = zip(
        _spread(running_means, frozen),
        _spread(running_vars, frozen),
        _spread(weights, has_weight),
        _spread(biases, has_bias),
        training,
        eps,
        strict=True,
    )
    norms = [BatchNorm(m, v, w, b, training=t, eps=e) for m, v, w, b, t, e in numbers]
    count = len(conv1)
    layers = zip(norms[:count], conv1, norms[count:], conv2, strict=True)
    tensors = [DenseLayer(*layer) for layer in layers]
    return Plan(x, tensors, drop_rate, recompute, drops_channels=drops_channels)


def _spread(tensors: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    """The tensors at the places where there is one."""
    remaining = iter(tensors)
    return [next(remaining) if here else None for here in present]


@torch.library.impl("efficient_densenet::functional_dense_block", ("cpu", "cuda"))
def _(x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    kept = _forward(_plan(x, *operands), x, keeps=True).kept
    if kept is None:
        raise ValueError("x: expected at least one element")
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in kept)


@torch.library.register_fake("efficient_densenet::functional_dense_block")
def _(x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    _, _, _, _, conv1, conv2, _, _, training, _, drop_rate, _, recompute = operands
    layers, (bottleneck, last), growth = len(conv1), conv1[-1].shape[:2], conv2[0].size(0)
    channels, (n, _, *spatial) = last + growth, x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = n * math.prod(spatial)
    in_norms = [*(conv.size(1) for conv in conv1), *[bottleneck] * layers]
    frozen = sum(c for c, trains in zip(in_norms, training, strict=True) if not trains)
    keeps = recompute == "bottleneck"
    drops = drop_rate > 0
    return (
        _new_channels_last((n, channels, *spatial), x),
        x.new_empty((layers, rows, bottleneck) if keeps else 0),
        x.new_empty((2, channels + layers * bottleneck), dtype=torch.float64),
        x.new_empty((2, sum(in_norms)), dtype=wide),
        x.new_empty((2, frozen), dtype=torch.float64) if frozen else x.new_empty(0),
        x.new_empty((layers, n, *spatial, growth), dtype=torch.bool) if drops else x.new_empty(0),
    )


@torch.library.impl("efficient_densenet::functional_dense_block_backward", ("cpu", "cuda"))
def _(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    kept, needed, operands = rest[:6], rest[6], rest[7:]
    plan = _plan(x, *operands)
    saved = [tensor if tensor.numel() else None for tensor in kept]
    x_needs, remaining = needed[0], iter(needed[1:])
    has_weight, has_bias = operands[_LISTS : _LISTS + 2]
    present = [*has_weight, *has_bias, *[True] * (2 * len(plan.layers))]
    wanted = [x_needs, *(here and next(remaining) for here in present)]
    gradients = _backward(plan, [*saved, *plan.conv1, *plan.conv2], grad, wanted)
    return [
        g.clone() for g in [gradients[0], *gradients[2:]] if g is not None
    ]  # they share memory among them


@torch.library.register_fake("efficient_densenet::functional_dense_block_backward")
def _(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    needed, (weights, biases, _, _, conv1, conv2, *_) = rest[6], rest[7:]
    inputs = [x, *weights, *biases, *conv1, *conv2]
    like = [t for t, needs in zip(inputs, needed, strict=True) if needs]
    return [
        _new_channels_last(t.shape, t) if t is x else torch.empty_like(t).contiguous() for t in like
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *operands = inputs
    lists, ctx.numbers = operands[:_LISTS], operands[_LISTS:]
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.save_for_backward(x, *output, *(tensor for tensors in lists for tensor in tensors))


def _functional_backward(ctx: Any, grad: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    kept, remaining = saved[:6], iter(saved[6:])
    lists = [[next(remaining) for _ in range(length)] for length in ctx.lengths]
    needs_x, *needs = ctx.needs_input_grad
    differentiable = [i for i in range(_LISTS) if i not in _RUNNING]
    needed = [needs_x, *(each for i in differentiable for each in needs[i])]
    gradients = iter(
        _ops.functional_dense_block_backward(grad, x, *kept, needed, *lists, *ctx.numbers)
    )
    found = iter([next(gradients) if each else None for each in needed])
    grad_x = next(found)
    parts: list[list[Tensor | None]] = [
        [None if i in _RUNNING else next(found) for _ in tensors] for i, tensors in enumerate(lists)
    ]
    return grad_x, *parts, *[None] * len(ctx.numbers)


torch.library.register_autograd(
    "efficient_densenet::functional_dense_block",
    _functional_backward,
    setup_context=_setup_context,
)

"""The dense block as operators that mutate nothing: the door for whoever traces.

A compiler cannot look into the autograd function of :mod:`efficient_densenet.dense_block`. Here
the same formulas are one operator forward and one backward. Without data the same functions give
shapes and strides. Running statistics are moved by an operator of their own, one more node of the
graph.

Lists hold no None: weights and biases are those of the norms that have some, running statistics
those of the frozen norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._extension import implement
from .arguments import check_block_arguments
from .batch_norm import BatchNorm
from .block_spec import BlockSpec, count_rows
from .dense_block_formulas import (
    BlockTensors,
    DenseLayer,
    Gradients,
    Needs,
    Saved,
    backward,
    forward,
    input_gradients,
    parameter_layout,
    zero_gradients,
)
from .differentiation import check_gradients, raise_second_derivative

_ops = torch.ops.efficient_densenet

_LISTS = ("weights", "biases", "running_means", "running_vars", "conv1", "conv2")
_FLAGS = (
    "bool[] has_weight, bool[] has_bias, bool[] training, float[] eps, ScalarType dtype, "
    "float drop_rate, bool keeps_bottlenecks, bool has_reader, int pool"
)
torch.library.define(
    "efficient_densenet::dense_block",
    f"(Tensor x, Tensor? projection, Tensor? dropout_mask, "
    f"{', '.join(f'Tensor[] {name}' for name in _LISTS)}, {_FLAGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "efficient_densenet::dense_block_backward",
    "(Tensor grad_result, Tensor features, Tensor bottlenecks, Tensor statistics, Tensor affine, "
    "Tensor frozen, Tensor token, Tensor? dropout_mask, Tensor? x, Tensor? projection, "
    "Tensor[] conv1, Tensor[] conv2, bool[] training, float[] eps, ScalarType dtype, "
    "float drop_rate, bool keeps_bottlenecks, bool has_reader, int pool, int[] x_sizes, "
    "bool needs_x, bool needs_projection, bool[] needs_conv1, bool[] needs_conv2) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_NUM_LISTS = len(_LISTS)
_Flags = tuple[Any, ...]


def operands(
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
        spec.has_reader, spec.pool,
    )  # fmt: skip


def _spec(
    conv1: Sequence[Tensor],
    conv2: Sequence[Tensor],
    projection: Tensor | None,
    training: Sequence[bool],
    eps: Sequence[float],
    dtype: torch.dtype,
    drop_rate: float,
    keeps_bottlenecks: bool,
    has_reader: bool,
    pool: int,
) -> BlockSpec:
    """The block that the operators compute: momenta and the kind of dropout are not theirs."""
    return BlockSpec(
        dtype, [(weight.size(0), weight.size(1)) for weight in conv1], tuple(conv2[0].shape),
        training, eps, [0.0] * len(eps), drop_rate, False, keeps_bottlenecks, has_reader, pool,
        0 if projection is None else projection.size(1),
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
    spec = _spec(conv1, conv2, projection, *flags[2:])
    nones: list[Tensor | None] = [None] * count
    weights, biases, means, variances = columns
    return spec, BlockTensors(
        weights, biases, means, variances, nones, list(conv1), list(conv2), projection
    )


def _recompute(keeps_bottlenecks: bool) -> str:
    return "bottleneck" if keeps_bottlenecks else "features"


def _spread(name: str, tensors: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
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
    result, saved = forward(spec, tensors, x, mask, keeps=True)
    return result, *_filled(x, saved), x.new_empty(0)


def _dense_block_backward_operator(
    grad_result: Tensor,
    features: Tensor,
    bottlenecks: Tensor,
    statistics: Tensor,
    affine: Tensor,
    frozen: Tensor,
    token: Tensor,
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
    numbers = dtype, drop_rate, keeps_bottlenecks, has_reader, pool
    spec = _spec(conv1, conv2, projection, training, eps, *numbers)
    needs = Needs(needs_x, needs_projection, [], list(needs_conv1), list(needs_conv2))
    if count_rows(x_sizes) == 0:
        zeros = zero_gradients(spec, torch.Size(x_sizes), features, conv2, needs)
        return tuple(_filled(features, zeros))
    saved = Saved(features, _given(bottlenecks), statistics, affine, _given(frozen))
    gradients = backward(spec, saved, x, projection, conv1, conv2, mask, grad_result, needs)
    return tuple(_filled(features, gradients))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (x, projection, mask), lists = inputs[:3], inputs[3 : 3 + _NUM_LISTS]
    flags = inputs[3 + _NUM_LISTS :]
    weights, biases, _, _, conv1, conv2 = lists
    ctx.flags, ctx.x_dtype, ctx.x_sizes = flags, x.dtype, x.shape
    ctx.list_sizes = list(map(len, lists))
    nones: list[Tensor | None] = []
    ctx.layout = parameter_layout(
        BlockTensors(list(weights), list(biases), nones, nones, nones, list(conv1), list(conv2))
    )
    result, features, *kept = output
    has_reader = flags[-2]
    # Only the result is differentiated. The token is saved so that a second derivative finds the
    # way to its refusal, as in the eager function.
    ctx.mark_non_differentiable(*output[1:-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        features if has_reader else result, *kept, mask,
        None if projection is None else x, projection, *conv1, *conv2,
    )  # fmt: skip


def _differentiate(ctx: Any, grad_result: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    """The gradients of the operator's inputs."""
    if grad_result is None:
        return (*(None,) * 3, *([None] * n for n in ctx.list_sizes), *(None,) * len(ctx.flags))
    check_gradients("dense_block", grad_result)
    features, *rest = ctx.saved_tensors
    kept, (mask, x, projection), weights = rest[:5], rest[5:8], rest[8:]
    layers = len(weights) // 2
    conv1, conv2 = weights[:layers], weights[layers:]
    has_weight, has_bias, training, eps, *numbers = ctx.flags
    needs_x, needs_projection, _, *needs_lists = ctx.needs_input_grad[: 3 + _NUM_LISTS]
    needs_norms = [
        bool(need)
        for present, needs in ((has_weight, needs_lists[0]), (has_bias, needs_lists[1]))
        for need in _spread("needs", needs, present)
    ]
    needs = Needs(needs_x, bool(needs_projection), needs_norms, *map(list, needs_lists[4:]))
    outputs = _ops.dense_block_backward(
        grad_result, features, *kept, mask, x, projection, conv1, conv2, training, eps, *numbers,
        ctx.x_sizes, needs.x, needs.projection, needs.conv1, needs.conv2,
    )  # fmt: skip
    asked = needs.x, needs.projection, True, any(needs.conv1), any(needs.conv2)
    found: list[Any] = [g if need else None for g, need in zip(outputs, asked, strict=True)]
    gradients = Gradients(*found)
    spec = _spec(conv1, conv2, projection, training, eps, *numbers)
    results = input_gradients(spec, ctx.layout, gradients, needs, ctx.x_dtype, projection)
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
    raise_second_derivative("dense_block")


for _name, _function in (
    ("dense_block", _dense_block_operator),
    ("dense_block_backward", _dense_block_backward_operator),
):
    # Without data the same function gives the shapes and strides: its kernels then do nothing.
    implement(_name, _function, _function)
torch.library.register_autograd(
    "efficient_densenet::dense_block", _differentiate, setup_context=_keep_for_backward
)
torch.library.register_autograd("efficient_densenet::dense_block_backward", _refuse)

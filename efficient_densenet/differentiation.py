"""Differentiable once, backwards: everything else is refused, with what to use instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_INSTEAD = "use plain modules: efficient=False, or efficient_densenet.revert for converted models"
Backward = Callable[..., tuple[Tensor | None, ...]]


def check_transforms(operator: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError under torch.func's transforms and for tensors with a tangent."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{operator}: torch.func's transforms (vmap, grad, jvp) are not supported; {_INSTEAD}"
        )
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise RuntimeError(f"{operator}: forward-mode differentiation is not supported; {_INSTEAD}")


def _has_tangent(tensor: Tensor | None) -> bool:
    if tensor is None:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def differentiable_once(operator: str) -> Callable[[Backward], Backward]:
    """For the backward pass of an autograd function: its results cannot be differentiated."""

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not torch.is_grad_enabled():  # no create_graph
                return results
            anchor = torch.empty(0, requires_grad=True)
            return tuple(
                None if result is None else _Refusal.apply(operator, result, anchor)
                for result in results
            )

        return once

    return decorate


class _Refusal(torch.autograd.Function):
    """The identity; its gradient is an error."""

    @staticmethod
    def forward(ctx: Any, operator: str, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.operator = operator
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"{ctx.operator}: cannot be differentiated twice; {_INSTEAD}")

"""Differentiable once, backwards: everything else is refused, with what to use instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

_INSTEAD = "use plain modules: efficient=False, or efficient_densenet.revert for converted models"


def check_transforms(operator: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError under torch.func's transforms and for tensors with a tangent.

    A compiler traces registered operators instead, which refuse tangents themselves.
    """
    if torch.compiler.is_compiling():
        return
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


def check_gradients(operator: str, *gradients: Tensor | None) -> None:
    """Raises RuntimeError for several gradients at once, as a backward pass gets them."""
    is_batched = torch._C._functorch.is_legacy_batchedtensor  # autograd's own, without torch.func
    if torch._C._are_functorch_transforms_active() or any(
        gradient is not None and is_batched(gradient) for gradient in gradients
    ):
        raise RuntimeError(
            f"{operator}: gradients cannot be batched (is_grads_batched=True, vectorize=True, "
            f"vmap); {_INSTEAD}"
        )


@contextmanager
def backward_pass(operator: str, *gradients: Tensor | None) -> Iterator[None]:
    """For what the backward pass of an autograd function computes, with the gradients that come in.

    Autograd records nothing of it, and subclasses of Tensor among what was saved are read as plain
    tensors, as torch's own backward passes do.
    """
    check_gradients(operator, *gradients)
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        yield


def refuse_second_derivatives(
    operator: str, gradients: Sequence[Tensor | None], *anchors: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients; under ``create_graph`` such that differentiating them is an error.

    Args:
        operator: for the message.
        gradients: the results of a backward pass, computed without a graph.
        anchors: what the gradients depend on: those that came into the backward pass, and the
            operator's inputs as the node has saved them. An input that is not saved has to be
            replaced by a result of the operator that is (an empty one, made for this), whose graph
            is the operator itself. Without a path from the refusal to every input, autograd takes
            the gradients for constants where it is asked for those of named inputs, and answers 0.
    """
    if not torch.is_grad_enabled():  # no create_graph
        return tuple(gradients)
    return tuple(
        None if gradient is None else _Refusal.apply(operator, gradient, *anchors)
        for gradient in gradients
    )


def raise_second_derivative(operator: str) -> NoReturn:
    raise RuntimeError(f"{operator}: cannot be differentiated twice; {_INSTEAD}")


class _Refusal(torch.autograd.Function):
    """The identity; its gradient is an error."""

    @staticmethod
    def forward(ctx: Any, operator: str, gradient: Tensor, *anchors: Tensor | None) -> Tensor:
        ctx.operator = operator
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise_second_derivative(ctx.operator)

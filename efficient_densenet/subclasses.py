"""Subclasses of Tensor: MONAI's and fastai's hold memory, fake and distributed ones may not."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def holds_memory(tensor: Tensor) -> bool:
    """Whether a tensor's class leaves it to torch where its elements are."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def without_subclass(tensor: MaybeTensor) -> MaybeTensor:
    """The same memory as a plain tensor, through which gradients pass.

    Functions behind ``handle_torch_function`` still get the subclass, whose methods may be
    overridden (MONAI's ``new_empty``); the result becomes one again outside of the function.
    """
    if tensor is None or type(tensor) in (Tensor, nn.Parameter) or not holds_memory(tensor):
        return tensor
    return tensor.as_subclass(Tensor)

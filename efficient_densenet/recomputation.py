"""Results that are recomputed in the backward pass, in place of being kept for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks


class Origin(NamedTuple):
    """Where a result comes from, as an attribute of the result."""

    edge: GradientEdge  # not the bare node, which would not keep its saved tensors alive
    version: int  # of the memory, once the result was written


def set_origin(y: Tensor, result: Tensor) -> None:
    """Remembers with ``y`` the node that can recompute it.

    Args:
        y: a result of concat_bn_relu, or the same memory without a gradient.
        result: that result, of an autograd function with a ``recompute(ctx, shares_memory)``.
    """
    y._origin = Origin(get_gradient_edge(result), y._version)  # type: ignore[attr-defined]


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
    with torch._C.DisableTorchFunctionSubclass():
        hook = _PackHook(y)
    with saved_tensors_hooks(hook, lambda packed: packed.unpack()):
        yield
    hook.check_not_overwritten()


class _PackHook:
    """Chooses what to keep in the place of each tensor that an operator saves."""

    def __init__(self, y: Any) -> None:
        # A subclass of Tensor is a view of the result.
        self._result: Any = y if hasattr(y, "_origin") else getattr(y, "_base", None)
        origin = getattr(self._result, "_origin", None)
        if origin is None:
            raise TypeError(
                "y: expected a result of concat_bn_relu that was computed in gradient mode"
            )
        self._origin: Origin = origin
        self._memory = y.untyped_storage()._cdata
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.check_not_overwritten()

    def check_not_overwritten(self) -> None:
        if self._result._version != self._origin.version:
            raise RuntimeError(
                "y: overwritten before its consumer was done. One SharedStorage serves one thread "
                "per device and stream; give each thread its own, or its own copy of the model"
            )

    def __call__(self, tensor: Tensor) -> Any:
        outer = self._outer
        with torch._C.DisableTorchFunctionSubclass():
            if self._is_result(tensor):
                offset = int(tensor.storage_offset() - self._result.storage_offset())
                # What the user's hooks run while the consumer unpacks its other tensors may write
                # to the shared storage: activation checkpointing runs whole forward passes.
                return _Recomputed(
                    self._origin.edge, tensor.size(), tensor.stride(), offset, outer is None
                )
            if outer is None:
                return _Kept(tensor.detach(), tensor._version)
        return _PackedOutside(outer[1], outer[0](tensor))

    def _is_result(self, tensor: Tensor) -> bool:
        return (
            tensor.untyped_storage()._cdata == self._memory
            and tensor._version == self._origin.version
        )


class _Recomputed(NamedTuple):
    """In place of a saved result: the node that recomputes it, and which part was saved."""

    edge: GradientEdge
    sizes: torch.Size
    strides: tuple[int, ...]
    offset: int
    shares_memory: bool

    def unpack(self) -> Tensor:
        node: Any = self.edge.node
        with torch.no_grad():
            y: Tensor = node._forward_cls.recompute(node, self.shares_memory)
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

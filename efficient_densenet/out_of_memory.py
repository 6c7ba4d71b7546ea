"""An out-of-memory error keeps its type on its way through the stable ABI."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of an operator that csrc/aten.cpp called, and of one that the headers of torch.stable call.
_CALL_FAILED = (" failed: ", "API call failed")

# How many requests the caching allocator of each GPU has refused since this was first used.
_refusals: Counter[int] = Counter()


@contextmanager
def out_of_memory_as_torch_raises_it(device: torch.device) -> Iterator[None]:
    """Turns an operator's RuntimeError into torch.OutOfMemoryError where that was its cause.

    The loop over layers calls ATen through the stable ABI, where exceptions lose their type and,
    before torch 2.13, their text. Then it tells that the allocator has refused memory within this
    context; refusals before it belong to other errors.
    """
    if device.type != "cuda":
        yield
        return
    _count_refusals()
    index = torch.cuda.current_device() if device.index is None else device.index
    before = _refusals[index]
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        if _refusals[index] > before and any(text in str(error) for text in _CALL_FAILED):
            raise torch.OutOfMemoryError(_text(error, index)) from None
        raise


@functools.cache
def _count_refusals() -> None:
    """Asks the allocator to report refusals, which costs nothing until there is one.

    Its statistics count them too, but take longer to read than a block takes to launch.
    """
    try:
        torch._C._cuda_attach_out_of_memory_observer(  # type: ignore[attr-defined]
            _count_refusal
        )
    except RuntimeError:
        # Allocators other than torch's own have no observers. Then only the text of an error tells.
        return


def _count_refusal(device: int, *sizes: int) -> None:
    _refusals[device] += 1


def _text(error: RuntimeError, index: int) -> str:
    free, total = torch.cuda.mem_get_info(index)
    allocated, reserved = torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index)
    gib = 2**30
    return (
        f"CUDA out of memory. {error}. GPU {index} has a total capacity of "
        f"{total / gib:.2f} GiB of which {free / gib:.2f} GiB is free; {allocated / gib:.2f} GiB "
        f"is allocated by PyTorch, and {(reserved - allocated) / gib:.2f} GiB is reserved by "
        "PyTorch but unallocated."
    )

"""An out-of-memory error keeps its type on its way through the stable ABI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of an operator that csrc/aten.cpp called, and of one that the headers of torch.stable call.
_CALL_FAILED = (" failed: ", "API call failed")

# How many requests the caching allocator of each device had refused when it was last looked at.
_refused: dict[torch.device, int] = {}


@contextmanager
def out_of_memory_as_torch_raises_it(device: torch.device) -> Iterator[None]:
    """Turns an operator's RuntimeError into torch.OutOfMemoryError where that was its cause.

    The loop over layers calls ATen through the stable ABI, where exceptions lose their type and,
    before torch 2.13, their text; then the allocator's own count of refusals tells.
    """
    try:
        yield
    except RuntimeError as error:
        if device.type != "cuda" or isinstance(error, torch.OutOfMemoryError):
            raise
        refused = torch.cuda.memory_stats(device).get("num_ooms", 0)
        is_new = refused > _refused.get(device, 0)
        _refused[device] = refused
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        if is_new and any(text in str(error) for text in _CALL_FAILED):
            raise torch.OutOfMemoryError(_text(error, device)) from None
        raise


def _text(error: RuntimeError, device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    gib = 2**30
    return (
        f"CUDA out of memory. {error}. GPU {device.index} has a total capacity of "
        f"{total / gib:.2f} GiB of which {free / gib:.2f} GiB is free; {allocated / gib:.2f} GiB "
        f"is allocated by PyTorch, and {(reserved - allocated) / gib:.2f} GiB is reserved by "
        "PyTorch but unallocated."
    )

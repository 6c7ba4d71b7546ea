"""Memory that all results of a dense block share, one after the other."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .subclasses import holds_memory


def _may_be_shared(like: Tensor) -> bool:
    """Not in a CUDA graph, which owns its memory; nor fake or meta tensors, which have none."""
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return holds_memory(like) and like.device.type in ("cpu", "cuda")


class SharedStorage:
    """Memory for the results of :func:`~efficient_densenet.concat_bn_relu`.

    Every result is written over the one before, so a dense block needs the memory of its
    largest result instead of the sum of all (arXiv:1707.06990, "shared memory storage").
    There is one buffer per device and CUDA stream (on the CPU: per thread), so the replicas of
    ``nn.DataParallel`` and work on side streams do not disturb each other. Buffers grow as needed
    and never shrink; :meth:`clear` or the end of the object's life releases them.

    A result that was overwritten cannot be read by mistake: its version counter is that of the
    buffer, so autograd raises its usual ``RuntimeError`` ("modified by an inplace operation").

    While a CUDA graph is captured, results get memory of that capture alone, which no later
    growth or :meth:`clear` can take from the graph. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._cuda_buffers: dict[tuple[torch.device, int], Tensor] = {}
        self._cpu = threading.local()

    def allocate(self, sizes: Sequence[int], strides: Sequence[int], like: Tensor) -> Tensor:
        """A tensor on the buffer, to be overwritten: dtype and device of ``like``, no gradient.

        Args:
            sizes, strides: of the result, in elements; dense.
            like: any tensor of the dtype and device wanted.
        """
        if not _may_be_shared(like):
            return torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device)
        nbytes = math.prod(sizes) * like.element_size()
        buffer = self._buffer(nbytes, like.device)
        with torch.no_grad():
            result = buffer[:nbytes].view(like.dtype)
            # detach: shares the version counter, but is no view that autograd would track.
            return result.as_strided(sizes, strides).detach()

    def clear(self) -> None:
        """Releases all buffers (on the CPU: of all threads). Results on them stay readable."""
        self._cuda_buffers.clear()
        self._cpu = threading.local()

    @property
    def nbytes(self) -> int:
        """Bytes held now, on all CUDA devices and, on the CPU, by the calling thread."""
        buffers = [*self._cuda_buffers.values(), *vars(self._cpu).values()]
        return sum(buffer.numel() for buffer in buffers)

    def _buffer(self, nbytes: int, device: torch.device) -> Tensor:
        buffers: dict[Any, Tensor]
        key: Any
        if device.type == "cpu":
            buffers, key = vars(self._cpu), "buffer"  # of the calling thread
        else:
            stream = torch.cuda.current_stream(device).cuda_stream
            buffers, key = self._cuda_buffers, (device, stream)
        buffer = buffers.get(key)
        if buffer is None or buffer.numel() < nbytes:
            # The old buffer first: where nothing else holds it, its memory can serve the new one.
            buffers.pop(key, None)
            del buffer
            buffers[key] = buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return buffer

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedStorage:
        return SharedStorage()

    def __copy__(self) -> SharedStorage:
        return SharedStorage()

    def __reduce__(self) -> tuple[type[SharedStorage], tuple[()]]:
        return SharedStorage, ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.nbytes} bytes)"

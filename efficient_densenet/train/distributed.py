"""The processes that train together, on one machine or several, and what they tell each other."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from .errors import SharedError, Stopped, UsageError

T = TypeVar("T")
# The watchdog speaks first: it knows what its process was doing, a collective does not.
GRACE = 20.0


@dataclass(frozen=True)
class Process:
    """This process among the ``world_size`` that train together, each with its own device."""

    rank: int  # process 0 prints and writes the files
    world_size: int
    device: torch.device
    # On the CPU, for what the processes agree on beside their devices' work.
    control: dist.ProcessGroup | None = None
    store: Any = None  # by which they met

    @property
    def leads(self) -> bool:
        return self.rank == 0


def rank_from_environment() -> int:
    return int(os.environ.get("RANK", "0"))


def leads_machine() -> bool:
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def choose_device() -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(f"more processes than visible GPUs ({torch.cuda.device_count()})")
    return torch.device("cuda", local_rank)


def join(timeout: float) -> Process:
    """Meet the processes that torchrun started with this one; alone without torchrun."""
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_torchelastic_launched():
        return Process(0, 1, device)
    patience = timedelta(seconds=timeout + GRACE)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=patience))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=patience
        )
    except dist.DistError as error:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        expected = f"expected {world_size} processes within {timeout:g} s"
        raise UsageError(
            f"not all processes came: {expected}: {error}".partition("\n")[0]
        ) from None
    control: Any = dist.new_group(backend="gloo", timeout=patience)
    return Process(rank, world_size, device, control, store)


def leave(process: Process) -> None:
    """Part from the others, when all is done and written."""
    # The run goes first, with DistributedDataParallel and the processes that read images.
    gc.collect()
    if process.control is None:
        return
    # A process that ended while another still reads from it would break the connection. One that
    # was killed meanwhile is no matter any more.
    with suppress(RuntimeError):
        dist.barrier(group=process.control)
    # Destroying the groups may wait for threads that are gone, and what is left of torch's threads
    # can abort the interpreter on its way out ("terminate called without an active exception").
    atexit.register(end_at_once, 0)


def end_at_once(status: int) -> NoReturn:
    """An orderly end would wait for processes that are gone, or that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def reduce(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """Replace ``values`` by their sum, or another reduction, over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values


def synchronise(model: nn.Module) -> None:
    """Give all processes the weights, and the running statistics of batch norm, of process 0."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def gather(value: T, process: Process) -> list[T]:
    """What each process has, for all of them."""
    values: list[Any] = [value] * process.world_size
    if process.control is not None:
        dist.all_gather_object(values, value, group=process.control)
    return values


def share(value: T, process: Process) -> T:
    """What process 0 has, for all of them."""
    values = [value]
    if process.control is not None:
        dist.broadcast_object_list(values, 0, group=process.control)
    return values[0]


def agree(reason: str | None, process: Process) -> None:
    """Refuse in all processes if one of them has a reason to.

    A process that ended alone would leave the others waiting.
    """
    if reason is not None and process.rank:
        reason = f"process {process.rank}: {reason}"
    for first in filter(None, gather(reason, process)):
        raise SharedError(first) if process.store else UsageError(first)


class StopRequests:
    """Signals that ask for an end, which all processes then reach at the same step.

    While :meth:`deferred` holds, SIGTERM and Ctrl-C wait for :meth:`check`; otherwise they end what
    runs at once. A second one does so in any case, if it is no echo of the first: a terminal
    signals every process, and so do those who started them.
    """

    ECHO = 3.0  # seconds

    def __init__(self, process: Process) -> None:
        self.process, self.number = process, 0
        self._since = 0.0
        self._vote: tuple[Tensor, Any] | None = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as nohup and "&" have it
            numbers = numbers[:1]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.number and now - self._since > self.ECHO:
            raise Stopped(number)
        if not self.number:
            self.number, self._since = number, now

    def check(self) -> None:
        """Raise :class:`Stopped` in all processes if one had been asked to stop by the last check.

        Each check asks the others and hears their answers to the one before, which have arrived
        meanwhile: it costs no waiting.
        """
        if self.process.control is None:
            number = self.number
        else:
            number = self._answers()
            asked = torch.tensor([self.number])
            work = dist.all_reduce(
                asked, dist.ReduceOp.MAX, group=self.process.control, async_op=True
            )
            self._vote = asked, work
        if number:
            raise Stopped(number)

    def _answers(self) -> int:
        if self._vote is None:
            return 0
        answer, work = self._vote
        work.wait()
        return int(answer)

"""Which images a process computes in which step, and the loaders that read them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, Subset

from .data import Data, Images, Key
from .distributed import Process
from .errors import UsageError
from .options import Options

Loader = DataLoader[Any]


def seed_of(*numbers: int) -> int:
    """A seed for each tuple of numbers that are 0 or more, unlike that of any other."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


@dataclass(frozen=True)
class StepSize:
    """How an optimizer step divides into the parts that each device computes in turn."""

    processes: int
    parts: int
    part: int  # images of a part on one device

    @property
    def images(self) -> int:
        """Images of a step in all."""
        return self.processes * self.parts * self.part


def step_size(options: Options, processes: int) -> StepSize:
    """As --batch-size or --batch-size-per-device and --accumulate have it.

    Raises:
        UsageError: too few images for every device and part to have one.
    """
    if options.batch_size_per_device is not None:
        return StepSize(processes, options.accumulate, options.batch_size_per_device)
    part = options.batch_size // (processes * options.accumulate)
    if part == 0:
        size = f"{options.flag('batch_size')} {options.batch_size}"
        parts = f" in {options.accumulate} parts each" if options.accumulate > 1 else ""
        raise UsageError(f"{size}: not enough for {processes} processes{parts}")
    return StepSize(processes, options.accumulate, part)


class TrainingBatches(Sampler[list[Key]]):
    """The parts of one process of all steps of an epoch, from any image of it on.

    Each epoch has its own order of the images, which all processes share: a step is the next
    ``size.images`` of it, and a process takes every ``processes``-th of these. All have equally
    many, so that the mean of their gradients is the gradient of the mean; fewer images than
    processes are left out at the end of an epoch.

    Args:
        count: training images.
    """

    def __init__(self, count: int, size: StepSize, rank: int, seed: int) -> None:
        self.count, self.size, self.rank, self.seed = count, size, rank, seed
        self.epoch, self.done = 1, 0
        if self.images_per_epoch == 0:
            raise UsageError(f"{count} training images are too few for {size.processes} processes")

    @property
    def images_per_epoch(self) -> int:
        return self.count - self.count % self.size.processes

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images_per_epoch // self.size.images)

    def start(self, epoch: int, done: int) -> None:
        """Where the next iteration begins: behind the first ``done`` images of an epoch."""
        self.epoch, self.done = epoch, done

    def steps(self) -> Iterator[list[int]]:
        """Numbers of images of the parts of this process, step by step from there on."""
        for begin in range(self.done, self.images_per_epoch, self.size.images):
            own = self._images_of_step(begin) // self.size.processes
            starts = range(0, own, self.size.part)
            yield [min(self.size.part, own - start) for start in starts]

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        begin = self.done
        for parts in self.steps():
            length = self._images_of_step(begin)
            own = order[begin + self.rank : begin + length : self.size.processes]
            begin += length
            for part in parts:
                taken, own = own[:part], own[part:]
                yield [Key(i, seed_of(self.seed, self.epoch, i)) for i in taken]

    def _images_of_step(self, begin: int) -> int:
        return min(self.size.images, self.images_per_epoch - begin)


@dataclass(frozen=True)
class Loaders:
    """Batches of this process; those to evaluate are of its share of the images."""

    train: Loader
    batches: TrainingBatches
    valid: Loader
    test: Loader


def create_loaders(options: Options, data: Data, process: Process) -> Loaders:
    size = step_size(options, process.world_size)
    assert options.seed is not None
    batches = TrainingBatches(len(data.train), size, process.rank, options.seed)
    on_gpu = process.device.type == "cuda"
    workers = options.workers
    if workers is None:
        workers = 4 if on_gpu and not data.in_memory else 0
    common: dict[str, Any] = {
        "num_workers": workers,
        "pin_memory": on_gpu,
        "worker_init_fn": leave_signals_to_main,
        # Their parent is to be this process, and no server that outlives it.
        "multiprocessing_context": "fork" if workers else None,
    }

    def share(images: Images) -> Loader:
        # A DistributedSampler would count some images twice.
        own = range(process.rank, len(images), process.world_size)
        return DataLoader(Subset(images, own), size.part, **common)

    keeps = workers > 0  # from epoch to epoch; those that validate and test would mostly wait
    train = DataLoader(data.train, batch_sampler=batches, persistent_workers=keeps, **common)
    return Loaders(train, batches, share(data.valid), share(data.test))


def leave_signals_to_main(_: int) -> None:
    """For processes that read images: a scheduler signals all, and they have to outlive the save.

    Their parent may still end them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_parent_says, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _end_when_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)

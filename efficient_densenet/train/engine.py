"""The network with all that a step changes: weights, their average, the optimizer, the scaler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .batches import TrainingBatches, seed_of
from .distributed import Process
from .errors import SharedError, one_line
from .evaluation import count
from .model import compile_model, create_model, parameter_groups, prepare_model
from .options import Options
from .recipes import RECIPES, Schedule
from .transforms import create_mix

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SETTINGS = inspect.signature(DistributedDataParallel).parameters
# The first is its name since torch 2.14.
_NAMES = ("forward_sync_buffers", "broadcast_buffers")
_NO_BUFFERS: dict[str, Any] = {next(name for name in _NAMES if name in _SETTINGS): False}


class Engine:
    """Computes optimizer steps; the same in all processes but for the images.

    Args:
        beat: is told what the process does, before it may wait for it.
    """

    def __init__(
        self,
        options: Options,
        num_classes: int,
        batches: TrainingBatches,
        process: Process,
        beat: Callable[[str], None],
    ) -> None:
        self.options, self.process, self.batches, self.beat = options, process, batches, beat
        assert options.seed is not None
        self.seed = options.seed
        torch.manual_seed(self.seed)  # the same weights in all processes
        begins_anew = options.resume is None and options.evaluate is None
        model = create_model(options, num_classes, pretrained=begins_anew)
        self.model = prepare_model(model, options, process.device)
        self.average: AveragedModel | None = None
        if options.ema:
            update = get_ema_multi_avg_fn(options.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.model, multi_avg_fn=update)
        if options.compile is not None:
            compile_model(self.model, options.compile)
        self.replica: nn.Module = self.model
        if dist.is_initialized():
            # Training reads no running statistics: those of process 0 need not be sent each step.
            self.replica = DistributedDataParallel(
                self.model,
                device_ids=[process.device] if process.device.type == "cuda" else None,
                **_NO_BUFFERS,
                gradient_as_bucket_view=True,
            )
        self._create_optimizer()
        self.mix = create_mix(options, num_classes)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)

    def _create_optimizer(self) -> None:
        options, batches = self.options, self.batches
        ratio = batches.size.images / RECIPES[options.recipe].batch_size
        scale = {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[options.scale_lr]
        self.highest_rate: float = options.lr * scale
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, options),
            self.highest_rate,
            momentum=options.momentum,
            nesterov=options.momentum > 0,
            weight_decay=options.weight_decay,
        )
        self.schedule = Schedule(
            options.schedule,
            options.n_epochs,
            batches.steps_per_epoch,
            options.warmup_epochs,
            RECIPES[options.recipe].milestones,
        )
        self.scheduler = LambdaLR(self.optimizer, self.schedule)
        is_scaled = options.amp == "fp16"
        self.scaler = torch.amp.GradScaler(self.process.device.type, enabled=is_scaled)

    def learning_rate(self, step: int) -> float:
        return self.highest_rate * self.schedule(step)

    @property
    def evaluated(self) -> nn.Module:
        """What is validated and tested: the average of the weights, where there is one."""
        model: nn.Module = self.model if self.average is None else self.average.module
        return model

    def autocast(self) -> AbstractContextManager[None]:
        if self.options.amp == "off":
            return nullcontext()
        return torch.autocast(self.process.device.type, AMP[self.options.amp])

    def move(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = (tensor.to(self.process.device, non_blocking=True) for tensor in batch)
        if self.options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def step(self, epoch: int, done: int, batches: Iterator[Any], sizes: list[int]) -> Tensor:
        """One optimizer step; returns what :func:`.evaluation.count` says of its images.

        Args:
            done: images of the epoch before this step.
            batches: the parts of the step are its next.
            sizes: their numbers of images.
        """
        # Dropout and mixup draw what they drew in a run that was never stopped.
        torch.manual_seed(seed_of(self.seed, epoch, done, self.process.rank))
        self.optimizer.zero_grad()
        totals = torch.zeros(3, dtype=torch.float64, device=self.process.device)
        where = f"of epoch {epoch} after {done} of its images"
        for i, size in enumerate(sizes):
            self.beat(f"reading images {where}")
            images, labels = self.move(next(batches))
            self.beat(f"computing the loss {where}")
            is_last = i + 1 == len(sizes)
            with nullcontext() if is_last else self._without_exchange():
                totals += self._part(images, labels, size / sum(sizes))
        if self.options.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.scheduler.step()
        return totals

    def _part(self, images: Tensor, labels: Tensor, share: float) -> Tensor:
        """Add the gradient of a part of a step, which is that share of it."""
        mixed, targets = images, labels
        if self.mix is not None:
            mixed, targets = self.mix(images, labels)
        with self.autocast():
            logits = self.replica(mixed)
            loss = self.criterion(logits, targets)
        self.beat("computing gradients")
        self.scaler.scale(loss * share).backward()
        return count(logits, labels, loss)

    def _without_exchange(self) -> AbstractContextManager[None]:
        if isinstance(self.replica, DistributedDataParallel):
            return self.replica.no_sync()
        return nullcontext()

    def try_out(self, batch: Any) -> None:
        """Refuse a network that cannot take images of this size.

        Raises:
            SharedError: it raises an error of its own; the same in all processes.
        """
        self.model.eval()
        images, _ = self.move(batch)
        try:
            with torch.no_grad():
                self.model(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            height, width = images.shape[2:]
            reason = f"cannot take images of {height} x {width}: {one_line(error)}"
            raise SharedError(f"--model {self.options.model}: {reason}") from error

    def settle(self, batch: Any) -> None:
        """Have DistributedDataParallel arrange its buckets, which it does after its first step.

        The order in which gradients add up over three processes or more depends on them: the first
        step of a resumed run has to have those of the second step of any run.
        """
        if not isinstance(self.replica, DistributedDataParallel):
            return
        state = copy.deepcopy(self.model.state_dict())
        self.replica.train()  # type: ignore[no-untyped-call]
        images, labels = self.move(batch)
        with self.autocast():
            loss = self.criterion(self.replica(images), labels)
        loss.backward()
        self.optimizer.zero_grad()
        self.model.load_state_dict(state)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": {} if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any], step: int) -> None:
        """Go on from ``step``, counted in the steps of this run's schedule."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
            self.average.n_averaged.fill_(step)
        # The rest of the optimizer and of the scheduler follows from the options: --epochs may be
        # another one, and then so are the milestones.
        own = self.optimizer.state_dict()["param_groups"]
        own = [group | {"lr": self.highest_rate} for group in own]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own})
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.scheduler = LambdaLR(self.optimizer, self.schedule, last_epoch=step - 1)

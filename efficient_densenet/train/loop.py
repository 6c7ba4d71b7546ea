"""A training run: its epochs, its checkpoints and its end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint
from .batches import Loader, create_loaders
from .checkpoint import LastCheckpoints
from .data import Data
from .distributed import Process, StopRequests, gather, reduce, share
from .engine import Engine
from .errors import RunFailed, Stopped
from .evaluation import Evaluation, evaluate
from .failure import Watchdog
from .options import BEST, LAST, Options
from .report import Progress, Report, Row, describe_peak, final_table, peak_memory_mb


class Run:
    """A training run in one process. Losses are means over images, errors are in ``[0, 1]``.

    Attributes:
        history: a row of results.csv for each epoch that is done.
        images: how many images of the next epoch are done, over all processes.
        totals: sums over this process's share of them, see :func:`.evaluation.count`.
        seconds: that they took.
    """

    def __init__(
        self, options: Options, data: Data, process: Process, watchdog: Watchdog | None = None
    ) -> None:
        self.options, self.data, self.process = options, data, process
        self.folder = Path(options.save)
        # Not a method of the run: in a cycle of references, the readers of images end late.
        self._beat = _no_beat if watchdog is None else watchdog.beat
        self.loaders = create_loaders(options, data, process)
        self.batches = self.loaders.batches
        self.engine = Engine(options, len(data.classes), self.batches, process, self._beat)
        self.stop_requests = StopRequests(process)
        self.history: list[Row] = []
        self.images, self.seconds = 0, 0.0
        self.totals = self._no_totals()
        self.last = LastCheckpoints(self.folder, options.keep, None)
        # The files of an earlier run are kept until there is something better, which is after the
        # first epoch.
        self.spares_files = share((self.folder / LAST).exists(), process)
        self.report = Report(options, 0)

    def _no_totals(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64, device=self.process.device)

    @property
    def best_error(self) -> float:
        return min((row["valid_error"] for row in self.history), default=float("inf"))

    @property
    def step(self) -> int:
        """Optimizer steps of the schedule that are done."""
        in_epoch = -(-self.images // self.batches.size.images)
        return len(self.history) * self.batches.steps_per_epoch + in_epoch

    # --------------------------------------------------------------------------------------------
    # Training

    def train(self) -> None:
        """Train until ``--epochs`` are done.

        Raises:
            Stopped: a signal asked for it; a checkpoint has been written.
        """
        with self.stop_requests.deferred():
            images = _first_images(self.data)
            self.engine.try_out(images)
            self.engine.settle(images)
            if self.last.step is None:
                self.save_last()  # for a run that is stopped before it writes another
            try:
                while len(self.history) < self.options.n_epochs:
                    self._epoch()
            except Stopped:
                self.save_last()
                raise

    def _epoch(self) -> None:
        epoch = len(self.history) + 1
        row = {"epoch": epoch, **self._train_epoch(epoch)}
        if not row["train_loss"] < float("inf"):
            lr = f"{self.options.flag('lr')} {self.options.lr:g}"
            loss = f"the training loss of epoch {epoch} is {row['train_loss']}"
            raise RunFailed(f"{loss}: {lr} may be too high")
        valid = self.evaluate(self.loaders.valid, "validating")
        row |= {"valid_loss": valid.loss, "valid_error": valid.error}
        row["valid_top5_error"] = valid.top5_error
        is_best = valid.error < self.best_error
        self.history.append(row)
        self.images, self.seconds, self.totals = 0, 0.0, self._no_totals()
        self.spares_files = False
        if self.process.leads and is_best:
            self._write_best()
        self.save_last()
        if self.process.leads:
            self.report.epoch(self.history, self.step)
            self.report.line(self._describe(row, is_best))

    def _train_epoch(self, epoch: int) -> Row:
        batches, total = self.batches, self.batches.images_per_epoch
        batches.start(epoch, self.images)
        title = f"epoch {epoch}/{self.options.n_epochs}"
        report = self.report if self.process.leads else None
        start, before = time.perf_counter(), self.seconds
        with Progress(title, total, self.images, report) as progress:
            reader = iter(self.loaders.train) if self.images < total else iter(())
            self.engine.replica.train()
            for sizes in batches.steps():
                self.totals += self.engine.step(epoch, self.images, reader, sizes)
                images = sum(sizes) * self.process.world_size
                self.images += images
                self.seconds = before + time.perf_counter() - start
                progress.advance(images)
                if progress.is_due:
                    progress.show(self._status())
                if self.options.save_every and self.step % self.options.save_every == 0:
                    self.save_last()
                self.stop_requests.check()
        sum_loss, wrong, seen = reduce(self.totals.clone()).tolist()
        device = self.process.device
        peak = torch.tensor(peak_memory_mb(device), dtype=torch.float64, device=device)
        return {
            "train_loss": sum_loss / seen,
            "train_error": wrong / seen,
            "learning_rate": self.engine.learning_rate((epoch - 1) * batches.steps_per_epoch),
            "seconds": self.seconds,  # without validation
            "images_per_second": seen / max(self.seconds, 1e-9),
            "peak_memory_mb": reduce(peak, dist.ReduceOp.MAX).item(),
        }

    def _status(self) -> str:
        sum_loss, wrong, seen = self.totals.tolist()
        peak = describe_peak(peak_memory_mb(self.process.device), self.process.device)
        return f"loss {sum_loss / seen:.3f}, error {wrong / seen:.1%}, {peak}"

    def _describe(self, row: Row, is_best: bool) -> str:
        return (
            f"epoch {row['epoch']}/{self.options.n_epochs}: "
            f"train loss {row['train_loss']:.4f} error {row['train_error']:.2%}, "
            f"valid loss {row['valid_loss']:.4f} error {row['valid_error']:.2%}, "
            f"{row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s, "
            f"{describe_peak(row['peak_memory_mb'], self.process.device)}"
            f"{', best so far' if is_best else ''}"
        )

    # --------------------------------------------------------------------------------------------
    # Evaluation

    def evaluate(self, loader: Loader, doing: str) -> Evaluation:
        def before_batch() -> None:
            self._beat(doing)
            self.stop_requests.check()

        return evaluate(self.engine, loader, len(self.data.classes), self.process, before_batch)

    def test(self) -> None:
        """Evaluate the best checkpoint on the test images."""
        epoch = 0
        if self.process.leads:
            best = checkpoint.load(self.folder / BEST)
            self.engine.evaluated.load_state_dict(best["model"])
            epoch = best["epoch"]
        with self.stop_requests.deferred():  # begins by sending the weights to the others
            result = self.evaluate(self.loaders.test, "testing")
        if not self.process.leads:
            return
        values = {"test_error": result.error, "test_top5_error": result.top5_error}
        self.report.table(self.history, values)
        self.report.scalars(values, self.step)
        self.report.confusion(result.confusion, list(self.data.classes))
        if self.report.says("table"):
            self.report.line(self._final_table(result, epoch))
        error = f"test error {result.error:.2%}, test accuracy {1 - result.error:.2%}"
        self.report.line(f"epoch {epoch}: {error}")
        self.report.close()

    def _final_table(self, test: Evaluation, epoch: int) -> str:
        row = self.history[epoch - 1]
        valid = Evaluation(
            len(self.data.valid), row["valid_loss"], row["valid_error"], row["valid_top5_error"],
            test.confusion,
        )  # fmt: skip
        parameters = sum(parameter.numel() for parameter in self.engine.model.parameters())
        seconds = sum(row["seconds"] for row in self.history)
        speed = max(row["images_per_second"] for row in self.history)
        peak = max(row["peak_memory_mb"] for row in self.history)
        facts = [
            f"epoch {epoch} of {len(self.history)}, the best on the validation images",
            f"{parameters:,} parameters, {seconds:.0f} s of training, up to {speed:.0f} images/s, "
            f"{describe_peak(peak, self.process.device)}",
        ]
        return final_table({"validation": valid, "test": test}, facts)

    # --------------------------------------------------------------------------------------------
    # Checkpoints

    def save_last(self) -> None:
        """Write last.pt, with what all processes have; all have to call this."""
        if self.spares_files:
            return
        self._beat("saving a checkpoint")
        totals = gather(self.totals.cpu(), self.process)
        if self.process.leads:
            self._write_last(totals)

    def _write_last(self, totals: list[Tensor]) -> None:
        if not self.history and self.last.step is None:
            checkpoint.discard_older(self.folder)
        self.last.save(
            {
                **self.engine.state(),
                "arguments": vars(self.options),
                "epoch": len(self.history),
                "best_error": self.best_error,
                "history": self.history,
                "step": self.step,
                "images": self.images,
                "totals": [value.cpu() for value in totals],
                "seconds": self.seconds,
                "processes": self.process.world_size,
            }
        )

    def _write_best(self) -> None:
        best: dict[str, Any] = {"model": self.engine.evaluated.state_dict()}
        best |= {"arguments": vars(self.options), "epoch": len(self.history)}
        best["valid_error"] = self.best_error
        checkpoint.save(self.folder / BEST, best)

    def restore(self, last: dict[str, Any]) -> None:
        """Go on from what :meth:`save_last` wrote, in as many processes or another number."""
        self.history, self.images = last["history"], last["images"]
        self.images = min(self.images, self.batches.images_per_epoch)
        self.seconds = last["seconds"]
        totals = last["totals"]
        if len(totals) != self.process.world_size:
            totals = [sum(totals)] + [torch.zeros_like(totals[0])] * (self.process.world_size - 1)
        self.totals = totals[self.process.rank].to(self.process.device)
        self.engine.load(last, self.step)
        self.spares_files = False
        continues = share(self._continues_own(), self.process)
        self.last.step = last["step"] if continues else None
        self.report.first_step = self.step

    def _continues_own(self) -> bool:
        path = checkpoint.resumed_path(self.options)
        return path is not None and path.resolve() == (self.folder / LAST).resolve()


def _no_beat(doing: str) -> None:
    """Nobody watches."""


def _first_images(data: Data) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(data.train[i % len(data.train)] for i in range(2)), strict=True)
    return torch.stack(images), torch.tensor(labels)

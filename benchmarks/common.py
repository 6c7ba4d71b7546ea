"""What the benchmarks share: networks, the train step, its memory, processes, a result's origin."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efficient_densenet
from checkpointed import checkpointed_densenet
from efficient_densenet import DenseNet, SharedStorage

RESULTS = Path(__file__).parent / "results"

# Each takes the settings of `DenseNet`. The same seed gives all of them the same weights.
DENSENETS: dict[str, Callable[..., nn.Module]] = {
    "plain": functools.partial(DenseNet, efficient=False),
    "checkpoint": checkpointed_densenet,
    "ours": functools.partial(DenseNet, efficient=True, recompute="bottleneck"),
    "ours-features": functools.partial(DenseNet, efficient=True, recompute="features"),
}


class TrainStep:
    """Forward, cross entropy, backward, SGD with momentum, gradients to None; returns the logits.

    With `autocast`, forward and loss run under autocast to that dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        target: Tensor,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.images, self.target, self.autocast = model, images, target, autocast
        # Slow enough that a hundred steps on one batch stay finite in float16.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def forward(self) -> Tensor:
        device = self.images.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            return self.model(self.images)

    def __call__(self) -> Tensor:
        logits = self.forward()
        # Autocast would take the cross entropy in float32.
        F.cross_entropy(logits.float() if self.autocast else logits, self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return logits.detach()


def peak_activation_bytes(step: TrainStep) -> int:
    """Peak CUDA memory of one step above what is allocated before it.

    Before it there are the parameters, the optimizer's state, the inputs and the workspaces of
    cuBLAS, if the step has run already. Gradients are None, so they are part of the result, and so
    is shared storage that a model would keep between steps.
    """
    for module in step.model.modules():
        for attribute in vars(module).values():
            if isinstance(attribute, SharedStorage):
                attribute.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class ProcessFailed(Exception):
    """A script ended with an error; the message is its exit status and last line."""


def in_process(script: str, job: Any) -> dict[str, Any]:
    """What `script --job` prints as its last line, run in a new process; `job` is a dataclass."""
    command = [sys.executable, script, "--job", json.dumps(dataclasses.asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = ["", *done.stderr.split("\n")]
        reason = next((line for line in reversed(last) if line.strip()), "no output")
        raise ProcessFailed(f"exit status {done.returncode}: {reason[:160]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device copy of 2 GB."""
    from triton.testing import do_bench  # comes with torch builds for CUDA only

    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    ms = do_bench(lambda: target.copy_(source), warmup=10, rep=60, return_mode="median")
    return 2 * source.nbytes / (ms / 1e3)


def relative_error(value: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return ((value.double() - exact).norm() / exact.norm()).item()


def set_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def gigabytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e9:.3f}"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """Columns are padded, so that it reads well as plain text, too."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def positive(text: str) -> int:
    """For the command line."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def origin(device: str, command: str) -> dict[str, str | int | None]:
    """What a result was measured on and with."""
    on_gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "build": str(efficient_densenet.build_info()),
        # A copy of the tree has no history: who makes it names the commit.
        "commit": os.environ.get("EFFICIENT_DENSENET_COMMIT")
        or _output("git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"),
        "command": command,
    }


def origin_lines(origin: dict[str, str | int | None]) -> str:
    versions = ", ".join(
        f"{name} {origin[name]}" for name in ("driver", "torch", "cuda", "cudnn") if origin[name]
    )
    return (
        f"- {origin['device']}, {versions}\n"
        f"- efficient_densenet {origin['build']}, commit {origin['commit'] or 'unknown'}\n"
        f"- `{origin['command']}`\n"
    )


def _output(*command: str) -> str | None:
    """First line that a program prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0].strip()

"""What the benchmarks share: networks, steps, their memory, where results come from and go."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

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


@dataclasses.dataclass(frozen=True)
class Network:
    """Settings of `DenseNet`, and the size of its images."""

    growth_rate: int
    block_config: tuple[int, ...]
    num_init_features: int
    small_inputs: bool = False
    spatial_dims: int = 2

    @property
    def settings(self) -> dict:
        return {**dataclasses.asdict(self), "num_classes": self.num_classes}

    @property
    def num_classes(self) -> int:
        return 10 if self.small_inputs else 1000

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of an image."""
        return (
            {2: 32 if self.small_inputs else 224, 3: 96}[self.spatial_dims],
        ) * self.spatial_dims


NETWORKS = {
    "bc40": Network(12, (6, 6, 6), 24, small_inputs=True),  # for a CPU
    "bc100": Network(12, (16, 16, 16), 24, small_inputs=True),
    "bc190": Network(40, (31, 31, 31), 80, small_inputs=True),
    "densenet121": Network(32, (6, 12, 24, 16), 64),
    "densenet201": Network(32, (6, 12, 48, 32), 64),
    "densenet264": Network(48, (6, 12, 64, 48), 96),
    "densenet121-3d": Network(32, (6, 12, 24, 16), 64, spatial_dims=3),  # 96^3 voxels
}


@dataclasses.dataclass(frozen=True)
class Precision:
    """How a step computes, and how far its logits may be from those of plain.

    The tolerance is a few times what rounding does to plain: with batches of random images, the
    relative L2 error is up to 4e-3 in float16 and 3e-2 in bfloat16. A ReLU left out gives 6e-2 to
    1.4e-1, so bfloat16 shows gross mistakes only; the tests are what is exact.
    """

    tolerance: float
    tf32: bool = False
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    memory_format: torch.memory_format = torch.channels_last

    def format_of(self, images: Tensor) -> torch.memory_format:
        """`memory_format` for as many dimensions as the images have."""
        is_3d = images.dim() == 5 and self.memory_format == torch.channels_last
        return torch.channels_last_3d if is_3d else self.memory_format


PRECISIONS = {
    "fp32": Precision(1e-3, memory_format=torch.contiguous_format),
    "tf32": Precision(2e-2, tf32=True, memory_format=torch.contiguous_format),
    "bf16": Precision(1e-1, dtype=torch.bfloat16),
    "fp16": Precision(2e-2, dtype=torch.float16),
    "bf16-autocast": Precision(1e-1, autocast=torch.bfloat16),
    "fp16-autocast": Precision(2e-2, autocast=torch.float16),
}


class Forward:
    """Forward, without gradients; returns the logits.

    With `autocast`, forward runs under autocast to that dtype.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, autocast: torch.dtype | None = None
    ) -> None:
        self.model, self.images, self.autocast = model, images, autocast

    def forward(self) -> Tensor:
        device = self.images.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            return self.model(self.images)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.forward()


class TrainStep(Forward):
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
        super().__init__(model, images, autocast)
        self.target = target
        # Slow enough that a hundred steps on one batch stay finite in float16.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self) -> Tensor:
        logits = self.forward()
        # Autocast would take the cross entropy in float32.
        F.cross_entropy(logits.float() if self.autocast else logits, self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return logits.detach()


def peak_activation_bytes(step: Forward) -> int:
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


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """Columns are padded, so that it reads well as plain text, too."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def describing_parser(doc: str) -> argparse.ArgumentParser:
    """Described by the docstring of its script."""
    description, _, details = doc.partition("\n\n")
    return argparse.ArgumentParser(
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def check_plot_or_gpu(
    parser: argparse.ArgumentParser, options: argparse.Namespace, advice: str
) -> None:
    """For scripts with `--plot`: that its file exists, or else that there is the GPU to run on."""
    if options.plot and not options.plot.is_file():
        parser.error(f"--plot: no file {options.plot}")
    if not options.plot and options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch sees no GPU; {advice}")


def positive(text: str) -> int:
    """For the command line."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def digest_of_kernels() -> str:
    """Of what the kernels and the loops over layers do: their sources without comments."""
    digest = hashlib.sha256()
    for folder in ("cuda", "dense_block"):
        for path in sorted((RESULTS.parents[1] / "csrc" / folder).rglob("*.*")):
            code = re.sub(r"//.*", "", path.read_text())
            digest.update(" ".join([path.name, *code.split()]).encode())
    return digest.hexdigest()[:16]


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
        "kernels": digest_of_kernels(),
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


def write(stem: Path, text: str, content: dict) -> None:
    """STEM.md and STEM.json"""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def write_plot(draw: Callable[[dict, Path], None], content: dict, stem: Path) -> None:
    """STEM.png; without matplotlib, a line that says how to get it."""
    try:
        draw(content, stem.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"no PNG: {error}; --plot {stem.with_suffix('.json')} draws it later")


def _output(*command: str) -> str | None:
    """First line that a program prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0].strip()

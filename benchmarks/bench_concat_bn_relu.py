"""Benchmarks concat_bn_relu on a GPU: correctness, kernels, the operator, and a whole network.

    python benchmarks/bench_concat_bn_relu.py

Prints, after the machine and the versions:
  1. the error against float64 beside that of plain torch, for every problem that is timed;
  2. per kernel: time, bytes it has to move, and those over the time as a share of the bandwidth
     that a copy reaches on this machine;
  3. forward and backward as a user calls them, against cat + batch norm + ReLU and against
     checkpointing: time and peak memory above the inputs;
  4. DenseNet-BC-100 (k=12) at batch 64, as in the table of the technical report (arXiv:1707.06990):
     peak memory and time per mini-batch.

Times are medians of CUDA-event times with a cold L2 cache (triton.testing.do_bench): of kernels
replayed from a CUDA graph, which leaves the launches from Python out, and of the operator launched
from Python. Those of the network are medians of 20 steps launched from Python.
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.testing import do_bench

import efficient_densenet
from checkpointed import checkpointed_densenet
from common import copy_bandwidth, relative_error
from efficient_densenet import DenseNet, SharedStorage, concat_bn_relu

OPS = torch.ops.efficient_densenet


@dataclasses.dataclass(frozen=True)
class Problem:
    name: str
    channels: tuple[int, ...]
    size: int
    dtype: torch.dtype
    memory_format: torch.memory_format
    batch: int = 64

    def features(self) -> list[Tensor]:
        """Leaves that want a gradient."""
        return [
            torch.randn(self.batch, c, self.size, self.size, device="cuda", dtype=self.dtype)
            .contiguous(memory_format=self.memory_format)
            .requires_grad_()
            for c in self.channels
        ]

    def __str__(self) -> str:
        layout = "nhwc" if self.memory_format == torch.channels_last else "nchw"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} C={sum(self.channels)} {self.size}x{self.size} {dtype} {layout}"


SHAPES = {
    "BC-100 block 1 layer 9": ((24, *[12] * 8), 32),
    "121 block 1 layer 6": ((64, *[32] * 5), 56),
    "121 block 3 layer 13": ((256, *[32] * 12), 14),
}
PROBLEMS = [
    Problem(name, channels, size, dtype, memory_format)
    for name, (channels, size) in SHAPES.items()
    for dtype, memory_format in (
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.channels_last),
    )
]


def median_ms(function: Callable[[], object]) -> float:
    return do_bench(function, warmup=10, rep=60, return_mode="median")


def plain(features: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(torch.cat(features, 1), None, None, weight, bias, training=True))


def parameters(problem: Problem) -> tuple[Tensor, Tensor]:
    channels = sum(problem.channels)
    weight = torch.rand(channels, device="cuda") + 0.5
    return weight.requires_grad_(), torch.randn(channels, device="cuda").requires_grad_()


def check(problem: Problem) -> None:
    """Forward and backward by the error rule; raises where they break it."""
    features, affine = problem.features(), parameters(problem)
    grad_y = torch.randn_like(plain(features, *affine))

    def run(operator, convert):
        inputs = [convert(x).detach().requires_grad_() for x in (*features, *affine)]
        y = operator(inputs[:-2], *inputs[-2:])
        return [y.detach(), *torch.autograd.grad(y, inputs, convert(grad_y))]

    def ours(features, weight, bias):
        return concat_bn_relu(features, None, None, weight, bias, training=True)

    exact = run(plain, lambda x: x.double())
    found = [
        max(
            relative_error(value, e)
            for value, e in zip(run(operator, lambda x: x), exact, strict=True)
        )
        for operator in (ours, plain)
    ]
    limit = 2 * found[1] + 4 * torch.finfo(problem.dtype).eps
    print(f"{str(problem):52} largest error {found[0]:.2e}, plain torch {found[1]:.2e}")
    if not found[0] <= limit:
        sys.exit(f"error {found[0]} is over the limit {limit}: nothing is timed")


def bench_kernels(problem: Problem, bandwidth: float) -> None:
    features = [x.detach() for x in problem.features()]
    weight, bias = (x.detach() for x in parameters(problem))
    mean, var = OPS.concat_bn_stats(features)
    y = torch.cat(features, 1)
    grad_features = [torch.empty_like(x) for x in features]
    wanted = list(range(len(features)))
    calls = {  # passes over a tensor of the size of the result
        "statistics": (1, lambda: OPS.concat_bn_stats(features)),
        "normalise": (2, lambda: OPS.concat_bn_relu(features, mean, var, weight, bias, 1e-5, y)),
        "backward": (
            5,
            lambda: OPS.concat_bn_relu_backward(
                y, features, mean, var, weight, bias, 1e-5, True, wanted, grad_features
            ),
        ),
    }
    for name, (passes, call) in calls.items():
        call()  # outside of the graph: lazy initialisation
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        ms = median_ms(graph.replay)
        nbytes = passes * y.nbytes
        share = nbytes / (ms / 1e3) / bandwidth
        print(
            f"{str(problem):52} {name:11} {ms * 1e3:8.1f} us {nbytes / 1e6:8.1f} MB "
            f"{nbytes / ms / 1e6:7.0f} GB/s {share:6.0%} of copy"
        )


def bench_operator(problem: Problem) -> None:
    features, (weight, bias) = problem.features(), parameters(problem)
    storage = SharedStorage()
    forwards = {
        "ours": lambda: concat_bn_relu(
            features, None, None, weight, bias, training=True, storage=storage
        ),
        "plain": lambda: plain(features, weight, bias),
        "checkpoint": lambda: checkpoint(
            lambda *xs: plain(list(xs), weight, bias), *features, use_reentrant=False
        ),
    }
    grad_y = torch.randn_like(forwards["plain"]())
    inputs = [*features, weight, bias]
    for name, forward in forwards.items():

        def step(forward=forward):
            torch.autograd.grad(forward(), inputs, grad_y)

        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before + storage.nbytes * (name == "ours")
        print(
            f"{str(problem):52} {name:11} forward {median_ms(forward):7.3f} ms, with backward "
            f"{median_ms(step):7.3f} ms, peak {peak / 1e6:7.1f} MB"
        )
        if name == "ours":
            storage.clear()


def bench_network(name: str, model: torch.nn.Module, batch: int = 64) -> None:
    model = model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    x = torch.randn(batch, 3, 32, 32, device="cuda")
    target = torch.randint(10, (batch,), device="cuda")
    seconds = []
    for step in range(30):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if step == 9:  # cuDNN has chosen its algorithms
            torch.cuda.reset_peak_memory_stats()
    seconds = seconds[10:]
    print(
        f"{name:12} {torch.cuda.max_memory_allocated() / 1e9:6.3f} GB "
        f"{statistics.median(seconds):7.4f} s ({min(seconds):.4f} to {max(seconds):.4f})"
    )


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench_concat_bn_relu.py: needs a GPU")
    torch.manual_seed(0)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    bandwidth = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {commit or 'unknown'}"
    )
    print(f"efficient_densenet {efficient_densenet.build_info()}")
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s (bytes read and written)")

    print("\n1. Correctness")
    for problem in PROBLEMS:  # few elements: rounding decides no sign where the ReLU bends
        check(dataclasses.replace(problem, batch=2))
    print("\n2. Kernels")
    for problem in PROBLEMS:
        bench_kernels(problem, bandwidth)
    print("\n3. The operator")
    for problem in PROBLEMS:
        bench_operator(problem)
    torch.cuda.empty_cache()
    for precision, tf32 in (("fp32", False), ("tf32", True)):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        print(f"\n4. DenseNet-BC-100 k=12, 32x32, batch 64, {precision}: per mini-batch")
        bench_network("naive", DenseNet())
        bench_network("efficient", DenseNet(efficient=True))
        bench_network("checkpoint", checkpointed_densenet())


if __name__ == "__main__":
    main()

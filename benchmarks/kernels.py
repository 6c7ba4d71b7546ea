"""Times the tensor-core kernels of a dense layer beside what PyTorch runs for it, on a GPU.

    python benchmarks/kernels.py

For layers of DenseNet-121 (224x224) and DenseNet-BC-100 k=12 (32x32) at batch 64, in bfloat16 and
in float32 with TF32:

    forward      batch norm, ReLU, 1x1 convolution, moments of the result
    grad input   of the three, added to the gradient of all features; sums for weight and bias
    grad weight  of the convolution, normalised features recomputed

    us      mean GPU time of all kernels of a part, with a cold L2 cache
    copy    bytes that have to move, over the time, as a share of the bandwidth of a copy
    torch   GPU time of the same in PyTorch, channels-last: cat of the features, batch norm, ReLU,
            convolution, and the second batch norm's statistics; its backward pass has both parts

A layer is timed only if its results are those of PyTorch to the rounding of its dtype. Writes
kernels.md and kernels.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType

import efficient_densenet  # noqa: F401  registers the operators
from common import (
    RESULTS,
    copy_bandwidth,
    markdown_table,
    origin,
    origin_lines,
    positive,
    relative_error,
    set_tf32,
)

OPS = torch.ops.efficient_densenet
BATCH = 64
EPS = 1e-5
L2_BYTES = 256 << 20  # more than any L2 cache holds
PARTS = {  # kernels of each part
    "forward": ("bn_relu_conv1x1_kernel", "merge_moments_kernel"),
    "grad input": ("bn_relu_conv1x1_grad_input_kernel", "merge_reader_kernel"),
    "grad weight": ("bn_relu_conv1x1_grad_weight_kernel", "add_grad_weight_kernel"),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """`channels` are the channels that the layer reads, of `total` in the block's buffer."""

    network: str
    block: int
    size: int
    channels: int
    total: int
    outputs: int

    @property
    def rows(self) -> int:
        return BATCH * self.size**2

    def __str__(self) -> str:
        return f"{self.network} block {self.block}"

    def nbytes(self, part: str, dtype: torch.dtype) -> int:
        """x and z (or its gradient) once; G, in float32, twice; weights and their gradient."""
        x, z, w = self.rows * self.channels, self.rows * self.outputs, self.channels * self.outputs
        operands = (x + z + w) * dtype.itemsize
        return operands + {"forward": 0, "grad input": 8 * x, "grad weight": 4 * w}[part]


LAYERS = [
    *(Layer("121", 1, 56, channels, 256, 128) for channels in (64, 224)),
    *(Layer("121", 2, 28, channels, 512, 128) for channels in (128, 480)),
    *(Layer("121", 3, 14, channels, 1024, 128) for channels in (256, 640, 992)),
    *(Layer("121", 4, 7, channels, 1024, 128) for channels in (512, 992)),
    *(Layer("BC-100", 1, 32, channels, 216, 48) for channels in (24, 120, 204)),
    *(Layer("BC-100", 2, 16, channels, 304, 48) for channels in (108, 288)),
    *(Layer("BC-100", 3, 8, channels, 344, 48) for channels in (150, 330)),
]


class Operands:
    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda")

        self.layer, channels = layer, layer.channels
        self.buffer = randn(layer.rows, layer.total).to(dtype)
        self.x = self.buffer[:, :channels]
        self.mean = self.x.double().mean(0)
        self.var = self.x.double().var(0, correction=0)
        self.weight, self.bias = torch.rand_like(randn(channels)) + 0.5, randn(channels)
        self.conv1 = (randn(layer.outputs, channels) / channels**0.5).to(dtype)
        self.z = torch.empty(layer.rows, layer.outputs, dtype=dtype, device="cuda")
        self.grad_z = randn(*self.z.shape).to(dtype)
        self.moments = torch.empty(2, layer.outputs, dtype=torch.float64, device="cuda")
        self.grad_features = torch.zeros(layer.rows, layer.total, device="cuda")
        self.grad_affine = torch.empty(2, channels, device="cuda")
        self.correction = torch.zeros(2, channels, dtype=torch.float64, device="cuda")
        self.grad_conv1 = torch.empty(self.conv1.shape, device="cuda")

    def norm(self) -> tuple:
        return self.mean, self.var, self.weight, self.bias, EPS

    def forward(self) -> None:
        OPS.bn_relu_conv1x1(self.x, *self.norm(), self.conv1, self.z, self.moments)

    def backward(self, grad_conv1: Tensor | None, first_reader: bool = False) -> None:
        OPS.bn_relu_conv1x1_backward(
            self.grad_z, self.x, *self.norm(), self.conv1,
            self.grad_features[:, : self.layer.channels], self.grad_affine, self.correction,
            first_reader, True, grad_conv1,
        )  # fmt: skip

    def parts(self) -> dict[str, Callable[[], None]]:
        """Calls in which the kernels of each part come first, and so find a cold cache."""
        return {
            "forward": self.forward,
            "grad input": lambda: self.backward(None),
            "grad weight": lambda: self.backward(self.grad_conv1),
        }


class Plain:
    """The same with PyTorch: features as a list of what each layer before has made."""

    def __init__(self, operands: Operands) -> None:
        layer = operands.layer
        growth = layer.outputs // 4

        def images(rows: Tensor) -> Tensor:
            return rows.reshape(BATCH, layer.size, layer.size, -1).movedim(-1, 1)

        first = layer.channels % growth or growth
        widths = [first, *[growth] * ((layer.channels - first) // growth)]
        self.features = [
            images(part.contiguous()).requires_grad_()
            for part in operands.x.detach().split(widths, 1)
        ]
        self.affine = [t.clone().requires_grad_() for t in (operands.weight, operands.bias)]
        self.conv1 = operands.conv1[:, :, None, None].clone().requires_grad_()
        self.grad_z = images(operands.grad_z)

    def forward(self) -> Tensor:
        x = F.batch_norm(torch.cat(self.features, 1), None, None, *self.affine, training=True)
        self.z = F.conv2d(F.relu(x), self.conv1)
        torch.var_mean(self.z.detach(), (0, 2, 3), correction=0)
        return self.z

    def backward(self) -> tuple[Tensor, ...]:
        inputs = [*self.features, *self.affine, self.conv1]
        return torch.autograd.grad(self.z, inputs, self.grad_z, retain_graph=True)


def kernel_times(function: Callable[[], object], repeats: int) -> dict[str, float]:
    """Mean GPU microseconds of each kernel per call, with a cold L2 cache."""
    flush = torch.zeros(L2_BYTES, dtype=torch.int8, device="cuda")
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            flush.bitwise_not_()
            function()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / repeats
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and "bitwise_not" not in event.key
    }


def total_us(times: dict[str, float], kernels: tuple[str, ...] | None = None) -> float:
    """Of the kernels with one of these names (all, if there are none given)."""
    return sum(
        us
        for name, us in times.items()
        if kernels is None or any(kernel in name for kernel in kernels)
    )


def check(operands: Operands, plain: Plain, dtype: torch.dtype) -> None:
    """Exits where a result is not PyTorch's; bounds are a few times the rounding of operands."""
    operands.forward()
    operands.backward(operands.grad_conv1, first_reader=True)
    z = plain.forward().movedim(1, -1).reshape(operands.z.shape)
    gradients = plain.backward()
    pairs = {"z": (operands.z, z), "grad weight": (operands.grad_conv1, gradients[-1][:, :, 0, 0])}
    pairs["grad bias"] = operands.grad_affine[1], gradients[-2]
    for name, (value, expected) in pairs.items():
        error = relative_error(value, expected)
        limit = 5e-3 if dtype == torch.float32 else 5e-2
        if not error <= limit:
            sys.exit(f"{operands.layer}: {name} differs from PyTorch's by {error:.1e}; not timed")


def measure(layer: Layer, dtype: torch.dtype, bandwidth: float, repeats: int) -> dict:
    torch.manual_seed(0)
    operands = Operands(layer, dtype)
    plain = Plain(operands)
    check(operands, plain, dtype)
    row = dataclasses.asdict(layer) | {"dtype": str(dtype)[6:], "rows": layer.rows}
    for part, call in operands.parts().items():
        kernels, times = PARTS[part], kernel_times(call, repeats)
        us = total_us(times, kernels)
        share = layer.nbytes(part, dtype) / (us / 1e6) / bandwidth
        row[part] = {"us": us, "bytes": layer.nbytes(part, dtype), "share of copy": share}
        row[part]["kernels"] = {kernel: total_us(times, (kernel,)) for kernel in kernels}
    row["torch forward us"] = total_us(kernel_times(plain.forward, repeats))
    row["torch backward us"] = total_us(kernel_times(plain.backward, repeats))
    return row


def table(rows: list[dict]) -> str:
    columns = ["layer", "dtype", "M", "C", "N"]
    columns += ["forward us", "copy", "torch", "grad input us", "copy", "grad weight us", "copy"]
    columns += ["torch, both"]
    cells = []
    for row in rows:
        line = [f"{row['network']} block {row['block']}", row["dtype"]]
        line += [str(row[name]) for name in ("rows", "channels", "outputs")]
        for part in PARTS:
            line += [f"{row[part]['us']:.1f}", f"{row[part]['share of copy']:.0%}"]
            if part == "forward":
                line.append(f"{row['torch forward us']:.1f}")
        cells.append([*line, f"{row['torch backward us']:.1f}"])
    return markdown_table(columns, cells)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=positive, default=20, metavar="N", help="default: 20")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    set_tf32(True)
    source = origin("cuda", shlex.join(["python", "benchmarks/kernels.py", *arguments]))
    bandwidth = copy_bandwidth()
    rows = [
        measure(layer, dtype, bandwidth, options.repeats)
        for dtype in (torch.bfloat16, torch.float32)
        for layer in LAYERS
    ]
    text = (
        f"# Tensor-core kernels, batch {BATCH}\n\n{origin_lines(source)}"
        f"- copy bandwidth {bandwidth / 1e12:.2f} TB/s (bytes read and written)\n"
        f"- mean GPU time of {options.repeats} calls, cold L2 cache; float32 with TF32\n\n"
        f"{table(rows)}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernels.md").write_text(text)
    content = {"origin": source, "copy bandwidth": bandwidth, "rows": rows}
    (options.out / "kernels.json").write_text(json.dumps(content, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

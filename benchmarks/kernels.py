"""Times the tensor-core kernels of a dense layer beside what PyTorch runs for it, on a GPU.

    python benchmarks/kernels.py

For layers of DenseNet-121 (224x224) and DenseNet-BC-100 k=12 (32x32) at batch 64, in bfloat16 and
in float32 with TF32:

    forward      batch norm, ReLU, convolution, moments of the result
    grad input   of the three; of the 1x1 convolution, added to the gradient of all features; of
                 the 3x3, the gradient of its result gathered first
    grad weight  of the convolution, normalised features recomputed

    us      mean GPU time of all kernels of a part, with a cold L2 cache
    copy    bytes that have to move, over the time, as a share of the bandwidth of a copy
    torch   GPU time of the same in PyTorch, channels-last: cat of the features (1x1), batch norm,
            ReLU, convolution, and the next batch norm's statistics; its backward pass has both
            parts
    cudnn   (3x3) GPU time of the convolution alone: forward, gradient of the input, of the weight

The choice between these kernels and torch's convolutions (csrc/bn_relu_conv3x3.h) rests on the
3x3 rows: other than cuDNN's, the times of ours hold the passes over memory around the convolution.

A layer is timed only if its results are those of PyTorch to the rounding of its dtype. Writes
kernels.md and kernels.json.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import efficient_densenet  # noqa: F401  registers the operators
from common import (
    RESULTS,
    copy_bandwidth,
    describing_parser,
    markdown_table,
    origin,
    origin_lines,
    positive,
    relative_error,
    set_tf32,
    write,
)
from rows import launched

OPS = torch.ops.efficient_densenet
BATCH = 64
EPS = 1e-5
L2_BYTES = 256 << 20  # more than any L2 cache holds
# The kernel of each part, by the size of the convolution.
PARTS = {
    1: {
        "forward": "bn_relu_conv1x1_kernel",
        "grad input": "bn_relu_conv1x1_grad_input_kernel",
        "grad weight": "bn_relu_conv1x1_grad_weight_kernel",
    },
    3: {
        "forward": "bn_relu_conv3x3_kernel",
        "grad input": "bn_relu_conv3x3_grad_input_kernel",
        "grad weight": "bn_relu_conv3x3_grad_weight_kernel",
    },
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution of a dense layer: `channels` that it reads, of `total` in a buffer."""

    network: str
    block: int
    size: int
    channels: int
    total: int
    outputs: int
    kernel: int = 1

    @property
    def rows(self) -> int:
        return BATCH * self.size**2

    def __str__(self) -> str:
        return f"{self.network} block {self.block}"

    def nbytes(self, part: str, dtype: torch.dtype) -> int:
        """Input and result (or its gradient) once; G, in float32; weights and their gradient.

        Of the 1x1 convolution's grad input, G of x is read and written; the gradient of the result
        is made on the way, of itself and of the result, and written. Of the 3x3's, G of the result
        and the result are read and its gradient written, and so is that of the input.
        """
        x, z = self.rows * self.channels, self.rows * self.outputs
        w, size = self.kernel**2 * self.channels * self.outputs, dtype.itemsize
        more = {
            1: {"forward": 0, "grad input": 8 * x + 2 * size * z, "grad weight": 4 * w},
            3: {"forward": 0, "grad input": (4 + size) * z + size * x, "grad weight": size * w},
        }
        return (x + z + w) * size + more[self.kernel][part]


LAYERS = [
    *(Layer("121", 1, 56, channels, 256, 128) for channels in (64, 224)),
    *(Layer("121", 2, 28, channels, 512, 128) for channels in (128, 480)),
    *(Layer("121", 3, 14, channels, 1024, 128) for channels in (256, 640, 992)),
    *(Layer("121", 4, 7, channels, 1024, 128) for channels in (512, 992)),
    *(Layer("BC-100", 1, 32, channels, 216, 48) for channels in (24, 120, 204)),
    *(Layer("BC-100", 2, 16, channels, 304, 48) for channels in (108, 288)),
    *(Layer("BC-100", 3, 8, channels, 344, 48) for channels in (150, 330)),
    *(Layer("121", i + 1, 56 >> i, 128, 128, 32, kernel=3) for i in range(4)),
    *(Layer("BC-100", i + 1, 32 >> i, 48, 48, 12, kernel=3) for i in range(3)),
    *(Layer("BC-190", i + 1, 32 >> i, 160, 160, 40, kernel=3) for i in range(3)),
    *(Layer("264", i + 1, 56 >> i, 192, 192, 48, kernel=3) for i in range(4)),
]


def images(layer: Layer, rows: Tensor) -> Tensor:
    return rows.reshape(BATCH, layer.size, layer.size, -1).movedim(-1, 1)


class Operands:
    """Of the norm and the convolution, and memory for all results."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda")

        self.layer, channels, outputs = layer, layer.channels, layer.outputs
        fan_in = layer.kernel**2 * channels
        self.buffer = randn(layer.rows, layer.total).to(dtype)
        self.x = self.buffer[:, :channels]
        self.mean = self.x.double().mean(0)
        self.var = self.x.double().var(0, correction=0)
        self.weight, self.bias = torch.rand_like(randn(channels)) + 0.5, randn(channels)
        self.conv = (randn(outputs, fan_in) / fan_in**0.5).to(dtype)  # channels innermost
        self.y = torch.empty(layer.rows, outputs, dtype=dtype, device="cuda")
        self.grad_y = randn(*self.y.shape).to(dtype)
        self.moments = torch.empty(2, outputs, dtype=torch.float64, device="cuda")
        self.grad_affine = torch.empty(2, channels, device="cuda")

    def norm(self) -> tuple:
        return self.mean, self.var, self.weight, self.bias, EPS

    def forward(self) -> None:
        raise NotImplementedError

    def backward(self, grad_conv: Tensor | None) -> None:
        raise NotImplementedError

    def parts(self) -> dict[str, Callable[[], None]]:
        """Calls in which the kernels of each part come first, and so find a cold cache.

        But for the weight of a 3x3 convolution, which follows its input's as in a block.
        """
        return {
            "forward": self.forward,
            "grad input": lambda: self.backward(None),
            "grad weight": lambda: self.backward(self.grad_conv),
        }


class Operands1x1(Operands):
    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        self.grad_features = torch.zeros(layer.rows, layer.total, device="cuda")
        self.correction = torch.zeros(2, layer.channels, dtype=torch.float64, device="cuda")
        self.grad_conv = torch.empty(self.conv.shape, device="cuda")
        self.grad_z = torch.empty_like(self.grad_y)
        # Of a norm2 whose ReLU is open everywhere, and that changes nothing: torch has none here.
        self.coefficients = torch.zeros(5, layer.outputs, device="cuda")
        self.coefficients[1], self.coefficients[2] = 1, 1e4  # scale and bias

    def forward(self) -> None:
        OPS.bn_relu_conv1x1(self.x, *self.norm(), self.conv, self.y, self.moments)

    def backward(self, grad_conv: Tensor | None) -> None:
        OPS.bn_relu_conv1x1_backward(
            self.grad_y, self.y, self.coefficients, True, self.x, *self.norm(), self.conv,
            self.grad_z, self.grad_features[:, : self.layer.channels], self.grad_affine,
            self.correction, True, grad_conv,
        )  # fmt: skip


class Operands3x3(Operands):
    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        self.conv = self.conv.unflatten(1, (3, 3, layer.channels))
        self.grad_features = self.grad_y.float()
        self.grad_x, self.grad_conv = torch.empty_like(self.x), torch.empty_like(self.conv)
        self.correction = torch.zeros(2, layer.outputs, dtype=torch.float64, device="cuda")
        self.coefficients = torch.empty(5, layer.channels, device="cuda")
        self.size = layer.size, layer.size

    def forward(self) -> None:
        OPS.bn_relu_conv3x3(self.x, *self.norm(), self.conv, *self.size, self.y, self.moments)

    def backward(self, grad_conv: Tensor | None) -> None:
        OPS.bn_relu_conv3x3_backward(
            self.grad_features, self.y, self.moments[0], self.correction, self.x, *self.norm(),
            self.conv, *self.size, self.grad_x, self.grad_affine, self.coefficients, True,
            grad_conv,
        )  # fmt: skip


OPERANDS = {1: Operands1x1, 3: Operands3x3}


class Plain:
    """The same with PyTorch: of a 1x1 convolution, features as a list of what layers have made."""

    def __init__(self, operands: Operands) -> None:
        layer = operands.layer
        widths = [layer.channels]
        if layer.kernel == 1:
            growth = layer.outputs // 4
            first = layer.channels % growth or growth
            widths = [first, *[growth] * ((layer.channels - first) // growth)]
        self.features = [
            images(layer, part.contiguous()).requires_grad_()
            for part in operands.x.detach().split(widths, 1)
        ]
        self.affine = [t.clone().requires_grad_() for t in (operands.weight, operands.bias)]
        kernel = layer.kernel, layer.kernel, layer.channels
        self.padding = layer.kernel // 2
        self.conv = operands.conv.detach().reshape(-1, *kernel).movedim(-1, 1).requires_grad_()
        self.grad_y = images(layer, operands.grad_y)

    def forward(self) -> Tensor:
        x = self.features[0] if len(self.features) == 1 else torch.cat(self.features, 1)
        x = F.batch_norm(x, None, None, *self.affine, training=True)
        self.y = F.conv2d(F.relu(x), self.conv, padding=self.padding)
        torch.var_mean(self.y.detach(), (0, 2, 3), correction=0)
        return self.y

    def backward(self) -> tuple[Tensor, ...]:
        inputs = [*self.features, *self.affine, self.conv]
        return torch.autograd.grad(self.y, inputs, self.grad_y, retain_graph=True)

    def convolutions(self) -> dict[str, Callable[[], object]]:
        """The convolution alone."""
        x, conv = self.features[0].detach(), self.conv.detach()

        def backward(*wanted: bool) -> object:
            return torch.ops.aten.convolution_backward(
                self.grad_y, x, conv, None, (1, 1), (self.padding,) * 2, (1, 1), False, (0, 0), 1,
                (*wanted, False),
            )  # fmt: skip

        return {
            "forward": lambda: F.conv2d(x, conv, padding=self.padding),
            "grad input": lambda: backward(True, False),
            "grad weight": lambda: backward(False, True),
        }


def kernel_times(function: Callable[[], object], repeats: int) -> dict[str, float]:
    """Mean GPU microseconds of each kernel per call, with a cold L2 cache."""
    flush = torch.zeros(L2_BYTES, dtype=torch.int8, device="cuda")
    function()
    torch.cuda.synchronize()

    def flush_and_call() -> None:
        flush.bitwise_not_()
        function()

    return {
        event.key: event.self_device_time_total / repeats
        for event in launched(flush_and_call, repeats)
        if "bitwise_not" not in event.key
    }


def total_us(times: dict[str, float], kernel: str = "") -> float:
    """Of the kernels whose names contain this."""
    return sum(us for name, us in times.items() if kernel in name)


def check(operands: Operands, plain: Plain, dtype: torch.dtype) -> None:
    """Exits where a result is not PyTorch's; bounds are a few times the rounding of operands."""
    operands.forward()
    operands.backward(operands.grad_conv)
    y = plain.forward().movedim(1, -1).reshape(operands.y.shape)
    gradients = plain.backward()
    grad_conv = gradients[-1].movedim(1, -1).reshape(operands.grad_conv.shape)
    pairs = {"y": (operands.y, y), "grad weight": (operands.grad_conv, grad_conv)}
    pairs["grad bias"] = operands.grad_affine[1], gradients[-2]
    for name, (value, expected) in pairs.items():
        error = relative_error(value, expected)
        limit = 5e-3 if dtype == torch.float32 else 5e-2
        if not error <= limit:
            sys.exit(f"{operands.layer}: {name} differs from PyTorch's by {error:.1e}; not timed")


def measure(layer: Layer, dtype: torch.dtype, bandwidth: float, repeats: int) -> dict:
    torch.manual_seed(0)
    operands = OPERANDS[layer.kernel](layer, dtype)
    plain = Plain(operands)
    check(operands, plain, dtype)
    row = dataclasses.asdict(layer) | {"dtype": str(dtype)[6:], "rows": layer.rows}
    convolutions = plain.convolutions() if layer.kernel == 3 else {}
    for part, call in operands.parts().items():
        us = total_us(kernel_times(call, repeats), PARTS[layer.kernel][part])
        share = layer.nbytes(part, dtype) / (us / 1e6) / bandwidth
        row[part] = {"us": us, "bytes": layer.nbytes(part, dtype), "share of copy": share}
        if part in convolutions:
            row[part]["cudnn us"] = total_us(kernel_times(convolutions[part], repeats))
    row["torch forward us"] = total_us(kernel_times(plain.forward, repeats))
    row["torch backward us"] = total_us(kernel_times(plain.backward, repeats))
    return row


def table(rows: list[dict], kernel: int) -> str:
    """Of the convolutions of one size."""
    columns = ["layer", "dtype", "M", "C", "N", "torch forward", "backward"]
    columns += [name for part in PARTS[kernel] for name in (f"{part} us", "copy")]
    if kernel == 3:
        columns += [f"cudnn {part}" for part in PARTS[kernel]]
    cells = []
    for row in rows:
        if row["kernel"] != kernel:
            continue
        line = [f"{row['network']} block {row['block']}", row["dtype"]]
        line += [str(row[name]) for name in ("rows", "channels", "outputs")]
        line += [f"{row[f'torch {way} us']:.1f}" for way in ("forward", "backward")]
        for part in PARTS[kernel]:
            line += [f"{row[part]['us']:.1f}", f"{row[part]['share of copy']:.0%}"]
        if kernel == 3:
            line += [f"{row[part]['cudnn us']:.1f}" for part in PARTS[kernel]]
        cells.append(line)
    return markdown_table(columns, cells)


def main(arguments: list[str]) -> int:
    parser = describing_parser(__doc__)
    parser.add_argument("--repeats", type=positive, default=20, metavar="N", help="default: 20")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--kernel", type=int, nargs="+", choices=PARTS, default=list(PARTS))
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
        if layer.kernel in options.kernel
    ]
    text = (
        f"# Tensor-core kernels, batch {BATCH}\n\n{origin_lines(source)}"
        f"- copy bandwidth {bandwidth / 1e12:.2f} TB/s (bytes read and written)\n"
        f"- mean GPU time of {options.repeats} calls, cold L2 cache; float32 with TF32\n\n"
        + "\n".join(f"## {kernel}x{kernel}\n\n{table(rows, kernel)}" for kernel in PARTS)
    )
    content = {"origin": source, "copy bandwidth": bandwidth, "rows": rows}
    write(options.out / "kernels", text, content)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

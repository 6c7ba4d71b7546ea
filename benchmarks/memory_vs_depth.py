"""Measures how the memory of a train step grows with depth: plain, checkpointed and ours.

    python benchmarks/memory_vs_depth.py                 # on a GPU
    python benchmarks/memory_vs_depth.py --device cpu --batch 2 --depths 2 4 8 12
    python benchmarks/memory_vs_depth.py --plot benchmarks/results/memory_vs_depth.json

Networks are DenseNet-BC with k=12 and three blocks of n layers each, float32 with TF32, on 32x32
images. (Without TF32, cuDNN's workspaces outweigh the activations of shallow networks.) Measured
on a GPU: peak memory of a step (forward, cross entropy, backward, SGD with momentum) above what is
allocated before it, when parameters, optimizer state and inputs exist and gradients are None. On
the CPU, which keeps no such count: bytes of the storages that autograd keeps for the backward
pass, each once and without the parameters.

`constant + factor * n**exponent` is fitted to each curve: for every exponent of a grid from 0.2 to
3, constant and factor by linear least squares, and then the exponent with the least sum of squares.

Writes memory_vs_depth.md, .json and .png. The exit status is 1 where an exponent of ours is 1.1 or
more: memory is to be linear above the constant part.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common import (
    DENSENETS,
    RESULTS,
    TrainStep,
    check_plot_or_gpu,
    describing_parser,
    gigabytes,
    markdown_table,
    origin,
    origin_lines,
    peak_activation_bytes,
    positive,
    set_tf32,
    write,
    write_plot,
)

DEPTHS = [8, 16, 24, 32, 48, 64]
MEASURED = {
    "cuda": "peak activation memory of a train step",
    "cpu": "memory kept for the backward pass",
}
LINEAR = 1.1  # exponents below count as linear
EXPONENTS = [i / 500 for i in range(100, 1501)]
COLOURS = {"plain": "C3", "checkpoint": "C1", "ours": "C0", "ours-features": "C2"}


@dataclasses.dataclass(frozen=True)
class Fit:
    """`constant + factor * depth**exponent`"""

    constant: float
    factor: float
    exponent: float

    def __call__(self, depth: float) -> float:
        return self.constant + self.factor * depth**self.exponent

    @classmethod
    def to(cls, depths: Sequence[int], values: Sequence[float]) -> Fit:
        """The best of the grid of exponents; needs four points or more."""

        def with_exponent(exponent: float) -> Fit:
            line = statistics.linear_regression([n**exponent for n in depths], values)
            return cls(line.intercept, line.slope, exponent)

        def squares(fit: Fit) -> float:
            return sum((fit(n) - value) ** 2 for n, value in zip(depths, values, strict=True))

        return min(map(with_exponent, EXPONENTS), key=squares)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Bytes per depth, None where memory ran out; no fit where fewer than four are left."""

    depths: list[int]
    nbytes: list[int | None]

    def fit(self) -> Fit | None:
        points = [(n, b) for n, b in zip(self.depths, self.nbytes, strict=True) if b is not None]
        return Fit.to(*zip(*points, strict=True)) if len(points) >= 4 else None


# ------------------------------------------------------------------------------------ measuring


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of the storages that autograd keeps, each once, without those of the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images)
    del logits  # it kept them alive, so that no address was used twice
    return sum(kept.values())


def step_bytes(model: nn.Module, images: Tensor, target: Tensor) -> int:
    step = TrainStep(model, images, target)
    for _ in range(2):  # optimizer state and the workspaces of libraries
        step()
    return peak_activation_bytes(step)


def measure(name: str, depth: int, batch: int, device: str) -> int | None:
    """Bytes; None if memory runs out."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        model = DENSENETS[name](growth_rate=12, block_config=(depth,) * 3).to(device)
        images = torch.randn(batch, 3, 32, 32, device=device)
        if device == "cpu":
            return kept_bytes(model, images)
        return step_bytes(model, images, torch.randint(10, (batch,), device=device))
    except torch.OutOfMemoryError:
        return None


def measure_curve(name: str, options: argparse.Namespace) -> Curve:
    nbytes = [measure(name, depth, options.batch, options.device) for depth in options.depths]
    return Curve(options.depths, nbytes)


# -------------------------------------------------------------------------------------- results


def exponent_text(fit: Fit | None) -> str:
    return f"{fit.exponent:.2f}" if fit else "-"


def as_text(content: dict, curves: dict[str, Curve]) -> str:
    columns = ["layers per block", *(str(depth) for depth in content["depths"])]
    columns += ["exponent", "constant GB"]
    rows = []
    for name, curve in curves.items():
        fit = curve.fit()
        cells = [name, *map(gigabytes, curve.nbytes)]
        rows.append([*cells, exponent_text(fit), gigabytes(fit.constant if fit else None)])
    return (
        f"# {content['measured'].capitalize()}, in GB of 1e9 bytes\n\n"
        f"{origin_lines(content['origin'])}"
        f"- DenseNet-BC, k=12, three blocks, 32x32 images, batch {content['batch']}, TF32\n"
        "- fit: constant + factor * layers**exponent\n\n"
        f"{markdown_table(columns, rows)}"
    )


def as_json(curves: dict[str, Curve]) -> dict[str, dict]:
    fits = {name: curve.fit() for name, curve in curves.items()}
    return {
        name: {"bytes": curve.nbytes, "fit": fits[name] and dataclasses.asdict(fits[name])}
        for name, curve in curves.items()
    }


def draw(content: dict, path: Path) -> None:
    """Points as measured, lines as fitted."""
    from matplotlib.figure import Figure  # only the drawing needs it

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, row in content["rows"].items():
        curve = Curve(content["depths"], row["bytes"])
        points = [(n, b / 1e9) for n, b in zip(curve.depths, curve.nbytes, strict=True) if b]
        fit = curve.fit()
        label = f"{name}: exponent {exponent_text(fit)}"
        axes.plot(*zip(*points, strict=True), "o", color=COLOURS[name], label=label)
        if fit:
            first, last = curve.depths[0], curve.depths[-1]
            depths = [first + (last - first) * i / 100 for i in range(101)]
            axes.plot(depths, [fit(n) / 1e9 for n in depths], color=COLOURS[name])
    axes.set(xlabel="layers in each of three blocks", ylabel=f"{content['measured']}, GB")
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.set_title(f"DenseNet-BC, k=12, 32x32, batch {content['batch']}, TF32", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.text(0.99, 0.01, content["origin"]["device"], ha="right", fontsize=6)
    figure.savefig(path, dpi=150)


# --------------------------------------------------------------------------------- command line


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = describing_parser(__doc__)
    add = parser.add_argument
    text = f"layers per block, four or more (default: {' '.join(map(str, DEPTHS))})"
    add("--depths", nargs="+", type=positive, default=DEPTHS, metavar="N", help=text)
    add("--batch", type=positive, default=64, metavar="N", help="images (default: 64)")
    text = "cpu counts what is kept for the backward pass instead of the peak of a step"
    add("--device", choices=("cuda", "cpu"), default="cuda", help=text)
    add("--out", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
    text = "only draw the PNG of a JSON file of an earlier run, beside it"
    add("--plot", type=Path, metavar="JSON", help=text)
    options = parser.parse_args(arguments)
    options.depths = sorted(set(options.depths))
    if len(options.depths) < 4:
        parser.error("--depths: a fit of three numbers needs four different depths or more")
    check_plot_or_gpu(parser, options, "--device cpu counts what is kept for the backward pass")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.plot:
        draw(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
        return 0
    torch.manual_seed(0)
    set_tf32(True)
    curves = {name: measure_curve(name, options) for name in DENSENETS}
    command = shlex.join(["python", "benchmarks/memory_vs_depth.py", *arguments])
    content = {
        "measured": MEASURED[options.device],
        "origin": origin(options.device, command),
        "batch": options.batch,
        "depths": options.depths,
        "rows": as_json(curves),
    }
    text = as_text(content, curves)
    print(text)
    write(options.out / "memory_vs_depth", text, content)
    write_plot(draw, content, options.out / "memory_vs_depth")
    fits = {name: curve.fit() for name, curve in curves.items() if name.startswith("ours")}
    not_linear = [name for name, fit in fits.items() if not (fit and fit.exponent < LINEAR)]
    if not_linear:
        print(f"not linear in depth: {', '.join(not_linear)}", file=sys.stderr)
    return int(bool(not_linear))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

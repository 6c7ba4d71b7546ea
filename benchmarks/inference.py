"""Times the evaluation of DenseNets, beside plain and compiled ones.

    python benchmarks/inference.py                          # DenseNet-121 in bf16, batch 1, 8, 64
    python benchmarks/inference.py --config bc100 --precision tf32 --batch 64
    python benchmarks/inference.py --rows ours plain torchvision-converted

What is timed is the forward pass of a model in evaluation mode under `torch.no_grad`, on random
images. Each row runs in a process of its own (unless --one-process) and is

    ours                   DenseNet(efficient=True), channels last
    plain                  DenseNet(efficient=False), contiguous
    plain-channels-last    the same, channels last
    torchvision-converted  torchvision's DenseNet after efficient_densenet.convert, channels last

or one of these with the name of how it is called behind it, see train_step.py: -compiled,
-cudagraphs or -max-autotune,

on the same weights, running statistics and images. A row is timed only if its logits are those of
plain to the rounding of its precision.

Measured per row and batch:
    ms              wall-clock time of a call from Python, to the end of its GPU work
    host ms         median time until the host has launched a call on an idle GPU
    graph ms        the same as ms of the call replayed from a CUDA graph
    activations GB  peak memory of a call above the weights and the images (1 GB = 1e9 bytes)
    warm-up s       time of the first call and of those before the timed ones, compilation included

Precisions are those of train_step.py. A second table has how many times faster a row is than the
faster one of the two plain rows, called from Python and replayed.

The tables and the rows go into inference.md and inference.json, after each row. The exit status is
1 where a row of ours could not be timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import shlex
import statistics
import sys

import torch
from torch import nn

from common import (
    NETWORKS,
    PRECISIONS,
    Forward,
    describing_parser,
    gigabytes,
    markdown_table,
    milliseconds,
    origin,
    peak_activation_bytes,
    positive,
    seconds,
)
from rows import (
    BUDGET,
    COMPILED,
    Job,
    JobRow,
    add_job_options,
    checked_step,
    compiled,
    graph_times,
    is_launched_one_by_one,
    measure_each,
    median_and_least,
    model_and_images,
    model_and_way,
    parse_job_options,
    times_ms,
    write_rows,
)
from train_step import MODELS

PLAIN = {"plain": torch.contiguous_format, "plain-channels-last": torch.channels_last}
EVALUATED = ["ours", *PLAIN, "torchvision-converted"]
WAYS = [way for way in COMPILED if way != BUDGET]
ROWS = [model + way for model in EVALUATED for way in ("", *WAYS)]
PUBLISHED_ROWS = [
    *EVALUATED,
    *("ours-compiled", "torchvision-converted-compiled", "plain-channels-last-compiled"),
    "plain-channels-last-max-autotune",
]


@dataclasses.dataclass
class Row(JobRow):
    logits_error: float | None = None
    ms: float | None = None
    ms_min: float | None = None
    host_ms: float | None = None
    graph_ms: float | None = None
    graph_ms_min: float | None = None
    activation_bytes: int | None = None
    warmup_s: float | None = None
    note: str = ""


# ------------------------------------------------------------------------------------ measuring


def settle(model: nn.Module, sizes: tuple[int, ...]) -> None:
    """Running statistics of a few images: 0 and 1 let activations grow, and hide mistakes."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, 3, *sizes, generator=torch.Generator().manual_seed(2)))


def inference(job: Job, row: str) -> Forward:
    name, way = model_and_way(row)
    precision = dataclasses.replace(
        PRECISIONS[job.precision], memory_format=PLAIN.get(name, torch.channels_last)
    )

    def build(**settings) -> nn.Module:
        model = MODELS["plain" if name in PLAIN else name](**settings)
        settle(model, NETWORKS[job.config].sizes)  # in float32, so it is the same for all rows
        return compiled(model.eval(), way)

    return Forward(*model_and_images(job, build, precision), precision.autocast)


def measurements(job: Job) -> dict:
    """Fields of `Row`."""
    warm = checked_step(job, inference)
    step = warm.step
    launched_one_by_one = is_launched_one_by_one(job)
    activation_bytes = peak_activation_bytes(step) if launched_one_by_one else None
    return {
        "logits_error": warm.logits_error,
        **median_and_least("ms", times_ms(step, job.steps)),
        "host_ms": statistics.median(times_ms(step, job.steps, waits=False)),
        "activation_bytes": activation_bytes,
        "warmup_s": warm.warmup_s,
        **(graph_times(step, job.steps) if launched_one_by_one else {}),
    }


def measure(job: Job) -> Row:
    return Row.measured(job, measurements)


# -------------------------------------------------------------------------------------- results


def table(rows: list[Row]) -> str:
    columns = ["network", "precision", "batch", "row", "ms", "min", "host ms", "graph ms", "min"]
    columns += ["activations GB", "warm-up s", "note"]
    cells = [
        [
            *(row.config, row.precision, str(row.batch), row.row),
            *map(milliseconds, (row.ms, row.ms_min, row.host_ms)),
            *map(milliseconds, (row.graph_ms, row.graph_ms_min)),
            gigabytes(row.activation_bytes),
            seconds(row.warmup_s),
            row.note.replace("|", "\\|"),
        ]
        for row in rows
    ]
    return markdown_table(columns, cells)


def speedup(row: Row, rows: list[Row]) -> str:
    """Over the faster plain row of the same problem: called from Python / replayed."""

    def over_plain(field: str) -> str:
        plain = [getattr(other, field) for other in rows if other.row in PLAIN]
        times = [time for time in plain if time is not None]
        time = getattr(row, field)
        return f"{min(times) / time:.2f}" if times and time is not None else "-"

    return f"{over_plain('ms')} / {over_plain('graph_ms')}"


def speedups(rows: list[Row]) -> str:
    """A line per network, precision and row, a column per batch."""
    batches = sorted({row.batch for row in rows})
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        if row.row not in PLAIN:
            problem = (row.config, row.precision, row.batch)
            same = [r for r in rows if (r.config, r.precision, r.batch) == problem]
            line = lines.setdefault((row.config, row.precision, row.row), {})
            line[row.batch] = speedup(row, same)
    columns = ["network", "precision", "row", *(f"batch {batch}" for batch in batches)]
    cells = [
        [*identity, *(line.get(batch, "-") for batch in batches)]
        for identity, line in lines.items()
    ]
    return markdown_table(columns, cells)


def tables(rows: list[Row]) -> str:
    return (
        f"{table(rows)}\nTimes faster than the faster plain row, called from Python / replayed:\n\n"
        f"{speedups(rows)}"
    )


# --------------------------------------------------------------------------------- command line


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = describing_parser(__doc__)
    add = parser.add_argument
    text = f"{', '.join(NETWORKS)} (default: densenet121)"
    add("--config", nargs="+", choices=NETWORKS, default=["densenet121"], metavar="NAME", help=text)
    text = f"{', '.join(PRECISIONS)} (default: bf16)"
    add("--precision", nargs="+", choices=PRECISIONS, default=["bf16"], metavar="NAME", help=text)
    text = f"default: {' '.join(PUBLISHED_ROWS)}"
    add("--rows", nargs="+", choices=ROWS, default=PUBLISHED_ROWS, metavar="NAME", help=text)
    text = "images (default: 1 8 64)"
    add("--batch", nargs="+", type=positive, default=[1, 8, 64], metavar="N", help=text)
    add_job_options(parser)
    return parse_job_options(parser, arguments)


def jobs(options: argparse.Namespace) -> list[Job]:
    problems = itertools.product(options.config, options.precision, options.batch, options.rows)
    return [Job.of(options, *names, row, batch=batch) for *names, batch, row in problems]


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.job is not None:
        print(json.dumps(dataclasses.asdict(measure(Job(**options.job)))))
        return 0
    source = origin(options.device, shlex.join(["python", "benchmarks/inference.py", *arguments]))
    in_process = functools.partial(Row.in_process, script=__file__)
    for rows in measure_each(jobs(options), measure if options.one_process else in_process):
        title = "Evaluation under no_grad"
        text = write_rows(options.out / "inference", title, tables(rows), source, options, rows)
    print(text)
    ours = ("ours", "torchvision-converted")
    return int(any(row.ms is None for row in rows if model_and_way(row.row)[0] in ours))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

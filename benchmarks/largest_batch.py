"""Finds the largest batch whose train step fits into the memory of a GPU.

    python benchmarks/largest_batch.py                               # the published rows
    python benchmarks/largest_batch.py --config densenet264 --precision bf16 --rows plain ours

Networks, precisions, rows and the step are those of train_step.py, with cudnn.benchmark off. The
peak memory of two small batches, whose logits are compared with those of plain, gives a straight
line and with it a first guess. From there batches are tried, each in a process of its own (unless
--one-process), until one trains and the next larger one does not. Up to 100 every batch is a
candidate, above that steps are about 2 %.

Measured per row:
    batch      the largest that trains
    step ms    median wall-clock time of its steps, launched from Python
    samples/s  batch by that time
    peak GB    peak memory of a step, with parameters, optimizer state and images (1 GB = 1e9 bytes)
    next       the next larger batch, and how it ends

The table and the rows go into largest_batch.md and largest_batch.json, after each row. The exit
status is 1 where a row of ours has no batch.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common import (
    NETWORKS,
    PRECISIONS,
    RESULTS,
    Network,
    describing_parser,
    gigabytes,
    markdown_table,
    origin,
    origin_lines,
    positive,
    write,
)
from rows import (
    Job,
    ProcessFailed,
    add_one_process,
    checked_step,
    in_process,
    release_memory,
    summary,
    times_ms,
    warm_step,
)
from train_step import MODELS, train_step

# Configuration, precision and rows of the published table.
PUBLISHED = [
    ("densenet264", "bf16", ("plain", "checkpoint", "ours", "ours-features")),
    ("densenet121-3d", "bf16", ("monai", "monai-converted")),
]
WARMUP = 2
LARGEST = 10**6
USABLE = 0.97  # of the memory, for the first guess: the rest is lost between blocks


# ------------------------------------------------------------------------------------ measuring


@dataclasses.dataclass(frozen=True)
class Attempt(Job):
    """A job; it may compare its first logits with those of plain, which takes memory as well."""

    checks: bool = False


@dataclasses.dataclass(frozen=True)
class Trial:
    """How an attempt ended: with numbers, or with a note that says why there are none."""

    batch: int
    step_ms: float | None = None
    peak_bytes: int | None = None
    memory: int | None = None  # of the GPU
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found; None where there is no such number, and `note` says why."""

    config: str
    precision: str
    row: str
    batch: int | None = None
    step_ms: float | None = None
    peak_bytes: int | None = None
    next_batch: int | None = None
    next_note: str = ""
    note: str = ""

    @property
    def samples_per_s(self) -> float | None:
        return None if self.batch is None else 1e3 * self.batch / self.step_ms


def attempt(job: Attempt) -> Trial:
    release_memory()
    try:
        step = checked_step(job, train_step).step if job.checks else warm_step(job, train_step)
        torch.cuda.reset_peak_memory_stats()
        step_ms = statistics.median(times_ms(step, job.steps))
    except Exception as error:  # what torch and its libraries raise without memory varies
        return Trial(job.batch, note=summary(error))
    _, memory = torch.cuda.mem_get_info()
    return Trial(job.batch, step_ms, torch.cuda.max_memory_allocated(), memory)


def attempt_in_process(job: Attempt) -> Trial:
    try:
        return Trial(**in_process(__file__, job))
    except ProcessFailed as failure:
        return Trial(job.batch, note=str(failure))


# ------------------------------------------------------------------------------------- searching


def candidates() -> list[int]:
    """Batches in steps of 1 up to 100, and then of about 2 %."""
    sizes = [1]
    while sizes[-1] < LARGEST:
        sizes.append(sizes[-1] + max(1, sizes[-1] // 50))
    return sizes


def count_that_fit(fits: Callable[[int], bool], guess: int) -> int:
    """n such that `fits(n - 1)` and not `fits(n)`; `fits` is asked near the guess first.

    Away from the guess with steps that double, then between what fits and what does not.
    """
    low, high = 0, None  # all below low fit; high and more do not
    index, stride = guess, 1
    while high is None or low < high:
        if fits(index):
            low = index + 1
        else:
            high = index
        if high is None:
            index += stride
        elif low == 0:
            index = max(high - stride, 0)
        else:
            index = (low + high) // 2
        stride *= 2
    return low


def small_batches(network: Network) -> tuple[int, int]:
    """Large enough for memory to grow with the batch, small enough to fit everywhere."""
    batch = max(1, 2**17 // math.prod(network.sizes))
    return batch, 2 * batch


def first_guess(small: list[Trial]) -> float:
    """The batch at which a straight line through two trials meets the memory."""
    one, two = small
    per_sample = (two.peak_bytes - one.peak_bytes) / (two.batch - one.batch)
    return two.batch + (USABLE * two.memory - two.peak_bytes) / per_sample


def search(job: Job, one_process: bool = False) -> Row:
    fields = dataclasses.asdict(job)
    run = attempt if one_process else attempt_in_process

    def trial(batch: int, checks: bool = False) -> Trial:
        result = run(Attempt(**{**fields, "batch": batch, "checks": checks}))
        print(f"{job} {batch}: {result.note or 'trains'}", file=sys.stderr)
        return result

    row = Row(job.config, job.precision, job.row)
    small = [trial(batch, checks=True) for batch in small_batches(NETWORKS[job.config])]
    failed = [one for one in small if one.note]
    if failed:
        return dataclasses.replace(row, note=f"batch {failed[0].batch}: {failed[0].note}")
    sizes, trials = candidates(), {}

    def fits(index: int) -> bool:
        if index not in trials:
            trials[index] = trial(sizes[index])
        return not trials[index].note

    guess = bisect.bisect_right(sizes, max(1, first_guess(small))) - 1
    count = count_that_fit(fits, guess)
    following = trials[count]
    row = dataclasses.replace(row, next_batch=following.batch, next_note=following.note)
    if count == 0:
        return row
    best = trials[count - 1]
    return dataclasses.replace(
        row, batch=best.batch, step_ms=best.step_ms, peak_bytes=best.peak_bytes
    )


# -------------------------------------------------------------------------------------- results


def table(rows: list[Row]) -> str:
    columns = ["network", "precision", "row", "batch", "step ms", "samples/s", "peak GB"]
    columns += ["next", "note"]

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    cells = [
        [
            *(row.config, row.precision, row.row),
            "-" if row.batch is None else str(row.batch),
            *(number(row.step_ms), number(row.samples_per_s), gigabytes(row.peak_bytes)),
            "-" if row.next_batch is None else f"{row.next_batch}: {row.next_note}",
            row.note,
        ]
        for row in rows
    ]
    return markdown_table(columns, [[cell.replace("|", "\\|") for cell in line] for line in cells])


def write_runs(out: Path, runs: list[dict]) -> str:
    """Both files; returns the text of the table's."""
    text = "# Largest batch that trains on one GPU\n"
    for run in runs:
        rows = [Row(**row) for row in run["rows"]]
        text += f"\n{origin_lines(run['origin'])}- median of {run['steps']} steps after {WARMUP}, "
        text += f"cudnn.benchmark off\n\n{table(rows)}"
    write(out / "largest_batch", text, {"runs": runs})
    return text


# --------------------------------------------------------------------------------- command line


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = describing_parser(__doc__)
    add = parser.add_argument
    text = f"{', '.join(NETWORKS)} (default for all three: the published rows)"
    add("--config", nargs="+", choices=NETWORKS, metavar="NAME", help=text)
    add("--precision", nargs="+", choices=PRECISIONS, metavar="NAME", help=", ".join(PRECISIONS))
    add("--rows", nargs="+", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    add("--steps", type=positive, default=5, metavar="N", help="timed steps (default: 5)")
    text = "keep what the files hold of earlier runs, for a table that takes more than one"
    add("--append", action="store_true", help=text)
    add_one_process(parser)
    add("--out", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
    add("--job", type=json.loads, help=argparse.SUPPRESS)  # in the process of an attempt
    options = parser.parse_args(arguments)
    chosen = [options.config, options.precision, options.rows]
    if any(chosen) and not all(chosen):
        parser.error("--config, --precision and --rows are given together, or none of them")
    if options.job is None and not torch.cuda.is_available():
        parser.error("torch sees no GPU, whose memory this is about")
    return options


def jobs(options: argparse.Namespace) -> list[Job]:
    triples = [(config, precision, row) for config, precision, rows in PUBLISHED for row in rows]
    if options.config:
        triples = list(itertools.product(options.config, options.precision, options.rows))
    return [
        Job(*triple, batch=1, steps=options.steps, warmup=WARMUP, device="cuda",
            cudnn_benchmark=False)
        for triple in triples
    ]  # fmt: skip


def is_ours(row: str) -> bool:
    return row.startswith("ours") or row.endswith("-converted")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.job is not None:
        print(json.dumps(dataclasses.asdict(attempt(Attempt(**options.job)))))
        return 0
    earlier = options.out / "largest_batch.json"
    runs = json.loads(earlier.read_text())["runs"] if options.append and earlier.exists() else []
    command = shlex.join(["python", "benchmarks/largest_batch.py", *arguments])
    rows: list[Row] = []
    runs.append({"origin": origin("cuda", command), "steps": options.steps, "rows": []})
    for job in jobs(options):
        begin = time.monotonic()
        rows.append(search(job, options.one_process))
        runs[-1]["rows"].append(dataclasses.asdict(rows[-1]))
        text = write_runs(options.out, runs)
        print(f"{job}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    print(text)
    return int(any(row.batch is None for row in rows if is_ours(row.row)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Rows of a benchmark, on the weights and images of all rows; each in a process of its own, or all
in one.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from typing_extensions import Self

from common import (
    NETWORKS,
    PRECISIONS,
    RESULTS,
    Forward,
    Precision,
    origin_lines,
    positive,
    relative_error,
    set_tf32,
    write,
)

# How a model is called, where not from Python as it is: the name of such a row ends with this.
GRAPHED = "-graphed"
BUDGET = "-compiled-budget"
COMPILED: dict[str, dict[str, str]] = {
    "-compiled": {"mode": "reduce-overhead"},
    BUDGET: {"mode": "reduce-overhead"},
    "-cudagraphs": {"backend": "cudagraphs"},
    "-max-autotune": {"mode": "max-autotune"},
}
ACTIVATION_MEMORY_BUDGET = 0.2  # of what plain autograd keeps


def model_and_way(row: str) -> tuple[str, str]:
    """The names of a row's model and of how it is called."""
    way = max((way for way in (*COMPILED, GRAPHED) if row.endswith(way)), key=len, default="")
    return row.removesuffix(way), way


def is_launched_one_by_one(job: Job) -> bool:
    """On a GPU, and neither compiled nor graphed.

    The memory of a graph is allocated before a step, and it cannot be part of another graph.
    """
    return job.device == "cuda" and not model_and_way(job.row)[1]


def compiled(model: nn.Module, way: str) -> nn.Module:
    """The model as torch.compile makes it: itself where the way is another."""
    if way not in COMPILED:
        return model
    import torch._functorch.config  # compilers are slow to import

    torch._dynamo.reset()
    budget = ACTIVATION_MEMORY_BUDGET if way == BUDGET else 1.0
    torch._functorch.config.activation_memory_budget = budget
    model.compile(**COMPILED[way])
    return model


class NotTimed(Exception):
    """A row's result is not that of plain; the message says by how much."""


class ProcessFailed(Exception):
    """A script ended with an error; the message is its exit status and last line."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a row is measured with; it travels to the row's process as JSON."""

    config: str
    precision: str
    row: str
    batch: int
    steps: int
    warmup: int
    device: str
    cudnn_benchmark: bool

    def __str__(self) -> str:
        return f"{self.config} {self.precision} {self.row}"

    @classmethod
    def of(cls, options: argparse.Namespace, *identity: str, batch: int) -> Job:
        """Of a configuration, a precision and a row, measured as the command line says."""
        shared = ("steps", "warmup", "device", "cudnn_benchmark")
        return cls(*identity, batch, **{name: getattr(options, name) for name in shared})


@dataclasses.dataclass
class JobRow:
    """What was measured of a job. Its fields have defaults: `note` says why there is no number."""

    config: str
    precision: str
    row: str
    batch: int

    @classmethod
    def of(cls, job: Job, **measured) -> Self:
        return cls(job.config, job.precision, job.row, job.batch, **measured)

    @classmethod
    def measured(cls, job: Job, measure: Callable[[Job], dict]) -> Self:
        """The row of what `measure` returns, or of why it raised."""
        try:
            return cls.of(job, **measure(job))
        except NotTimed as error:
            return cls.of(job, note=str(error))
        except Exception as error:  # one row's failure is not the end of the others
            return cls.of(job, note=summary(error))

    @classmethod
    def in_process(cls, job: Job, script: str) -> Self:
        """The row that `script --job` prints as its last line, in a new process."""
        try:
            return cls(**in_process(script, job))
        except ProcessFailed as failure:
            return cls.of(job, note=str(failure))


def in_process(script: str, job: Job) -> dict[str, Any]:
    """What `script --job` prints as its last line, run in a new process."""
    command = [sys.executable, script, "--job", json.dumps(dataclasses.asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = ["", *done.stderr.split("\n")]
        reason = next((line for line in reversed(last) if line.strip()), "no output")
        raise ProcessFailed(f"exit status {done.returncode}: {reason[:160]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_each(jobs: list[Job], measure: Callable[[Job], JobRow]) -> Iterator[list]:
    """The rows so far, after each job."""
    rows = []
    for job in jobs:
        begin = time.monotonic()
        rows.append(measure(job))
        print(f"{job} batch {job.batch}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
        yield rows


def summary(error: BaseException) -> str:
    """The first sentence of an error, without the numbers and advice that follow it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split()).partition(". ")[0]
    return f"{type(error).__name__}: {text}"[:160]


def model_and_images(
    job: Job, build: Callable[..., nn.Module], precision: Precision
) -> tuple[nn.Module, Tensor]:
    """On the weights and the batch that all rows have."""
    network = NETWORKS[job.config]
    torch.manual_seed(0)
    model = build(**network.settings)
    torch.manual_seed(1)  # a model may draw more numbers than its weights need
    # On the device: drawing the largest batches on the host would take longer than their steps.
    images = torch.randn(job.batch, 3, *network.sizes, device=job.device, dtype=precision.dtype)
    memory_format = precision.format_of(images)
    model = model.to(job.device, dtype=precision.dtype, memory_format=memory_format)
    return model, images.contiguous(memory_format=memory_format)


@dataclasses.dataclass
class WarmStep:
    """A step that has run, the relative error of its first logits, and how long warming up took."""

    step: Forward
    logits_error: float
    warmup_s: float


def checked_step(job: Job, build: Callable[[Job, str], Forward]) -> WarmStep:
    """`build` makes the step of a row.

    Raises:
        NotTimed: the error is over the tolerance of the precision.
    """
    _configure(job)
    tolerance = PRECISIONS[job.precision].tolerance
    with torch.no_grad():
        expected = build(job, "plain").forward()
    release_memory()  # plain's is not to count as reserved
    step = build(job, job.row)
    begin = time.perf_counter()
    error = relative_error(step(), expected)
    if not error <= tolerance:
        raise NotTimed(
            f"not timed: logits differ from plain's by {error:.1e}, more than {tolerance}"
        )
    for _ in range(job.warmup):
        step()
    _synchronise()
    return WarmStep(step, error, time.perf_counter() - begin)


def release_memory() -> None:
    """What nobody refers to any more, and what torch's allocator keeps of it."""
    gc.collect()
    torch.cuda.empty_cache()


def warm_step(job: Job, build: Callable[[Job, str], Forward]) -> Forward:
    """The same without plain, which takes memory as well."""
    _configure(job)
    step = build(job, job.row)
    for _ in range(job.warmup):
        step()
    return step


def _configure(job: Job) -> None:
    set_tf32(PRECISIONS[job.precision].tf32)
    torch.backends.cudnn.benchmark = job.cudnn_benchmark


def times_ms(function: Callable[[], object], count: int, waits: bool = True) -> list[float]:
    """Wall-clock times of calls begun on an idle GPU, in order.

    Args:
        waits: to the end of the GPU's work; False: until a call returns, which is the host's time.
    """
    times = []
    for _ in range(count):
        _synchronise()
        begin = time.perf_counter()
        function()
        if waits:
            _synchronise()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def launched(function: Callable[[], object], count: int) -> list[Any]:
    """Kernels, copies and fills of so many calls on the GPU, a line of the profiler per name."""
    # Without the CPU's events, which would slow the launches down.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            function()
        torch.cuda.synchronize()
    return [
        event
        for event in profiler.key_averages()
        # Annotations such as the optimizer's span kernels that are listed themselves.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The whole step as a CUDA graph, after a warm-up on a side stream as torch's notes ask for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def graph_times(step: Callable[[], object], count: int) -> Mapping[str, float | str]:
    """Fields of a row: the times of a replay, or why there are none."""
    try:
        graph = capture(step)
        graph.replay()
        times = times_ms(graph.replay, count)
    except Exception as error:  # what a peer or torch raises here is not ours to choose
        return {"note": why_no_graph(error)}
    return median_and_least("graph_ms", times)


def why_no_graph(error: BaseException) -> str:
    """Ending a broken capture raises again; what broke it is the context of that."""
    return f"no graph: {summary(error.__context__ or error)}"


def median_and_least(field: str, times: list[float]) -> dict[str, float]:
    """The fields of a row that times are told by."""
    return {field: statistics.median(times), f"{field}_min": min(times)}


# -------------------------------------------------------------------- command line and results


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """How jobs are measured, and where results go."""
    add = parser.add_argument
    add("--steps", type=positive, default=30, metavar="N", help="timed steps (default: 30)")
    add("--warmup", type=positive, default=10, metavar="N", help="steps before (default: 10)")
    text = "cpu measures no memory and no graph; it is there to try the script"
    add("--device", choices=("cuda", "cpu"), default="cuda", help=text)
    text = "let cuDNN time its algorithms (torch's default is not to)"
    add("--cudnn-benchmark", action="store_true", help=text)
    add_one_process(parser)
    add("--out", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
    add("--job", type=json.loads, help=argparse.SUPPRESS)  # one row, in the process of that row


def add_one_process(parser: argparse.ArgumentParser) -> None:
    text = "measure one after the other in one process: several times faster, but a row that ends "
    text += "the process ends all, and kernels that one has loaded are there for the next"
    parser.add_argument("--one-process", action="store_true", help=text)


def parse_job_options(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available() and options.job is None:
        parser.error("torch sees no GPU; --device cpu tries the script without one")
    return options


def write_rows(
    stem: Path, title: str, table: str, source: dict, options: argparse.Namespace, rows: list
) -> str:
    """Both files, with how the rows were timed; returns the text of the table's."""
    benchmark = "on" if options.cudnn_benchmark else "off"
    processes = "one process" if options.one_process else "a process per row"
    text = (
        f"# {title}\n\n{origin_lines(source)}"
        f"- median and minimum of {options.steps} steps after {options.warmup}, "
        f"cudnn.benchmark {benchmark}, {processes}\n\n{table}"
    )
    content = {
        "origin": source,
        "steps": options.steps,
        "warmup": options.warmup,
        "cudnn_benchmark": options.cudnn_benchmark,
        "one_process": options.one_process,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write(stem, text, content)
    return text

"""Times a train step of DenseNets under DistributedDataParallel, on GPUs of one host.

    python benchmarks/data_parallel.py                                # DenseNet-121 on two GPUs
    python benchmarks/data_parallel.py --processes 8 --models ours
    python benchmarks/data_parallel.py --config bc100 --precision tf32 bf16

A step is that of train_step.py, and so are the models. Every process has a GPU and a batch of its
own. Each row is a model in one of these ways, in new processes:

    single        one process without DistributedDataParallel, launched from Python; also its
                  whole step replayed from a CUDA graph
    ddp           DistributedDataParallel as it is by default, launched from Python
    ddp-settings  with broadcast_buffers=False, gradient_as_bucket_view=True and static_graph=True
    ddp-graph     the whole step, its communication included, replayed from a CUDA graph; with the
                  first two of these settings (static_graph saves the host work, which a graph has
                  none of)

A row is timed only if the logits of its first step are finite and the gradients of that step are
the same in all processes; ddp-graph only if that holds after a replay, too.

Measured per row:
    step ms         wall-clock time of a step launched from Python, to the end of its GPU work
    host ms         median time until the host has launched a step on an idle GPU
    graph ms        the same as step ms of the step replayed from a CUDA graph
    activations GB  peak memory of a step above what is allocated before it (1 GB = 1e9 bytes)
    efficiency      the time of single over that of the row: of two launched steps, or of two
                    replayed ones

The processes begin each step together. The time of a step is that of the slowest process, and so
is the memory. A row whose processes are not done after two minutes is given up.

The table and the rows go into data_parallel.md and data_parallel.json, after each row. The exit
status is 1 where a launched row of ours could not be timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common import (
    NETWORKS,
    PRECISIONS,
    RESULTS,
    TrainStep,
    describing_parser,
    gigabytes,
    markdown_table,
    milliseconds,
    origin,
    origin_lines,
    peak_activation_bytes,
    positive,
    set_tf32,
    write,
)
from rows import (
    Job,
    JobRow,
    NotTimed,
    graph_times,
    measure_each,
    median_and_least,
    model_and_images,
    times_ms,
    why_no_graph,
)
from train_step import MODELS

SINGLE, GRAPH = "single", "ddp-graph"
# Of DistributedDataParallel.
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-settings": {
        "broadcast_buffers": False,
        "gradient_as_bucket_view": True,
        "static_graph": True,
    },
    GRAPH: {"broadcast_buffers": False, "gradient_as_bucket_view": True},
}
# DistributedDataParallel times its first ten steps with events, and then every hundredth: waiting
# for them cannot be part of a graph. With the first step, the captured one is the 13th.
STEPS_BEFORE_CAPTURE = 11
TIMEOUT_S = 120  # of a row

T = TypeVar("T")


@dataclasses.dataclass
class Row(JobRow):
    model: str = ""
    processes: int = 1
    step_ms: float | None = None
    step_ms_min: float | None = None
    host_ms: float | None = None
    graph_ms: float | None = None
    graph_ms_min: float | None = None
    activation_bytes: int | None = None
    note: str = ""


# --------------------------------------------------------------------------- between processes


def of_all(value: T) -> list[T]:
    """What the processes of a row have, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def slowest_ms(function: Callable[[], object], count: int, waits: bool = True) -> list[float]:
    """`times_ms` of the slowest process in each call; all begin a call together."""
    times: list[float] = []
    for _ in range(count):
        if dist.is_initialized():
            dist.barrier()
        times += times_ms(function, 1, waits)
    return [max(call) for call in zip(*of_all(times), strict=True)]


def join_others(job: Job, rank: int, processes: int, rendezvous: str) -> None:
    on_gpu = job.device == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=processes,
        device_id=torch.device("cuda", rank) if on_gpu else None,
    )


# ------------------------------------------------------------------------------------ measuring


def model_and_way(row: str) -> tuple[str, str]:
    """Of the row of a job."""
    model, way = row.split()
    return model, way


def train_step(job: Job, rank: int) -> TrainStep:
    precision = PRECISIONS[job.precision]
    name, way = model_and_way(job.row)
    model, images = model_and_images(job, MODELS[name], precision)
    torch.manual_seed(2 + rank)  # with the same images, gradients would agree without a reduction
    images.normal_()
    target = torch.randint(NETWORKS[job.config].num_classes, (job.batch,)).to(job.device)
    if way in SETTINGS:
        device_ids = [rank] if job.device == "cuda" else None
        model = DistributedDataParallel(model, device_ids=device_ids, **SETTINGS[way])
    return TrainStep(model, images, target, precision.autocast)


def check(step: TrainStep, logits: Tensor) -> None:
    """The momentum is the first gradient, and later a sum of all: it differs where one differs.

    Raises:
        NotTimed: in all processes alike.
    """
    if not all(of_all(bool(logits.isfinite().all()))):
        raise NotTimed("not timed: logits are not finite")
    momenta = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    norms = of_all(torch.stack([momentum.double().norm() for momentum in momenta]).norm().item())
    if any(norm != norms[0] for norm in norms):
        listed = ", ".join(f"{norm:.6g}" for norm in norms)
        raise NotTimed(f"not timed: gradients of the processes have norms {listed}")


def warm_step(job: Job, rank: int, warmup: int) -> TrainStep:
    """Checked, too."""
    step = train_step(job, rank)
    check(step, step())
    for _ in range(warmup):
        step()
    return step


def launched_measurements(job: Job, rank: int) -> dict:
    """Fields of `Row`."""
    on_gpu = job.device == "cuda"
    step = warm_step(job, rank, job.warmup)
    activation_bytes = max(of_all(peak_activation_bytes(step))) if on_gpu else None
    times = slowest_ms(step, job.steps)
    host_times = slowest_ms(step, job.steps, waits=False)
    is_single = model_and_way(job.row)[1] == SINGLE
    return {
        **median_and_least("step_ms", times),
        "host_ms": statistics.median(host_times),
        "activation_bytes": activation_bytes,
        **(graph_times(step, job.steps) if is_single and on_gpu else {}),
    }


def graph_measurements(job: Job, rank: int) -> dict:
    """Fields of `Row`.

    All is on one stream that is not the default one, as torch's notes on CUDA graphs ask for:
    gradients are accumulated on the stream that DistributedDataParallel was constructed on. It
    lets gradients be None before a step: backward then copies them into its buckets, whose
    memory stays, and makes them views of these.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step = warm_step(job, rank, STEPS_BEFORE_CAPTURE)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            logits = step()
    except Exception as error:  # what torch raises here is not ours to choose
        raise NotTimed(why_no_graph(error)) from error
    graph.replay()
    check(step, logits)
    return median_and_least("graph_ms", slowest_ms(graph.replay, job.steps))


def measurements(job: Job, rank: int, processes: int, rendezvous: str) -> dict:
    """Fields of `Row`, the same in all processes."""
    way = model_and_way(job.row)[1]
    if job.device == "cuda":
        torch.cuda.set_device(rank)
    if way == GRAPH:
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # it would query events in a capture
    if way != SINGLE:
        join_others(job, rank, processes, rendezvous)
    set_tf32(PRECISIONS[job.precision].tf32)
    return (graph_measurements if way == GRAPH else launched_measurements)(job, rank)


# ------------------------------------------------------------------------------ processes of a row


def process(job: Job, rank: int, processes: int, rendezvous: str, report: Connection) -> None:
    """One of a row: reports the row, or why there is none."""
    measure = functools.partial(measurements, rank=rank, processes=processes, rendezvous=rendezvous)
    report.send(Row.measured(job, measure))


def start(job: Job, rank: int, processes: int, rendezvous: str) -> tuple[SpawnProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    started = context.Process(target=process, args=(job, rank, processes, rendezvous, theirs))
    started.start()
    theirs.close()  # so that ours ends with the process
    return started, ours


def first_report(job: Job, started: list[tuple[SpawnProcess, Connection]]) -> Row:
    """Of any process: where one has failed, the others may wait for it without end."""
    ready = wait([report for _, report in started], TIMEOUT_S)
    for ended, report in started:
        if report in ready:
            try:
                row: Row = report.recv()
                return row
            except EOFError:
                ended.join()
                return Row.of(job, note=f"a process ended with exit status {ended.exitcode}")
    return Row.of(job, note=f"given up after {TIMEOUT_S} s")


def in_processes(job: Job, processes: int) -> Row:
    """The row of a job, measured in so many processes unless it is of a single one."""
    model, way = model_and_way(job.row)
    count = 1 if way == SINGLE else processes
    if way == GRAPH and job.device == "cpu":
        row = Row.of(job, note="a graph of the whole step: on a GPU only")
    else:
        with tempfile.TemporaryDirectory() as folder:
            rendezvous = f"{folder}/rendezvous"
            started = [start(job, rank, count, rendezvous) for rank in range(count)]
            try:
                row = first_report(job, started)
            finally:
                for running, _ in started:
                    running.kill()  # a process group would wait for the graphs that it is part of
                    running.join()
    return dataclasses.replace(row, model=model, row=way, processes=count)


# -------------------------------------------------------------------------------------- results


def efficiency(row: Row, rows: list[Row]) -> float | None:
    """Time of the single process over that of the row, both launched or both replayed."""
    field = "graph_ms" if row.row == GRAPH else "step_ms"
    problem = (row.config, row.precision, row.model, SINGLE)
    for other in rows:
        if (other.config, other.precision, other.model, other.row) == problem:
            single, time = getattr(other, field), getattr(row, field)
            return None if single is None or time is None else single / time
    return None


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def table(rows: list[Row]) -> str:
    columns = ["network", "precision", "model", "row", "processes", "step ms", "min", "host ms"]
    columns += ["graph ms", "min", "activations GB", "efficiency", "note"]
    cells = [
        [
            *(row.config, row.precision, row.model, row.row, str(row.processes)),
            *map(milliseconds, (row.step_ms, row.step_ms_min, row.host_ms)),
            *map(milliseconds, (row.graph_ms, row.graph_ms_min)),
            gigabytes(row.activation_bytes),
            ratio(efficiency(row, rows)),
            row.note.replace("|", "\\|"),
        ]
        for row in rows
    ]
    return markdown_table(columns, cells)


def backend(device: str) -> str:
    return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if device == "cuda" else "gloo"


def write_results(options: argparse.Namespace, source: dict, rows: list[Row]) -> str:
    """Both files; returns the text of the table's."""
    text = (
        f"# Train step in several processes, batch {options.batch} in each\n\n"
        f"{origin_lines(source)}- {options.processes} processes over {source['backend']}\n"
        f"- median and minimum of {options.steps} steps after {options.warmup}, each the slowest "
        f"process's\n\n{table(rows)}"
    )
    content = {
        "origin": source,
        "steps": options.steps,
        "warmup": options.warmup,
        "rows": [dataclasses.asdict(row) | {"efficiency": efficiency(row, rows)} for row in rows],
    }
    write(options.out / "data_parallel", text, content)
    return text


# --------------------------------------------------------------------------------- command line


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = describing_parser(__doc__)
    add = parser.add_argument
    text = f"{', '.join(NETWORKS)} (default: densenet121)"
    add("--config", nargs="+", choices=NETWORKS, default=["densenet121"], metavar="NAME", help=text)
    text = f"{', '.join(PRECISIONS)} (default: bf16-autocast)"
    default = ["bf16-autocast"]
    add("--precision", nargs="+", choices=PRECISIONS, default=default, metavar="NAME", help=text)
    text = f"{', '.join(MODELS)} (default: ours plain)"
    default = ["ours", "plain"]
    add("--models", nargs="+", choices=MODELS, default=default, metavar="NAME", help=text)
    add("--processes", type=positive, default=2, metavar="N", help="GPUs (default: 2)")
    add("--batch", type=positive, default=64, metavar="N", help="images of each (default: 64)")
    add("--steps", type=positive, default=20, metavar="N", help="timed steps (default: 20)")
    text = f"launched steps before (default: 12; {GRAPH} has {STEPS_BEFORE_CAPTURE})"
    add("--warmup", type=positive, default=12, metavar="N", help=text)
    text = "cpu communicates by gloo and measures no memory and no graph; it is there to try the "
    text += "script"
    add("--device", choices=("cuda", "cpu"), default="cuda", help=text)
    add("--out", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
    parser.set_defaults(cudnn_benchmark=False)
    options = parser.parse_args(arguments)
    count = torch.cuda.device_count()
    if options.device == "cuda" and count < options.processes:
        advice = "--device cpu tries the script without any"
        parser.error(f"--processes {options.processes}: GPUs that torch sees: {count}; {advice}")
    return options


def jobs(options: argparse.Namespace) -> list[Job]:
    """The single process first: it is what the others are compared with."""
    rows = itertools.product(options.config, options.precision, options.models, (SINGLE, *SETTINGS))
    return [Job.of(options, *names, f"{m} {way}", batch=options.batch) for *names, m, way in rows]


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    command = shlex.join(["python", "benchmarks/data_parallel.py", *arguments])
    source = origin(options.device, command) | {"backend": backend(options.device)}
    measure = functools.partial(in_processes, processes=options.processes)
    for rows in measure_each(jobs(options), measure):
        text = write_results(options, source, rows)
    print(text)
    ours = (row for row in rows if row.model.startswith("ours") and row.row != GRAPH)
    return int(any(row.step_ms is None for row in ours))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

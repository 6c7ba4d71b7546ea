"""Times a train step of DenseNets and measures its memory, beside other implementations.

    python benchmarks/train_step.py                                  # the published rows
    python benchmarks/train_step.py --config densenet264 --precision bf16 --rows ours plain
    python benchmarks/train_step.py --config bc100 --precision tf32 --profile ours

A step is forward, cross entropy, backward, SGD with momentum and `zero_grad(set_to_none=True)` on
one random batch. Each row runs in a process of its own (unless --one-process) and is

    ours           DenseNet(efficient=True, recompute="bottleneck")
    ours-features  DenseNet(efficient=True, recompute="features")
    plain          DenseNet(efficient=False)
    checkpoint     plain, dense layers checkpointed (checkpointed.py)
    torchvision    torchvision's DenseNet; torchvision-me with memory_efficient=True,
                   torchvision-converted by efficient_densenet.convert
    timm           timm's DenseNet; timm-me and timm-converted likewise
    monai          MONAI's DenseNet, in 2 or 3 dimensions; monai-converted likewise

or one of these with another name behind it, which says how the model is called:

    -compiled         by torch.compile(mode="reduce-overhead"); -compiled-budget the same with an
                      activation_memory_budget of 0.2
    -cudagraphs       by torch.compile(backend="cudagraphs")
    -max-autotune     by torch.compile(mode="max-autotune")
    -graphed          by efficient_densenet.graphed: forward and backward are launched as one CUDA
                      graph each, the rest from Python

on the same weights and images. For 32x32 images, the stem of torchvision and timm is replaced by
the one of plain. A row is timed only if the logits of its first step are those of plain to the
rounding of its precision. (The loss says less: it moves by 0.3 % where one ReLU is left out.)

Measured per row:
    step ms         wall-clock time of a step launched from Python, to the end of its GPU work
    host ms         median time until the host has launched a step on an idle GPU (it waits where
                    the GPU is far behind)
    launches        kernels, copies and fills of a step, counted by the profiler
    graph ms        the same of the whole step replayed from a CUDA graph
    activations GB  peak memory of a step above what is allocated before it, when parameters,
                    optimizer state and inputs exist and gradients are None (1 GB = 1e9 bytes)
    reserved GB     all that torch's allocator holds after the timed steps
    warm-up s       time of the first step and of those before the timed ones, compilation included

Precisions: fp32 has TF32 off and tf32 has it on, for convolutions and matrix products; bf16 and
fp16 convert model and images, in channels last; bf16-autocast and fp16-autocast leave both in
float32, in channels last. There is no loss scaling.

The table and the rows go into train_step.md and train_step.json, after each row. The exit status
is 1 where a row of ours could not be timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable

import torch
from torch import nn

import efficient_densenet
from common import (
    DENSENETS,
    NETWORKS,
    PRECISIONS,
    TrainStep,
    describing_parser,
    gigabytes,
    markdown_table,
    milliseconds,
    origin,
    origin_lines,
    peak_activation_bytes,
    positive,
    seconds,
)
from rows import (
    BUDGET,
    COMPILED,
    GRAPHED,
    Job,
    JobRow,
    NotTimed,
    add_job_options,
    checked_step,
    compiled,
    graph_times,
    is_launched_one_by_one,
    launched,
    measure_each,
    median_and_least,
    model_and_images,
    model_and_way,
    parse_job_options,
    times_ms,
    write_rows,
)

PROFILED_STEPS = 10
PROFILED_KERNELS = 25


# Configurations, precisions and rows of the published table.
PUBLISHED = list(itertools.product(("bc100", "densenet121"), ("bf16-autocast", "bf16", "tf32")))
PUBLISHED_ROWS = [
    model + way
    for model in (*DENSENETS, "torchvision-converted")
    for way in ("", "-compiled", GRAPHED)
]
PUBLISHED_ROWS.insert(PUBLISHED_ROWS.index("plain-compiled") + 1, "plain" + BUDGET)


# ------------------------------------------------------------------------------------- networks


def as_ours(
    build: Callable[..., nn.Module],
    name_of: Callable[[str], str],
    small_inputs: bool,
    spatial_dims: int,
    **settings,
) -> nn.Module:
    """A DenseNet of another library with the stem and the weights of plain; `name_of` a weight."""
    plain = DENSENETS["plain"](  # first: as the seed has it
        small_inputs=small_inputs, spatial_dims=spatial_dims, **settings
    )
    theirs = build(spatial_dims=spatial_dims, **settings)
    if small_inputs:
        stem = nn.Conv2d(3, settings["num_init_features"], kernel_size=3, padding=1, bias=False)
        theirs.features.conv0 = stem
        for name in ("norm0", "relu0", "pool0"):
            if hasattr(theirs.features, name):  # timm's norm0 holds the ReLU
                setattr(theirs.features, name, nn.Identity())
    theirs.load_state_dict({name_of(name): x for name, x in plain.state_dict().items()})
    return theirs


def torchvisions_name(name: str) -> str:
    return name.replace("norm_final", "norm5")


def monais_name(name: str) -> str:
    name = torchvisions_name(name).replace("classifier.", "class_layers.out.")
    return re.sub(r"(denselayer[0-9]+)\.", r"\1.layers.", name)


def only_images(library: str, spatial_dims: int) -> None:
    if spatial_dims != 2:
        raise NotTimed(f"{library} has DenseNets for images only")


def torchvision_densenet(memory_efficient: bool, **settings) -> nn.Module:
    from torchvision.models import DenseNet  # imports are slow: only where a row needs them

    def build(spatial_dims: int, **settings) -> nn.Module:
        only_images("torchvision", spatial_dims)
        return DenseNet(memory_efficient=memory_efficient, **settings)

    return as_ours(build, torchvisions_name, **settings)


def timm_densenet(memory_efficient: bool, **settings) -> nn.Module:
    from timm.models.densenet import DenseNet

    def build(spatial_dims: int, num_init_features: int, **settings) -> nn.Module:
        only_images("timm", spatial_dims)
        # Its stem always has two growth rates of channels; loading the weights checks that.
        return DenseNet(memory_efficient=memory_efficient, **settings)

    return as_ours(build, torchvisions_name, **settings)


def monai_densenet(**settings) -> nn.Module:
    from monai.networks.nets import DenseNet

    def build(spatial_dims: int, num_init_features: int, num_classes: int, **settings):
        return DenseNet(spatial_dims, 3, num_classes, init_features=num_init_features, **settings)

    return as_ours(build, monais_name, **settings)


def converted(build: Callable[..., nn.Module], **settings) -> nn.Module:
    return efficient_densenet.convert(build(**settings), strict=True)


TORCHVISION = functools.partial(torchvision_densenet, False)
TIMM = functools.partial(timm_densenet, False)
MODELS: dict[str, Callable[..., nn.Module]] = {
    **DENSENETS,
    "torchvision": TORCHVISION,
    "torchvision-me": functools.partial(torchvision_densenet, True),
    "torchvision-converted": functools.partial(converted, TORCHVISION),
    "timm": TIMM,
    "timm-me": functools.partial(timm_densenet, True),
    "timm-converted": functools.partial(converted, TIMM),
    "monai": monai_densenet,
    "monai-converted": functools.partial(converted, monai_densenet),
}
ROWS = [model + way for model in MODELS for way in ("", *COMPILED, GRAPHED)]


# ------------------------------------------------------------------------------------ measuring


@dataclasses.dataclass
class Row(JobRow):
    logits_error: float | None = None
    step_ms: float | None = None
    step_ms_min: float | None = None
    host_ms: float | None = None
    launches: float | None = None
    graph_ms: float | None = None
    graph_ms_min: float | None = None
    activation_bytes: int | None = None
    reserved_bytes: int | None = None
    warmup_s: float | None = None
    note: str = ""


def train_step(job: Job, row: str) -> TrainStep:
    precision = PRECISIONS[job.precision]
    name, way = model_and_way(row)
    model, images = model_and_images(job, MODELS[name], precision)
    model = compiled(model, way)
    if way == GRAPHED:
        if job.device == "cpu":
            raise NotTimed("graphs of forward and backward: on a GPU only")
        model = efficient_densenet.graphed(model)
    target = torch.randint(NETWORKS[job.config].num_classes, (job.batch,)).to(job.device)
    return TrainStep(model, images, target, precision.autocast)


def measurements(job: Job) -> dict:
    """Fields of `Row`."""
    warm = checked_step(job, train_step)
    step, on_gpu = warm.step, job.device == "cuda"
    launched_one_by_one = is_launched_one_by_one(job)
    activation_bytes = peak_activation_bytes(step) if launched_one_by_one else None
    return {
        "logits_error": warm.logits_error,
        **median_and_least("step_ms", times_ms(step, job.steps)),
        "host_ms": statistics.median(times_ms(step, job.steps, waits=False)),
        "launches": launches(launched(step, PROFILED_STEPS)) if on_gpu else None,
        "activation_bytes": activation_bytes,
        "reserved_bytes": torch.cuda.memory_reserved() if on_gpu else None,
        "warmup_s": warm.warmup_s,
        # Last: a capture that breaks may leave the process unusable, and its pool is not part
        # of what is reserved above.
        **(graph_times(step, job.steps) if launched_one_by_one else {}),
    }


def launches(events: list) -> float:
    """Of one step."""
    return sum(event.count for event in events) / PROFILED_STEPS


def measure(job: Job) -> Row:
    return Row.measured(job, measurements)


# ------------------------------------------------------------------------------------ profiling


def profile(job: Job) -> str:
    """Where the time of a step goes: host and GPU, and the kernels that take most of it."""
    step = checked_step(job, train_step).step
    step_ms = statistics.median(times_ms(step, job.steps))
    host_ms = statistics.median(times_ms(step, job.steps, waits=False))
    kernels = launched(step, PROFILED_STEPS)
    kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
    gpu_us = sum(event.self_device_time_total for event in kernels) / PROFILED_STEPS
    rows = [
        [
            f"{event.self_device_time_total / PROFILED_STEPS:.1f}",
            f"{event.self_device_time_total / PROFILED_STEPS / gpu_us:.1%}",
            f"{event.count / PROFILED_STEPS:g}",
            event.key[:120],
        ]
        for event in kernels[:PROFILED_KERNELS]
    ]
    return (
        f"{job}, batch {job.batch}, per step (median, without the profiler; kernels: mean of "
        f"{PROFILED_STEPS} profiled steps):\n"
        f"- {step_ms:.2f} ms from the first launch to the end of the GPU's work\n"
        f"- {host_ms:.2f} ms until the host has launched everything (it waits where the GPU is far "
        f"behind)\n"
        f"- {gpu_us / 1e3:.2f} ms of GPU time in {launches(kernels):g} kernels, copies and "
        f"fills\n\n" + markdown_table(["us", "share", "launches", "kernel"], rows)
    )


# -------------------------------------------------------------------------------------- results


def table(rows: list[Row]) -> str:
    columns = ["network", "precision", "row", "step ms", "min", "host ms", "launches"]
    columns += ["graph ms", "min", "activations GB", "reserved GB", "warm-up s", "note"]
    cells = [
        [
            *(row.config, row.precision, row.row),
            *map(milliseconds, (row.step_ms, row.step_ms_min, row.host_ms)),
            "-" if row.launches is None else f"{row.launches:g}",
            *map(milliseconds, (row.graph_ms, row.graph_ms_min)),
            *map(gigabytes, (row.activation_bytes, row.reserved_bytes)),
            seconds(row.warmup_s),
            row.note.replace("|", "\\|"),
        ]
        for row in rows
    ]
    return markdown_table(columns, cells)


# --------------------------------------------------------------------------------- command line


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = describing_parser(__doc__)
    add = parser.add_argument
    add("--config", nargs="+", choices=NETWORKS, metavar="NAME", help=", ".join(NETWORKS))
    pairs = ", ".join(" ".join(pair) for pair in PUBLISHED)
    text = f"{', '.join(PRECISIONS)} (default for both: {pairs}; for one: all of its values there)"
    add("--precision", nargs="+", choices=PRECISIONS, metavar="NAME", help=text)
    text = f"default: {' '.join(PUBLISHED_ROWS)}"
    add("--rows", nargs="+", choices=ROWS, metavar="NAME", help=text)
    text = "every configuration, precision and model, called from Python as it is"
    add("--all", action="store_true", help=text)
    text = "instead, where one row's time goes: kernels, GPU and host; takes one --config and "
    text += "--precision, writes profile_CONFIG_PRECISION_ROW.txt"
    add("--profile", choices=ROWS, metavar="ROW", help=text)
    add("--batch", type=positive, default=64, metavar="N", help="images (default: 64)")
    add_job_options(parser)
    options = parse_job_options(parser, arguments)
    if options.profile and not (len(options.config or []) == len(options.precision or []) == 1):
        parser.error("--profile takes one --config and one --precision")
    if options.profile and options.device == "cpu":
        parser.error("--profile shows the kernels of a GPU: not with --device cpu")
    return options


def jobs(options: argparse.Namespace) -> list[Job]:
    pairs = PUBLISHED
    if options.all or options.config or options.precision:
        configs, precisions = (list(dict.fromkeys(names)) for names in zip(*PUBLISHED, strict=True))
        if options.all:
            configs, precisions = list(NETWORKS), list(PRECISIONS)
        pairs = list(itertools.product(options.config or configs, options.precision or precisions))
    rows = options.rows or (list(MODELS) if options.all else PUBLISHED_ROWS)
    return [Job.of(options, *pair, row, batch=options.batch) for pair in pairs for row in rows]


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.job is not None:
        print(json.dumps(dataclasses.asdict(measure(Job(**options.job)))))
        return 0
    source = origin(options.device, shlex.join(["python", "benchmarks/train_step.py", *arguments]))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.profile:
        return run_profile(options, source)
    in_process = functools.partial(Row.in_process, script=__file__)
    for rows in measure_each(jobs(options), measure if options.one_process else in_process):
        stem, title = options.out / "train_step", f"Train step, batch {options.batch}"
        text = write_rows(stem, title, table(rows), source, options, rows)
    print(text)
    return int(any(row.step_ms is None for row in rows if row.row.startswith("ours")))


def run_profile(options: argparse.Namespace, source: dict) -> int:
    identity = (options.config[0], options.precision[0], options.profile)
    one = Job.of(options, *identity, batch=options.batch)
    try:
        text = f"{origin_lines(source)}\n{profile(one)}"
    except NotTimed as error:
        print(f"{one}: {error}", file=sys.stderr)
        return 1
    (options.out / f"profile_{str(one).replace(' ', '_')}.txt").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

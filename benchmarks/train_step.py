"""Times a train step of DenseNets and measures its memory, beside other implementations.

    python benchmarks/train_step.py                                  # the published rows
    python benchmarks/train_step.py --config densenet264 --precision bf16 --rows ours plain
    python benchmarks/train_step.py --config bc100 --precision tf32 --profile ours

A step is forward, cross entropy, backward, SGD with momentum and `zero_grad(set_to_none=True)` on
one random batch. Each row runs in a process of its own and is

    ours           DenseNet(efficient=True, recompute="bottleneck")
    ours-features  DenseNet(efficient=True, recompute="features")
    plain          DenseNet(efficient=False)
    checkpoint     plain, dense layers checkpointed (checkpointed.py)
    torchvision    torchvision's DenseNet; torchvision-me with memory_efficient=True,
                   torchvision-converted by efficient_densenet.convert
    timm           timm's DenseNet; timm-me and timm-converted likewise
    monai          MONAI's DenseNet, in 2 or 3 dimensions; monai-converted likewise
    compile        torch.compile of plain; compile-budget with activation_memory_budget=0.2

on the same weights and images. For 32x32 images, the stem of torchvision and timm is replaced by
the one of plain. A row is timed only if the logits of its first step are those of plain to the
rounding of its precision. (The loss says less: it moves by 0.3 % where one ReLU is left out.)

Measured per row:
    step ms         wall-clock time of a step launched from Python, to the end of its GPU work
    graph ms        the same of the whole step replayed from a CUDA graph
    activations GB  peak memory of a step above what is allocated before it, when parameters,
                    optimizer state and inputs exist and gradients are None (1 GB = 1e9 bytes)
    reserved GB     all that torch's allocator holds after the timed steps

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
import gc
import itertools
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

import efficient_densenet
from common import (
    DENSENETS,
    RESULTS,
    ProcessFailed,
    TrainStep,
    gigabytes,
    in_process,
    markdown_table,
    origin,
    origin_lines,
    peak_activation_bytes,
    positive,
    set_tf32,
)

PROFILED_STEPS = 10
PROFILED_KERNELS = 25


@dataclasses.dataclass(frozen=True)
class Network:
    """Settings of `DenseNet`, and the size of its images."""

    growth_rate: int
    block_config: tuple[int, ...]
    num_init_features: int
    small_inputs: bool = False
    spatial_dims: int = 2

    @property
    def settings(self) -> dict:
        return {**dataclasses.asdict(self), "num_classes": self.num_classes}

    @property
    def num_classes(self) -> int:
        return 10 if self.small_inputs else 1000

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of an image."""
        return (
            {2: 32 if self.small_inputs else 224, 3: 96}[self.spatial_dims],
        ) * self.spatial_dims


NETWORKS = {
    "bc40": Network(12, (6, 6, 6), 24, small_inputs=True),  # for a CPU
    "bc100": Network(12, (16, 16, 16), 24, small_inputs=True),
    "bc190": Network(40, (31, 31, 31), 80, small_inputs=True),
    "densenet121": Network(32, (6, 12, 24, 16), 64),
    "densenet201": Network(32, (6, 12, 48, 32), 64),
    "densenet264": Network(48, (6, 12, 64, 48), 96),
    "densenet121-3d": Network(32, (6, 12, 24, 16), 64, spatial_dims=3),  # 96^3 voxels
}


@dataclasses.dataclass(frozen=True)
class Precision:
    """How a step computes, and how far its logits may be from those of plain.

    The tolerance is a few times what rounding does to plain: with batches of random images, the
    relative L2 error is up to 4e-3 in float16 and 3e-2 in bfloat16. A ReLU left out gives 6e-2 to
    1.4e-1, so bfloat16 shows gross mistakes only; the tests are what is exact.
    """

    tolerance: float
    tf32: bool = False
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    memory_format: torch.memory_format = torch.channels_last

    def format_of(self, images: Tensor) -> torch.memory_format:
        """`memory_format` for as many dimensions as the images have."""
        is_3d = images.dim() == 5 and self.memory_format == torch.channels_last
        return torch.channels_last_3d if is_3d else self.memory_format


PRECISIONS = {
    "fp32": Precision(1e-3, memory_format=torch.contiguous_format),
    "tf32": Precision(2e-2, tf32=True, memory_format=torch.contiguous_format),
    "bf16": Precision(1e-1, dtype=torch.bfloat16),
    "fp16": Precision(2e-2, dtype=torch.float16),
    "bf16-autocast": Precision(1e-1, autocast=torch.bfloat16),
    "fp16-autocast": Precision(2e-2, autocast=torch.float16),
}

# Configurations and precisions of the published table.
PUBLISHED = [
    *(("bc100", precision) for precision in ("fp32", "tf32", "bf16")),
    *(("densenet121", precision) for precision in ("tf32", "bf16")),
]


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


def compiled_densenet(activation_memory_budget: float, **settings) -> nn.Module:
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = activation_memory_budget
    return torch.compile(DENSENETS["plain"](**settings))


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
    "compile": functools.partial(compiled_densenet, 1.0),
    "compile-budget": functools.partial(compiled_densenet, 0.2),
}
EAGER_ROWS = [name for name in MODELS if not name.startswith("compile")]


# ------------------------------------------------------------------------------------ measuring


class NotTimed(Exception):
    """A row's result is not that of plain; the message says by how much."""


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


@dataclasses.dataclass
class Row:
    """What was measured; None where there is no such number, and `note` says why."""

    config: str
    precision: str
    row: str
    batch: int
    logits_error: float | None = None
    step_ms: float | None = None
    step_ms_min: float | None = None
    graph_ms: float | None = None
    graph_ms_min: float | None = None
    activation_bytes: int | None = None
    reserved_bytes: int | None = None
    note: str = ""

    @classmethod
    def of(cls, job: Job, **measured) -> Row:
        return cls(job.config, job.precision, job.row, job.batch, **measured)


def train_step(job: Job, row: str) -> TrainStep:
    """A step of `row` on the weights and the batch that all rows have."""
    network, precision = NETWORKS[job.config], PRECISIONS[job.precision]
    torch.manual_seed(0)
    model = MODELS[row](**network.settings)
    torch.manual_seed(1)  # a model may draw more numbers than its weights need
    images = torch.randn(job.batch, 3, *network.sizes)
    target = torch.randint(network.num_classes, (job.batch,)).to(job.device)
    memory_format = precision.format_of(images)
    model.to(job.device, precision.dtype, memory_format=memory_format)
    images = images.to(job.device, precision.dtype, memory_format=memory_format)
    return TrainStep(model, images, target, precision.autocast)


def expected_logits(job: Job) -> Tensor:
    with torch.no_grad():
        return train_step(job, "plain").forward()


def configure(job: Job) -> None:
    """Torch's settings for this precision."""
    set_tf32(PRECISIONS[job.precision].tf32)
    torch.backends.cudnn.benchmark = job.cudnn_benchmark


def warm_step(job: Job) -> TrainStep:
    configure(job)
    step = train_step(job, job.row)
    for _ in range(job.warmup):
        step()
    return step


def checked_step(job: Job) -> tuple[TrainStep, float]:
    """A warm step, and the relative error of its first logits.

    Raises:
        NotTimed: the error is over the tolerance of the precision.
    """
    configure(job)
    tolerance = PRECISIONS[job.precision].tolerance
    expected = expected_logits(job).double()
    gc.collect()
    torch.cuda.empty_cache()  # plain's memory is not to count as reserved
    step = train_step(job, job.row)
    error = ((step().double() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        raise NotTimed(
            f"not timed: logits differ from plain's by {error:.1e}, more than {tolerance}"
        )
    for _ in range(job.warmup):
        step()
    return step, error


def times_ms(function: Callable[[], object], count: int) -> list[float]:
    """Wall-clock times from the first launch to the end of the GPU's work, in order."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    times = []
    for _ in range(count):
        synchronise()
        begin = time.perf_counter()
        function()
        synchronise()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def capture(step: TrainStep) -> torch.cuda.CUDAGraph:
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


def graph_times(step: TrainStep, count: int) -> dict[str, float | str]:
    """Fields of `Row`: the times of a replay, or why there are none."""
    try:
        graph = capture(step)
        graph.replay()
        times = times_ms(graph.replay, count)
    except Exception as error:  # what a peer or torch raises here is not ours to choose
        # Ending a broken capture raises again; what broke it is the context of that.
        return {"note": f"no graph: {summary(error.__context__ or error)}"}
    return {"graph_ms": statistics.median(times), "graph_ms_min": min(times)}


def measure(job: Job) -> Row:
    try:
        step, error = checked_step(job)
        on_gpu = job.device == "cuda"
        activation_bytes = peak_activation_bytes(step) if on_gpu else None
        times = times_ms(step, job.steps)
        return Row.of(
            job,
            logits_error=error,
            step_ms=statistics.median(times),
            step_ms_min=min(times),
            activation_bytes=activation_bytes,
            reserved_bytes=torch.cuda.memory_reserved() if on_gpu else None,
            # Last: a capture that breaks may leave the process unusable, and its pool is not part
            # of what is reserved above.
            **(graph_times(step, job.steps) if on_gpu else {}),
        )
    except NotTimed as error:
        return Row.of(job, note=str(error))
    except Exception as error:  # one row's failure is not the end of the others
        return Row.of(job, note=summary(error))


def summary(error: BaseException) -> str:
    """The first sentence of an error, without the numbers and advice that follow it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split()).partition(". ")[0]
    return f"{type(error).__name__}: {text}"[:160]


def measure_in_process(job: Job) -> Row:
    """`measure` in a new process."""
    try:
        return Row(**in_process(__file__, job))
    except ProcessFailed as failure:
        return Row.of(job, note=str(failure))


# ------------------------------------------------------------------------------------ profiling


def profile(job: Job) -> str:
    """Where the time of a step goes: host and GPU, and the kernels that take most of it."""
    step, _ = checked_step(job)
    step_ms = statistics.median(times_ms(step, job.steps))
    host_ms = statistics.median(host_times_ms(step, job.steps))
    # Without the CPU's events, which would slow the launches down.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profiler.key_averages()
        # Annotations such as the optimizer's span kernels that are listed themselves.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
    gpu_us = sum(event.self_device_time_total for event in kernels) / PROFILED_STEPS
    launches = sum(event.count for event in kernels) / PROFILED_STEPS
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
        f"- {gpu_us / 1e3:.2f} ms of GPU time in {launches:g} kernels, copies and fills\n\n"
        + markdown_table(["us", "share", "launches", "kernel"], rows)
    )


def host_times_ms(step: TrainStep, count: int) -> list[float]:
    """Times until a step returns, each begun on an idle GPU."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


# -------------------------------------------------------------------------------------- results


def table(rows: list[Row]) -> str:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    columns = ["network", "precision", "row", "step ms", "min", "graph ms", "min"]
    columns += ["activations GB", "reserved GB", "note"]
    cells = [
        [
            *(row.config, row.precision, row.row),
            *map(ms, (row.step_ms, row.step_ms_min, row.graph_ms, row.graph_ms_min)),
            *map(gigabytes, (row.activation_bytes, row.reserved_bytes)),
            row.note.replace("|", "\\|"),
        ]
        for row in rows
    ]
    return markdown_table(columns, cells)


def write(out: Path, source: dict, options: argparse.Namespace, rows: list[Row]) -> str:
    """Both files; returns the text of the table's."""
    benchmark = "on" if options.cudnn_benchmark else "off"
    text = (
        f"# Train step, batch {options.batch}\n\n{origin_lines(source)}"
        f"- median and minimum of {options.steps} steps after {options.warmup}, "
        f"cudnn.benchmark {benchmark}\n\n{table(rows)}"
    )
    (out / "train_step.md").write_text(text)
    content = {
        "origin": source,
        "steps": options.steps,
        "warmup": options.warmup,
        "cudnn_benchmark": options.cudnn_benchmark,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (out / "train_step.json").write_text(json.dumps(content, indent=1) + "\n")
    return text


# --------------------------------------------------------------------------------- command line


def parse(arguments: list[str]) -> argparse.Namespace:
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", nargs="+", choices=NETWORKS, metavar="NAME", help=", ".join(NETWORKS))
    pairs = ", ".join(" ".join(pair) for pair in PUBLISHED)
    text = f"{', '.join(PRECISIONS)} (default for both: {pairs}; for one: all of its values there)"
    add("--precision", nargs="+", choices=PRECISIONS, metavar="NAME", help=text)
    text = "default: those of our own code (plain, checkpoint, ours, ours-features)"
    add("--rows", nargs="+", choices=MODELS, metavar="NAME", help=text)
    text = "every configuration, precision and row (compile and compile-budget only with --rows)"
    add("--all", action="store_true", help=text)
    text = "instead, where one row's time goes: kernels, GPU and host; takes one --config and "
    text += "--precision, writes profile_CONFIG_PRECISION_ROW.txt"
    add("--profile", choices=MODELS, metavar="ROW", help=text)
    add("--batch", type=positive, default=64, metavar="N", help="images (default: 64)")
    add("--steps", type=positive, default=30, metavar="N", help="timed steps (default: 30)")
    add("--warmup", type=positive, default=10, metavar="N", help="steps before (default: 10)")
    text = "cpu measures no memory and no graph; it is there to try the script"
    add("--device", choices=("cuda", "cpu"), default="cuda", help=text)
    text = "let cuDNN time its algorithms (torch's default is not to)"
    add("--cudnn-benchmark", action="store_true", help=text)
    add("--out", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
    add("--job", type=json.loads, help=argparse.SUPPRESS)  # one row, in the process of that row
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available() and options.job is None:
        parser.error("torch sees no GPU; --device cpu tries the script without one")
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
    rows = options.rows or (EAGER_ROWS if options.all else list(DENSENETS))
    return [job(options, *pair, row) for pair in pairs for row in rows]


def job(options: argparse.Namespace, config: str, precision: str, row: str) -> Job:
    shared = ("batch", "steps", "warmup", "device", "cudnn_benchmark")
    return Job(config, precision, row, **{name: getattr(options, name) for name in shared})


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.job is not None:
        print(json.dumps(dataclasses.asdict(measure(Job(**options.job)))))
        return 0
    source = origin(options.device, shlex.join(["python", "benchmarks/train_step.py", *arguments]))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.profile:
        return run_profile(options, source)
    rows: list[Row] = []
    for one in jobs(options):
        begin = time.monotonic()
        rows.append(measure_in_process(one))
        text = write(options.out, source, options, rows)
        print(f"{one}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    print(text)
    return int(any(row.step_ms is None for row in rows if row.row.startswith("ours")))


def run_profile(options: argparse.Namespace, source: dict) -> int:
    one = job(options, options.config[0], options.precision[0], options.profile)
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

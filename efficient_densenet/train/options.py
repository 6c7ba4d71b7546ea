"""The options of a run, and the command line they come from (:mod:`argparse`, see ``--help``)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from .data import DATASETS
from .errors import UsageError
from .recipes import RECIPES

PROGRAM = "efficient-densenet-train"
REPORTS = ("csv", "curves", "confusion", "tensorboard", "log", "table")
# Not training options: where and how a run works, which may differ when it is resumed.
AUTO = "auto"
LAST, BEST = "last.pt", "best.pt"


@dataclass
class Options:
    """All that a run depends on; plain values, for they are written into checkpoints."""

    # What says so in messages, and what a message repeats to go on.
    program: str
    invocation: str
    # data
    dataset: str
    data: str | None
    valid_size: int | None
    image_size: int
    workers: int | None
    # model
    library: str
    model: str
    depth: int | None
    growth_rate: int | None
    efficient: bool
    recompute: str
    pretrained: str | None
    # recipe
    recipe: str
    n_epochs: int
    batch_size: int
    batch_size_per_device: int | None
    accumulate: int
    lr: float
    scale_lr: str
    momentum: float
    weight_decay: float
    norm_decay: bool
    schedule: str
    warmup_epochs: int
    label_smoothing: float
    drop_rate: float
    ema: float
    mixup: float
    cutmix: float
    randaugment: bool
    clip: float
    # speed and devices
    amp: str
    channels_last: bool
    compile: str | None
    sync_bn: bool
    processes: int | None
    timeout: float
    # run
    save: str
    resume: str | None
    overwrite: bool
    evaluate: str | None
    save_every: int
    keep: int
    seed: int | None
    reports: list[str]

    def flag(self, name: str) -> str:
        """An option as its user spells it: ``--valid-size``, or as the seed's demo has it."""
        spelled = name if self.program == "demo.py" else name.replace("_", "-")
        return f"--{spelled}"


class Parser(argparse.ArgumentParser):
    """Errors are exceptions: whoever catches them says them in one line."""

    def __init__(self, program: str, description: str) -> None:
        def formatter(prog: str) -> argparse.HelpFormatter:
            return argparse.HelpFormatter(prog, max_help_position=26, width=96)

        super().__init__(
            prog=program, description=description, formatter_class=formatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return values[text.lower()]


def integer(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.lstrip("-").isdigit() and minimum <= int(text) < 2**32):
            raise argparse.ArgumentTypeError(f"expected an integer >= {minimum}, got {text!r}")
        return int(text)

    return parse


def number(minimum: float, below: float = math.inf) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not minimum <= value < below:
            limits = f">= {minimum:g}" + (f" and < {below:g}" if below < math.inf else "")
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return parse


def report_names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in REPORTS:
            listed = ", ".join(REPORTS)
            raise argparse.ArgumentTypeError(f"expected some of {listed}, got {name!r}")
    return names


def parse_options(arguments: list[str]) -> Options:
    """The options that a command line asks for, with everything it leaves out filled in.

    Raises:
        UsageError: an argument is wrong, or does not go with another.
    """
    from .command_line import create_parser

    given = vars(create_parser().parse_args(arguments))
    if given["dataset"] is None:
        given["dataset"] = "digits" if given["data"] is None else "cifar10"
    source = DATASETS[given["dataset"]]
    if source.needs_folder != (given["data"] is not None):
        advice = "needs --data DIR" if source.needs_folder else "reads no --data"
        raise UsageError(f"--dataset {given['dataset']} {advice}")
    _fill_in_model(given, source.model, source.depth)
    given["recipe"] = given["recipe"] or source.recipe
    defaults = vars(RECIPES[given["recipe"]]) | {
        "valid_size": source.valid_size,
        "image_size": source.image_size,
        "save": f"runs/{given['dataset']}",
        "library": "efficient_densenet",
    }
    if given["warmup_epochs"] is None and given["n_epochs"] is not None:  # a short run
        given["warmup_epochs"] = min(defaults["warmup_epochs"], given["n_epochs"] - 1)
    for name, value in given.items():
        if value is None:
            given[name] = defaults.get(name)
    given |= {"program": PROGRAM, "invocation": "python -m efficient_densenet.train"}
    options = Options(**{field.name: given[field.name] for field in fields(Options)})
    check_options(options)
    return options


def _fill_in_model(given: dict[str, Any], model: str, depth: int | None) -> None:
    shaped = [name for name in ("depth", "growth_rate") if given[name] is not None]
    given["library"] = given["library"] or "efficient_densenet"
    if given["model"] is None:
        if given["library"] != "efficient_densenet":
            raise UsageError(f"--library {given['library']} needs --model NAME")
        given["model"] = "densenet_bc" if shaped else model
    if given["model"] == "densenet_bc":
        given["depth"] = given["depth"] or depth or 40
        given["growth_rate"] = given["growth_rate"] or 12
    elif shaped:
        flag = f"--{shaped[0].replace('_', '-')}"
        raise UsageError(f"{flag} goes with --model densenet_bc, not {given['model']}")


def check_options(options: Options) -> None:
    """Refuse what no single argument shows to be wrong."""
    if options.depth is not None and (options.depth < 10 or (options.depth - 4) % 6):
        rule = "depth - 4 must be divisible by 6 and depth at least 10, such as 10, 16, 40 or 100"
        raise UsageError(f"--depth {options.depth}: {rule}")
    if options.warmup_epochs and options.warmup_epochs >= options.n_epochs:
        epochs = options.n_epochs
        raise UsageError(f"--warmup-epochs {options.warmup_epochs}: there are {epochs} epochs")
    if options.recompute != "bottleneck" and not options.efficient:
        raise UsageError(f"--recompute {options.recompute} needs --efficient")
    if options.resume is not None and options.evaluate is not None:
        raise UsageError("--evaluate trains nothing: leave --resume out")

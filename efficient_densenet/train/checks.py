"""What a checkpoint has to hold before a run goes on from it.

A file that can be read may still be of another program, another version or another run. Everything
with which training would fail later, or silently go wrong, is refused in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UsageError
from .options import Options
from .report import COLUMNS

BEST_PARTS: dict[str, Any] = {"model": dict, "arguments": dict, "epoch": int, "valid_error": float}
LAST_PARTS: dict[str, Any] = {"model": dict, "arguments": dict, "epoch": int, "best_error": float}
LAST_PARTS |= {"optimizer": dict, "scheduler": dict, "history": list, "step": int, "images": int}
LAST_PARTS |= {"totals": list, "seconds": float, "average": dict, "scaler": dict, "processes": int}
# Options that say which network, or which division of the data, a checkpoint is of.
FIXED: tuple[str, ...] = (
    "dataset",
    "library",
    "model",
    "depth",
    "growth_rate",
    "valid_size",
    "norm_decay",
    "seed",
)
# Options of where and how a run works, which change none of its results.
FREE: tuple[str, ...] = (
    "program",
    "invocation",
    "data",
    "workers",
    "pretrained",
    "processes",
    "timeout",
    "save",
)
FREE += ("resume", "overwrite", "evaluate", "save_every", "keep", "reports")


class Checker:
    """Refusals of one checkpoint.

    Args:
        path: names it in messages.
    """

    def __init__(self, path: Path, program: str) -> None:
        self.path, self.program = path, program

    def check_last(self, last: Any, options: Options, model: nn.Module) -> None:
        """Refuse what :meth:`.loop.Run.restore` cannot go on from."""
        self._check_parts(last, LAST_PARTS)
        self._check_arguments(last["arguments"], options)
        self._check_weights(last["model"], model)
        if bool(last["average"]) != bool(options.ema):
            had = last["arguments"].get("ema")
            raise UsageError(f"--resume: {self.path} is of --ema {had}, not {options.ema}")
        if options.ema:
            self._check_weights(last["average"], model)
        self._check_progress(last)
        self._check_optimizer(last, model)

    def check_best(self, best: Any, model: nn.Module) -> None:
        self._check_parts(best, BEST_PARTS)
        self._check_weights(best["model"], model)

    def _wrong(self, part: str) -> UsageError:
        reason = f"{self.program} wrote no such checkpoint: its {part} is missing or wrong"
        return UsageError(f"{self.path}: {reason}")

    def _check_parts(self, checkpoint: Any, parts: dict[str, type]) -> None:
        if not isinstance(checkpoint, dict):
            held = type(checkpoint).__name__
            reason = f"{self.program} wrote no such checkpoint: it holds a {held}, not a dict"
            raise UsageError(f"{self.path}: {reason}")
        for name, kind in parts.items():
            value = checkpoint.get(name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise self._wrong(name)

    def _check_arguments(self, saved: dict[str, Any], options: Options) -> None:
        seed = saved.get("seed")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise self._wrong("argument seed")
        for name in FIXED:
            asked = getattr(options, name)
            if name == "seed" and asked is None:
                continue
            if type(saved.get(name)) is not type(asked):
                raise self._wrong(f"argument {name}")
            if saved[name] != asked:
                flag = f"{options.flag(name)} {saved[name]}"
                raise UsageError(f"--resume: {self.path} is of {flag}, not {asked}")

    def _check_weights(self, weights: dict[Any, Any], model: nn.Module) -> None:
        own = model.state_dict()
        for name in own | weights:
            if name not in weights or name not in own:
                what = "is missing" if name in own else "is none of them"
            elif not _is_like(weights[name], own[name]):
                what = f"is not {own[name].dtype} {list(own[name].shape)}"
            else:
                continue
            reason = f"weights: expected tensors of this network, {name} {what}"
            raise UsageError(f"{self.path}: its model does not fit: {reason}")

    def _check_progress(self, last: dict[str, Any]) -> None:
        history = last["history"]
        if last["epoch"] != len(history):
            raise self._wrong("epoch")
        for epoch, row in enumerate(history, 1):
            if not _is_row(row, epoch):
                raise self._wrong(f"history of epoch {epoch}")
        for name in ("step", "images", "seconds"):
            if not last[name] >= 0:
                raise self._wrong(name)
        for totals in last["totals"]:
            if not _is_like(totals, torch.zeros(3, dtype=torch.float64)):
                raise self._wrong("totals")
        if len(last["totals"]) != last["processes"] or last["processes"] < 1:
            raise self._wrong("totals")

    def _check_optimizer(self, last: dict[str, Any], model: nn.Module) -> None:
        state = last["optimizer"].get("state")
        count = sum(1 for _ in model.parameters()) if last["step"] else 0
        arguments = last["arguments"]
        # Without momentum there is none, and the first steps in float16 only look for a scale.
        if state == {} and (arguments.get("momentum") == 0 or arguments.get("amp") == "fp16"):
            count = 0
        if not isinstance(state, dict) or state.keys() != set(range(count)):
            raise self._wrong("optimizer")
        shapes = sorted(map(tuple, (p.shape for p in model.parameters()))) if count else []
        found = []
        for i in range(count):
            momentum = state[i].get("momentum_buffer") if isinstance(state[i], dict) else None
            if not isinstance(momentum, Tensor) or not _is_plain(momentum):
                raise self._wrong(f"optimizer for parameter {i}")
            found.append(tuple(momentum.shape))
        # The order is that of the groups, and the optimizer compares nothing.
        if sorted(found) != shapes:
            raise self._wrong("optimizer")


def changed_options(last: dict[str, Any], options: Options, processes: int) -> list[str]:
    """What makes a resumed run another than the one that was stopped."""
    changes = []
    if last["processes"] != processes:
        changes.append(f"processes {last['processes']} -> {processes}")
    for name, value in vars(options).items():
        before = last["arguments"].get(name)
        if name not in FIXED + FREE and before != value:
            changes.append(f"{options.flag(name)} {before} -> {value}")
    return changes


def _is_plain(value: Tensor) -> bool:
    is_dense = not value.is_nested and value.layout == torch.strided
    return is_dense and value.device.type == "cpu" and value.dtype.is_floating_point


def _is_like(value: Any, own: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
        return False
    return (value.shape, value.dtype, value.device.type) == (own.shape, own.dtype, "cpu")


def _is_row(row: Any, epoch: int) -> bool:
    written_last = ("test_error", "test_top5_error")
    kinds: dict[str, Any] = {name: float for name in COLUMNS if name not in written_last}
    kinds["epoch"] = int
    return (
        isinstance(row, dict)
        and {name: type(value) for name, value in row.items()} == kinds
        and row["epoch"] == epoch
        and 0 <= row["valid_error"] <= 1  # not so for NaN
    )

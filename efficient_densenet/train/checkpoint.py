"""Checkpoints: written whole or not at all, the last ones and the best, and read with suspicion."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .errors import UsageError, one_line
from .options import AUTO, BEST, LAST, Options

# What a run may leave in its folder.
FILES = ("results.csv", "curves.png", "confusion.png", "train.log", BEST, LAST)
OLDER = "step-{:08d}.pt"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path`` and rename it: nobody finds half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        # On the disk before it has its name, for machines that crash.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    # Through memory, because on a full disk torch.save itself gives no reason.
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_atomically(path, lambda temporary: temporary.write_bytes(content.getbuffer()))


class LastCheckpoints:
    """``last.pt``, and the ones before it as ``step-*.pt``.

    Args:
        keep: how many there may be in all.
        step: of the ``last.pt`` that is there and of this run; None for none.
    """

    def __init__(self, folder: Path, keep: int, step: int | None) -> None:
        self.folder, self.keep, self.step = folder, keep, step

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write the newest. At every moment there is a whole ``last.pt``."""
        path, step = self.folder / LAST, checkpoint["step"]
        if self.keep > 1 and self.step is not None and self.step != step:
            self._keep_older(path, self.folder / OLDER.format(self.step))
        save(path, checkpoint)
        self.step = step
        # By age, for a run that was set back to an earlier step.
        older = sorted(self.folder.glob("step-*.pt"), key=lambda file: file.stat().st_mtime_ns)
        for file in older[: max(0, len(older) - (self.keep - 1))]:
            file.unlink(missing_ok=True)

    def _keep_older(self, path: Path, name: Path) -> None:
        """A second name for the file, or a copy on file systems without."""
        try:
            name.unlink(missing_ok=True)
            os.link(path, name)
        except OSError:
            write_atomically(name, lambda temporary: temporary.write_bytes(path.read_bytes()))


def discard_older(folder: Path) -> None:
    """Remove the ``step-*.pt`` of an earlier run, which a new one has begun to replace."""
    for file in folder.glob("step-*.pt"):
        file.unlink(missing_ok=True)


def load(path: Path) -> Any:
    """The content of a checkpoint.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no checkpoint to go on from") from None
    except pickle.UnpicklingError as error:  # its text is of many lines, on how to trust the file
        reason = "it is no file of tensors that torch.save wrote"
        raise UsageError(f"{path}: this checkpoint cannot be read: {reason}") from error
    except Exception as error:  # a damaged file can bring the unpickler to any other error
        raise UsageError(f"{path}: this checkpoint cannot be read: {one_line(error)}") from error


def resumed_path(options: Options) -> Path | None:
    """The checkpoint that ``--resume`` means; None to start anew."""
    if options.resume is None:
        return None
    last = Path(options.save) / LAST
    if options.resume == AUTO:
        return last if os.path.lexists(last) else None
    return last if options.resume == LAST else Path(options.resume)


def check_writable(options: Options) -> None:
    """Refuse a folder in which a run would fail, or would spoil another without being told to.

    Raises:
        UsageError: it cannot be written, or holds a run already.
    """
    folder = Path(options.save)
    if options.resume is None and not options.overwrite and (folder / LAST).is_file():
        advice = "--resume goes on with it, --overwrite starts anew"
        raise UsageError(f"--save {folder}: there is a run already: {advice}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
        others = [name for name in FILES if (folder / name).is_dir()]
    except OSError as error:
        raise UsageError(f"--save {folder}: cannot write there: {error.strerror}") from error
    if others:
        raise UsageError(f"--save {folder}: cannot write there: {others[0]} is a folder")

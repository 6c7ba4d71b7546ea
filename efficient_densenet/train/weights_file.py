"""Weights to evaluate: of a checkpoint of this command, or of anybody's like network."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..densenet import DenseNet
from ..weights import _read, load_weights
from .errors import UsageError, one_line


def load_file(model: nn.Module, path: Path) -> None:
    """Load what :func:`efficient_densenet.load_weights` reads into a network of any library.

    Raises:
        UsageError: it cannot be read, or is of another network.
    """
    try:
        if isinstance(model, DenseNet):
            load_weights(model, path, progress=False)
        else:
            model.load_state_dict(_read(path, progress=False))
    except (OSError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--evaluate {path}: {one_line(error)}") from error

"""Weights of other DenseNets, by the names that torchvision, timm and earlier code give them."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from .densenet import DenseNet

# A member of torchvision's DenseNet*_Weights is an Enum: torchvision need not be installed.
Weights = Mapping[str, Tensor] | str | os.PathLike[str] | Enum

# DataParallel's and torch.compile's
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
# Modules' names of 2017, as in torchvision's files: norm.1 for norm1.
_DOTTED = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_LISTED = 5


def load_weights(model: DenseNet, weights: Weights, progress: bool = True) -> None:
    """Loads weights of the same network, by whatever names; in place, into the model's dtypes.

    Names may be those of this package and of gpleiss/efficient_densenet_pytorch
    (``features.norm_final``), of torchvision and timm (``features.norm5``), or those of
    torchvision's files (``denselayer1.norm.1.weight``). Prefixes of ``nn.DataParallel`` and
    ``torch.compile`` are ignored. Batch counts may be absent, the model's then stay.

    Args:
        model: the network to load into.
        weights: a state dict; a file of one, written by ``torch.save`` (on its own, or beside
            others under ``"state_dict"`` or ``"model"``) or by safetensors, which is then needed;
            or a member of torchvision's ``DenseNet*_Weights``, which is downloaded once and whose
            checksum is verified. Files are read with ``weights_only=True``: they run no code.
        progress: show the download's progress.

    Raises:
        TypeError: ``weights`` or ``model`` is something else.
        FileNotFoundError: there is no such file.
        ImportError: it is a safetensors file, and safetensors is not installed.
        ValueError: the file cannot be read, or its tensors are not the model's: the message lists
            missing and unexpected names and other shapes. The model is as before.
    """
    if not isinstance(model, DenseNet):
        raise TypeError(f"model: expected a DenseNet of this package, got {_type(model)}")
    own, state = model.state_dict(), _rename(_read(weights, progress))
    differences = _differences(own, state)
    if differences:
        raise ValueError(f"weights: {_describe(differences, own, state)}. Nothing was changed")
    model.load_state_dict(own | state)


# ------------------------------------------------------------------------------------------------
# Reading


def _read(weights: Weights, progress: bool) -> Mapping[str, Tensor]:
    state: object = weights
    if isinstance(weights, (str, os.PathLike)):
        state = _read_file(Path(weights))
    elif isinstance(weights, Enum) and hasattr(weights, "get_state_dict"):
        state = weights.get_state_dict(progress=progress, check_hash=True)
    if not isinstance(state, Mapping):
        raise TypeError(
            "weights: expected a state dict, a path or a member of torchvision's "
            f"DenseNet*_Weights, got {_type(state)}"
        )
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"weights[{name!r}]: expected a tensor, got {_type(value)}")
    return state


def _read_file(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file, got {str(path)!r}")
    if _is_safetensors(path):
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            "weights: expected a file of tensors alone, written by torch.save or safetensors, got "
            f"{str(path)!r}"
        ) from error
    # A checkpoint of a training script, such as demo.py.
    nested = [content.get(k) for k in ("state_dict", "model")] if type(content) is dict else []
    return next((value for value in nested if isinstance(value, Mapping)), content)


def _is_safetensors(path: Path) -> bool:
    """It begins with the length of a header in 8 bytes, and the header with a brace."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"weights: {str(path)!r} is a safetensors file: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights: {str(path)!r} is damaged: {error}") from error


# ------------------------------------------------------------------------------------------------
# Names and shapes


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names of this package."""
    renamed = {}
    for name, value in state.items():
        new = _DOTTED.sub(r"\1\2", _WRAPPERS.sub("", name))
        new = new.replace("features.norm5.", "features.norm_final.")
        if new in renamed:
            raise ValueError(f"weights: expected one tensor for {new}, got another in {name}")
        renamed[new] = value
    return renamed


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names by kind of difference; kinds without any are left out."""
    groups = {
        "missing": [
            name for name in own if name not in state and not name.endswith("num_batches_tracked")
        ],
        "unexpected": [name for name in state if name not in own],
        "other shapes": [
            name for name in own if name in state and state[name].shape != own[name].shape
        ],
    }
    return {kind: names for kind, names in groups.items() if names}


def _describe(
    differences: Mapping[str, list[str]], own: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> str:
    classes = _num_classes(own), _num_classes(state)
    different = sum(differences.values(), [])
    if classes[0] != classes[1] and all(name.startswith("classifier.") for name in different):
        return (
            f"expected num_classes={classes[0]} of the model, got {classes[1]}. Load them into a "
            f"model with num_classes={classes[1]}, then call its reset_classifier({classes[0]})"
        )
    lines = ["expected tensors with the names and shapes of the model's, got others"]
    for kind, names in differences.items():
        listed = [
            f"{name} (expected {list(own[name].shape)}, got {list(state[name].shape)})"
            if kind == "other shapes"
            else name
            for name in names[:_LISTED]
        ]
        if len(names) > _LISTED:
            listed.append(f"and {len(names) - _LISTED} more")
        lines.append(f"{kind}: {', '.join(listed)}")
    return "\n  ".join(lines)


def _num_classes(state: Mapping[str, Tensor]) -> int:
    """0 without a classifier."""
    return state["classifier.weight"].size(0) if "classifier.weight" in state else 0


def _type(value: object) -> str:
    return type(value).__name__

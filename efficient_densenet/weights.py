"""Weights of other DenseNets, by the names that torchvision, timm, MONAI and earlier code use."""

from __future__ import annotations

import os
import pickle
import re
import urllib.error
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .densenet import DenseNet

# A member of torchvision's DenseNet*_Weights is an Enum: torchvision need not be installed.
Weights = Mapping[str, Tensor] | str | os.PathLike[str] | Enum

# DataParallel's and torch.compile's
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
# Names by which others know a module of ours, and our name for it.
_RENAMES = (
    (re.compile(r"(denselayer\d+)\.layers\."), r"\1."),  # MONAI
    (re.compile(r"^class_layers\.out\."), "classifier."),  # MONAI
    # Modules' names of 2017, as in torchvision's files: norm.1 for norm1.
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"features\.norm5\."), "features.norm_final."),
)
_STEM = "features.conv0.weight"
_LISTED = 5


def load_weights(model: DenseNet, weights: Weights, progress: bool = True) -> None:
    """Loads weights of the same network, by whatever names; in place, into the model's dtypes.

    Names may be those of this package and of gpleiss/efficient_densenet_pytorch
    (``features.norm_final``), of torchvision and timm (``features.norm5``), of torchvision's files
    (``denselayer1.norm.1.weight``), or of MONAI (``denselayer1.layers.norm1.weight``,
    ``class_layers.out.weight``). Prefixes of ``nn.DataParallel`` and ``torch.compile`` are ignored.
    Batch counts may be absent, the model's then stay.

    Everything is checked and copied aside before the model changes: after an error it is as before.

    Args:
        model: the network to load into.
        weights: a state dict; a file of one, written by ``torch.save`` (on its own, or beside
            others under ``"state_dict"`` or ``"model"``) or by safetensors, which is then needed;
            or a member of torchvision's ``DenseNet*_Weights``, which is downloaded once and whose
            checksum is verified. Files are read with ``weights_only=True``: they run no code.
        progress: show the download's progress.

    Raises:
        TypeError: ``model``, ``weights`` or what a readable file holds is something else, or a key
            of the state dict is not a string or a value not a tensor.
        FileNotFoundError: there is no such file, or a folder in its place.
        PermissionError: the file may not be read.
        ImportError: it is a safetensors file, and safetensors is not installed.
        ValueError: the file is damaged or in another format. Or the tensors are not the model's:
            the message lists missing and unexpected names and other shapes. Or a tensor, of the
            weights or of the model, has no values in memory of its own, such as one on the meta
            device, or values of another kind, such as complex numbers.
    """
    if not isinstance(model, DenseNet):
        raise TypeError(f"model: expected a DenseNet of this package, got {_type(model)}")
    state = _read(weights, progress)
    _check_readable(state)
    state, own = _rename(state), model.state_dict()
    differences = _differences(own, state)
    if differences:
        raise ValueError(f"weights: {_describe(differences, own, state)}. Nothing was changed")
    _check_writable(own)
    # In copies, because an entry may share memory with the model, whose tensors are overwritten one
    # after the other.
    converted = {name: _convert(name, value, own[name]) for name, value in state.items()}
    model.load_state_dict(own | converted)


# ------------------------------------------------------------------------------------------------
# Reading


def _read(weights: Weights, progress: bool) -> Mapping[str, Tensor]:
    state: object = weights
    source = ""
    if isinstance(weights, (str, os.PathLike)):
        state = _read_file(Path(weights))
        source = f" in {os.fspath(weights)!r}"
    elif isinstance(weights, Enum) and hasattr(weights, "get_state_dict"):
        state = _read_member(weights, progress)
    if not isinstance(state, Mapping):
        raise TypeError(
            "weights: expected a state dict, a path or a member of torchvision's "
            f"DenseNet*_Weights, got {_type(state)}{source}"
        )
    for name, value in state.items():
        if not isinstance(name, str):
            raise TypeError(f"weights: expected names as keys, got {name!r}{source}")
        if not isinstance(value, Tensor):
            raise TypeError(f"weights[{name!r}]: expected a tensor, got {_type(value)}{source}")
    return state


def _read_member(member: Enum, progress: bool) -> object:
    try:
        return member.get_state_dict(progress=progress, check_hash=True)  # type: ignore[attr-defined]
    except urllib.error.URLError:
        raise  # It says why the download failed, and nothing is wrong with the weights.
    except Exception as error:  # the checksum differs, or an earlier download is damaged
        raise ValueError(f"weights: {member} cannot be read: {_first_line(error)}") from error


def _read_file(path: Path) -> object:
    start = _read_start(path)
    # A safetensors file begins with the length of a header in 8 bytes, and the header with a brace.
    if start[8:] == b"{":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can bring the unpickler to any error: IndexError, KeyError, AssertionError, ...
    except Exception as error:
        raise ValueError(
            "weights: expected a file of tensors alone, written by torch.save or safetensors, got "
            f"{str(path)!r}, which {_what_is_wrong(start, error)}"
        ) from error
    # A checkpoint of a training script, such as demo.py.
    nested = [content.get(k) for k in ("state_dict", "model")] if type(content) is dict else []
    return next((value for value in nested if isinstance(value, Mapping)), content)


def _read_start(path: Path) -> bytes:
    """The first nine bytes, or an error that says why there are none to be had."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return file.read(9)
    except PermissionError as error:
        raise PermissionError(f"weights: {str(path)!r} may not be read") from error
    except OSError as error:
        raise FileNotFoundError(
            f"weights: expected a file, got {str(path)!r}: {error.strerror}"
        ) from error
    kind = ", which is a folder" if path.is_dir() else ""
    raise FileNotFoundError(f"weights: expected a file, got {str(path)!r}{kind}")


def _what_is_wrong(start: bytes, error: Exception) -> str:
    if not start:
        return "is empty"
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return "holds objects of other classes, and creating those could run any code"
    if start.startswith(b"PK"):
        return "is a zip archive that is damaged, cut off or not written by torch.save"
    return f"is damaged or in another format ({_first_line(error)})"


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"weights: {str(path)!r} is a safetensors file: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except Exception as error:  # besides SafetensorError, KeyError for a dtype it does not know
        raise ValueError(
            f"weights: {str(path)!r} is damaged: {_type(error)}: {_first_line(error)}"
        ) from error


# ------------------------------------------------------------------------------------------------
# Names and shapes


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names of this package."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        new = _WRAPPERS.sub("", name)
        for pattern, replacement in _RENAMES:
            new = pattern.sub(replacement, new)
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
    """Sentences on the numbers of classes and of channels, or if more differs, all names."""
    names = [name for group in differences.values() for name in group]
    of_classes = [name for name in names if name.startswith("classifier.")]
    sentences = []
    if of_classes and _num_classes(own) != _num_classes(state):
        sentences.append(_about_classes(_num_classes(own), _num_classes(state)))
        names = [name for name in names if name not in of_classes]
    if names == [_STEM] and _differs_in_channels(own, state):
        sentences.append(_about_channels(own[_STEM], state[_STEM]))
        names = []
    if sentences and not names:
        return ". ".join(sentences)
    lines = ["expected tensors with the names and shapes of the model's, got others"]
    return "\n  ".join(lines + [_list(*group, own, state) for group in differences.items()])


def _list(
    kind: str, names: list[str], own: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> str:
    listed = [
        f"{name} (expected {list(own[name].shape)}, got {list(state[name].shape)})"
        if kind == "other shapes"
        else name
        for name in names[:_LISTED]
    ]
    if len(names) > _LISTED:
        listed.append(f"and {len(names) - _LISTED} more")
    return f"{kind}: {', '.join(listed)}"


def _about_classes(expected: int, got: int) -> str:
    return (
        f"expected num_classes={expected} of the model, got {got}. Load them into a model with "
        f"num_classes={got}, then call its reset_classifier({expected})"
    )


def _num_classes(state: Mapping[str, Tensor]) -> int:
    """0 without a classifier."""
    weight = state.get("classifier.weight")
    return weight.size(0) if weight is not None and weight.dim() > 0 else 0


def _about_channels(own: Tensor, stem: Tensor) -> str:
    expected, got = own.size(1), stem.size(1)
    return (
        f"expected in_chans={expected} of the model, got {got}. Load them into a model with "
        f"in_chans={got}, or replace this tensor W by "
        f"W.sum(1, keepdim=True).repeat_interleave({expected}, 1) / {expected}, which is the same "
        "for images with equal channels.\n"
        f"  other shapes: {_STEM} (expected {list(own.shape)}, got {list(stem.shape)})"
    )


def _differs_in_channels(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    if _STEM not in state:
        return False
    expected, got = own[_STEM].shape, state[_STEM].shape
    return len(got) == len(expected) and got[:1] + got[2:] == expected[:1] + expected[2:]


# ------------------------------------------------------------------------------------------------
# Tensors


def _check_readable(state: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        reason = _why_not_plain(value)
        if reason is not None:
            raise ValueError(
                f"weights[{name!r}]: expected a dense tensor with values, got {reason}. Nothing "
                "was changed"
            )


def _check_writable(own: Mapping[str, Tensor]) -> None:
    """Copying into such a tensor would fail, or do nothing, with others already overwritten."""
    for name, tensor in own.items():
        reason = _why_not_plain(tensor)
        if reason is None and any(
            stride == 0 and size > 1
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            reason = "an expanded one, whose elements share memory"
        if reason is None and tensor.is_inference() and not torch.is_inference_mode_enabled():
            reason = "one made in inference mode, which is read-only outside of it"
        if reason is not None:
            advice = "; call the model's to_empty(device=...) first" if tensor.is_meta else ""
            raise ValueError(
                f"model: expected a dense tensor that can be overwritten for {name}, got {reason}"
                f"{advice}. Nothing was changed"
            )


def _why_not_plain(tensor: Tensor) -> str | None:
    """Why the values do not simply lie in memory, or None if they do."""
    if is_lazy(tensor):
        return "an uninitialised one"
    # Such as DTensor and FakeTensor: what looks like one tensor is none, or a part of one.
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {_type(tensor)}, whose class keeps its values in another way"
    with torch._C.DisableTorchFunctionSubclass():  # A subclass may give any answer itself.
        if tensor.is_meta:
            return "one on the meta device"
        if tensor.is_nested:
            return "a nested one"
        if tensor.layout != torch.strided:
            return f"one with layout {tensor.layout}"
        if tensor.is_quantized or tensor.is_complex():
            return f"one of {tensor.dtype}"
        if _last_byte(tensor) > tensor.untyped_storage().nbytes():
            return "one whose memory was freed"
    return None


def _last_byte(tensor: Tensor) -> int:
    """End of the tensor's elements in its storage."""
    if tensor.numel() == 0:
        return 0
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + steps + 1) * tensor.element_size()


def _convert(name: str, value: Tensor, own: Tensor) -> Tensor:
    """A copy with the device and dtype of the model's tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        plain = value.detach().as_subclass(Tensor)
        copy = plain.to(own.device, own.dtype, copy=True)
        fits = plain.is_floating_point() == own.is_floating_point()
        if not fits and not own.is_floating_point():
            # Some files hold batch counts too as floating-point numbers.
            fits = torch.equal(copy.to(plain.device, torch.float64), plain.double())
    if not fits:
        raise ValueError(
            f"weights: expected values of {own.dtype} for {name}, got {plain.dtype}. Nothing was "
            "changed"
        )
    return copy


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _type(value: object) -> str:
    return type(value).__name__

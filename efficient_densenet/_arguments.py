"""What :func:`efficient_densenet.concat_bn_relu` accepts: one place, one style of message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .storage import SharedStorage

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_arguments(
    features: Sequence[Tensor],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    storage: SharedStorage | None,
) -> torch.dtype:
    """The dtype of the result, or an error that names the argument that is wrong."""
    _check_features(features)
    dtype = _check_dtypes(features)
    channels = sum(feature.size(1) for feature in features)
    per_channel = dict(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    for name, tensor in per_channel.items():
        if tensor is not None:
            _check_per_channel(name, tensor, channels, dtype, features[0].device)
    _check_numbers(training, momentum, eps)
    if training:
        _check_more_than_one_value(features[0], channels)
    else:
        for name in ("running_mean", "running_var"):
            if per_channel[name] is None:
                raise ValueError(f"{name}: expected a tensor when training=False, got None")
    if storage is not None and not isinstance(storage, SharedStorage):
        raise TypeError(f"storage: expected a SharedStorage or None, got {_type(storage)}")
    return dtype


def _check_features(features: Sequence[Tensor]) -> None:
    if not isinstance(features, (list, tuple)):
        raise TypeError(f"features: expected a list or tuple of tensors, got {_type(features)}")
    if not features:
        raise ValueError("features: expected at least one tensor, got an empty list")
    for i, feature in enumerate(features):
        if not isinstance(feature, Tensor):
            raise TypeError(f"features[{i}]: expected a tensor, got {_type(feature)}")
    first = features[0]
    if not 2 <= first.dim() <= 5:
        raise ValueError(
            "features[0]: expected [N, C, *spatial] with 0 to 3 spatial dimensions, got shape "
            f"{list(first.shape)}"
        )
    if first.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"features[0]: expected a CPU or CUDA tensor, got one on {first.device}")
    without_channels = _without_channels(first)
    for i, feature in enumerate(features):
        if _without_channels(feature) != without_channels:
            raise ValueError(
                f"features[{i}]: expected batch and spatial sizes of features[0] with shape "
                f"{list(first.shape)}, got shape {list(feature.shape)}"
            )
        if feature.device != first.device:
            raise ValueError(
                f"features[{i}]: expected device {first.device} of features[0], "
                f"got {feature.device}"
            )


def _without_channels(feature: Tensor) -> tuple[int, ...]:
    shape = feature.shape
    return shape[:1] + shape[2:]


def _check_dtypes(features: Sequence[Tensor]) -> torch.dtype:
    kind = features[0].device.type
    dtypes = [feature.dtype for feature in features]
    for i, dtype in enumerate(dtypes):
        if dtype not in _DTYPES:
            raise TypeError(
                f"features[{i}]: expected float64, float32, float16 or bfloat16, got {dtype}"
            )
    if kind != "meta" and torch.is_autocast_enabled(kind):
        autocast = torch.get_autocast_dtype(kind)  # like torch, it leaves float64 alone
        dtypes = [dtype if dtype == torch.float64 else autocast for dtype in dtypes]
    for i, dtype in enumerate(dtypes):
        if dtype != dtypes[0]:
            raise TypeError(f"features[{i}]: expected {dtypes[0]} of features[0], got {dtype}")
    return dtypes[0]


def _check_per_channel(
    name: str, tensor: Any, channels: int, dtype: torch.dtype, device: torch.device
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {_type(tensor)}")
    if tuple(tensor.shape) != (channels,):
        raise ValueError(
            f"{name}: expected shape [{channels}], the channels of all features, got shape "
            f"{list(tensor.shape)}"
        )
    allowed = [dtype] if dtype.itemsize > 2 else [dtype, torch.float32]
    if tensor.dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise TypeError(f"{name}: expected {names} for {dtype} features, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} of the features, got {tensor.device}")


def _check_numbers(training: bool, momentum: float, eps: float) -> None:
    if not isinstance(training, bool):
        raise TypeError(f"training: expected a bool, got {_type(training)}")
    for name, value in (("momentum", momentum), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {_type(value)}")
    if not eps > 0:
        raise ValueError(f"eps: expected a number > 0, got {eps}")


def _check_more_than_one_value(first: Tensor, channels: int) -> None:
    size = torch.Size([first.size(0), channels, *first.shape[2:]])
    if first.size(0) * first.shape[2:].numel() == 1:  # the wording of F.batch_norm
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {size}"
        )


def _type(value: object) -> str:
    return type(value).__name__

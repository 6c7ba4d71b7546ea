"""What the operators accept: one place, one style of message."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batch_norm import BatchNorm
from .storage import SharedStorage

if TYPE_CHECKING:
    from .dense_block_formulas import DenseLayer

RECOMPUTE = ("bottleneck", "features")

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_arguments(
    features: Sequence[Tensor], norm: BatchNorm, storage: SharedStorage | None, synchronised: bool
) -> torch.dtype:
    """The dtype of the result, or an error that names the argument that is wrong.

    Args:
        synchronised: other processes have values as well, so one may be enough here.
    """
    _check_features(features)
    dtype = _check_dtypes(features)
    channels = sum(feature.size(1) for feature in features)
    if norm.momentum is None:
        raise TypeError("momentum: expected a number, got NoneType")
    if norm.training and not synchronised:
        check_more_than_one_value(features[0], channels)
    check_norm("", norm, channels, features[0], dtype)
    if storage is not None and not isinstance(storage, SharedStorage):
        raise TypeError(f"storage: expected a SharedStorage or None, got {_type(storage)}")
    return dtype


def _check_features(features: Sequence[Tensor]) -> None:
    if not isinstance(features, (list, tuple)):
        raise TypeError(f"features: expected a list or tuple of tensors, got {_type(features)}")
    if not features:
        raise ValueError("features: expected at least one tensor, got an empty list")
    for i, feature in enumerate(features):
        check_tensor(f"features[{i}]", feature)
    first = features[0]
    check_images("features[0]", first, fewest_spatial_dims=0)
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


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_type(value)}")


def check_images(name: str, x: Tensor, fewest_spatial_dims: int) -> None:
    if not 2 + fewest_spatial_dims <= x.dim() <= 5:
        raise ValueError(
            f"{name}: expected [N, C, *spatial] with {fewest_spatial_dims} to 3 spatial "
            f"dimensions, got shape {list(x.shape)}"
        )
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name}: expected a CPU or CUDA tensor, got one on {x.device}")


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {x.dtype}")


def _without_channels(feature: Tensor) -> tuple[int, ...]:
    shape = feature.shape
    return shape[:1] + shape[2:]


def _check_dtypes(features: Sequence[Tensor]) -> torch.dtype:
    for i, feature in enumerate(features):
        check_dtype(f"features[{i}]", feature)
    dtypes = [computed_dtype(feature) for feature in features]
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


def check_more_than_one_value(first: Tensor, channels: int) -> None:
    size = torch.Size([first.size(0), channels, *first.shape[2:]])
    if first.size(0) * first.shape[2:].numel() == 1:  # the wording of F.batch_norm
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {size}"
        )


def check_pixels(x: Tensor) -> None:
    if x.shape[2:].numel() == 0:  # the type of the error of torch's convolutions
        raise RuntimeError(f"x: expected images of at least one pixel, got shape {list(x.shape)}")


def check_pooling_arguments(x: Tensor, norm: BatchNorm) -> torch.dtype:
    """The dtype of a max-pooled batch norm of x, or an error that names the wrong argument."""
    check_tensor("x", x)
    check_images("x", x, fewest_spatial_dims=1)
    check_dtype("x", x)
    if not isinstance(norm, BatchNorm):
        raise TypeError(f"norm: expected a BatchNorm, got {_type(norm)}")
    dtype = computed_dtype(x)
    if norm.training:
        check_more_than_one_value(x, x.size(1))
    check_norm("norm.", norm, x.size(1), x, dtype)
    if x.shape[1:].numel() == 0:  # the type of the error of torch's max pooling
        raise RuntimeError(f"x: expected channels and pixels, got shape {list(x.shape)}")
    return dtype


def check_block_arguments(
    x: Tensor,
    layers: Sequence[DenseLayer],
    drop_rate: float,
    recompute: str,
    reader: BatchNorm | None,
    projection: Tensor | None,
    dtype: torch.dtype | None = None,
) -> torch.dtype:
    """The dtype of the features of a dense block, or an error that names the wrong argument.

    Args:
        dtype: that the block computes in, where autocast has been decided on; x and weights are
            cast to it.
    """
    check_tensor("x", x)
    check_images("x", x, fewest_spatial_dims=1)
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: expected one of {RECOMPUTE}, got {recompute!r}")
    check_drop_rate(drop_rate)
    if not isinstance(layers, (list, tuple)):
        raise TypeError(f"layers: expected a list or tuple of DenseLayer, got {_type(layers)}")
    if not layers:
        raise ValueError("layers: expected at least one, got none")
    for i, layer in enumerate(layers):
        if not all(hasattr(layer, field) for field in ("norm1", "conv1", "norm2", "conv2")):
            raise TypeError(f"layers[{i}]: expected a DenseLayer, got {_type(layer)}")
    check_dtype("x", x)
    is_cast = dtype is not None or _autocast_dtype(x) is not None
    dtype = dtype or computed_dtype(x)
    for i, layer in enumerate(layers):
        _check_dims(f"layers[{i}]", layer, x)
    channels, first = x.size(1), layers[0].conv2
    reads = layers[0].conv1.size(1)
    if projection is not None:
        shape = reads, channels, *(1,) * (x.dim() - 2)
        check_weight("projection", projection, shape, x, dtype, is_cast)
        if drop_rate > 0:
            raise ValueError(f"projection: expected None with dropout, got drop_rate {drop_rate}")
        channels = reads
    if reads != channels:
        raise ValueError(
            f"x: expected {reads} channels, which layers[0].conv1 reads, got shape {list(x.shape)}"
        )
    for i, layer in enumerate(layers):
        name = f"layers[{i}]"
        _check_convolutions(name, layer, channels, first, x, dtype, is_cast)
        check_norm(f"{name}.norm1.", layer.norm1, channels, x, dtype)
        check_norm(f"{name}.norm2.", layer.norm2, first.size(1), x, dtype)
        channels += first.size(0)
    if reader is not None:
        check_norm("reader.", reader, channels, x, dtype)
    return dtype


def _check_dims(name: str, layer: DenseLayer, x: Tensor) -> None:
    """Numbers of dimensions come first: an image without a batch has wrong channels as well."""
    for field in ("conv1", "conv2"):
        weight = getattr(layer, field)
        check_tensor(f"{name}.{field}", weight)
        if not 3 <= weight.dim() <= 5:
            raise ValueError(
                f"{name}.{field}: expected the weight of a convolution in 1 to 3 dimensions, got "
                f"shape {list(weight.shape)}"
            )
    if layer.conv1.dim() != layer.conv2.dim():
        raise ValueError(
            f"{name}.conv2: expected {layer.conv1.dim() - 2} spatial dimensions as those of "
            f"{name}.conv1, got shape {list(layer.conv2.shape)}"
        )
    if x.dim() != layer.conv1.dim():
        raise ValueError(
            f"x: expected [N, C, *spatial] with {layer.conv1.dim() - 2} spatial dimensions as "
            f"{name}.conv1, got shape {list(x.shape)}"
        )


def in_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x. (It does not know the meta device.)"""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def computed_dtype(x: Tensor) -> torch.dtype:
    """What x is computed in."""
    return _autocast_dtype(x) or x.dtype


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What x is cast to where autocast is on; like torch, it leaves float64 alone."""
    if x.dtype == torch.float64 or not in_autocast(x):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _check_convolutions(
    name: str,
    layer: DenseLayer,
    channels: int,
    first: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    is_cast: bool,
) -> None:
    """``first``: the second convolution of the first layer, whose shape all layers share."""
    (growth, bottleneck, *kernel), shape = first.shape, list(layer.conv2.shape)
    if any(size % 2 == 0 for size in kernel) or 0 in (growth, bottleneck):
        raise ValueError(
            f"{name}.conv2: expected [k, B, *kernel] with {x.dim() - 2} odd kernel sizes, got "
            f"shape {shape}"
        )
    if layer.conv1.size(0) != bottleneck:
        raise ValueError(
            f"{name}.conv1: expected as many results as the {bottleneck} channels that "
            f"layers[0].conv2 reads, got shape {list(layer.conv1.shape)}"
        )
    ones = (1,) * (x.dim() - 2)
    check_weight(f"{name}.conv1", layer.conv1, (bottleneck, channels, *ones), x, dtype, is_cast)
    check_weight(f"{name}.conv2", layer.conv2, tuple(first.shape), x, dtype, is_cast)


def check_weight(
    name: str,
    weight: Tensor,
    shape: tuple[int, ...],
    x: Tensor,
    dtype: torch.dtype,
    is_cast: bool = False,
) -> None:
    """``is_cast``: weights of other dtypes are cast, as autocast does."""
    check_tensor(name, weight)
    if weight.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got shape {list(weight.shape)}")
    if weight.dtype != dtype and (not is_cast or weight.dtype == torch.float64):
        raise TypeError(f"{name}: expected {dtype} for {dtype} features, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} of x, got {weight.device}")


def check_norm(prefix: str, norm: BatchNorm, channels: int, x: Tensor, dtype: torch.dtype) -> None:
    """Raises an error that names the field that is wrong, with ``prefix`` before its name.

    Args:
        channels: of what the norm reads.
        x: a tensor on the device where it runs.
        dtype: of what the norm reads, as it is computed.
    """
    _check_norm_numbers(prefix, norm)
    given = []
    for field in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(norm, field)
        if tensor is not None:
            _check_per_channel(f"{prefix}{field}", tensor, channels, dtype, x.device)
            given.append((field, tensor))
    for field, tensor in given[1:]:  # as torch's, the norm has one dtype
        if tensor.dtype != given[0][1].dtype:
            raise TypeError(
                f"{prefix}{field}: expected {given[0][1].dtype} of {prefix}{given[0][0]}, got "
                f"{tensor.dtype}"
            )
    _check_running_statistics(prefix, norm, x.device)
    if channels == 0 and not (norm.weight is None and norm.bias is None):
        # Torch's batch norm raises this type of error; without weight and bias it accepts that.
        raise IndexError(f"{prefix}weight: expected at least one channel, got none")


def _check_norm_numbers(prefix: str, norm: BatchNorm) -> None:
    check_bool(f"{prefix}training", norm.training)
    if norm.momentum is not None:
        check_number(f"{prefix}momentum", norm.momentum)
    check_number(f"{prefix}eps", norm.eps)
    # As torch, which takes 0 in evaluation, where the variances are known.
    if not (norm.eps > 0 or (norm.eps == 0 and not norm.training)):
        raise ValueError(f"{prefix}eps: expected a number > 0, got {norm.eps}")


def _check_running_statistics(prefix: str, norm: BatchNorm, device: torch.device) -> None:
    running = {"running_mean": norm.running_mean, "running_var": norm.running_var}
    missing = [field for field, tensor in running.items() if tensor is None]
    if missing and not norm.training:
        raise ValueError(f"{prefix}{missing[0]}: expected a tensor when training=False, got None")
    if len(missing) == 1:
        raise ValueError(
            f"{prefix}{missing[0]}: running_mean and running_var must either both be None or "
            "neither be None"
        )
    for field, tensor in running.items():
        if tensor is None:
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{prefix}{field}: expected a tensor that does not require grad")
        if norm.training and tensor.numel() > 1 and tensor.stride(0) == 0:
            raise ValueError(
                f"{prefix}{field}: expected memory of its own for each channel, because it is "
                "updated in place; got an expanded tensor"
            )
    if norm.training and norm.num_batches_tracked is not None:
        _check_count(f"{prefix}num_batches_tracked", norm.num_batches_tracked, device)


def _check_count(name: str, count: Any, device: torch.device) -> None:
    check_tensor(name, count)
    if count.dtype != torch.int64 or count.numel() != 1:
        raise TypeError(
            f"{name}: expected one int64 number, got {count.dtype} of shape {list(count.shape)}"
        )
    if count.device != device:
        raise ValueError(f"{name}: expected device {device} of the features, got {count.device}")


def _type(value: object) -> str:
    return type(value).__name__


def check_spatial_dims(x: Tensor, spatial_dims: int) -> None:
    check_tensor("x", x)
    # Channels are left to the first convolution: its message is clear, and it may be replaced.
    if x.dim() != 2 + spatial_dims:
        raise ValueError(
            f"x: expected [N, C, *spatial] with {spatial_dims} spatial dimensions, got shape "
            f"{list(x.shape)}"
        )


def check_positive(**values: int) -> None:
    for name, value in values.items():
        if not _is_integer(value):
            raise TypeError(f"{name}: expected a positive integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value}")


def check_bn_size(bn_size: int | None) -> None:
    if bn_size is not None:
        check_positive(bn_size=bn_size)


def check_block_config(block_config: Sequence[int]) -> None:
    is_sequence = isinstance(block_config, Sequence) and all(map(_is_integer, block_config))
    if not is_sequence or not block_config or min(block_config) < 1:
        error = ValueError if is_sequence else TypeError
        raise error(f"block_config: expected at least one positive integer, got {block_config!r}")


def check_num_classes(num_classes: int) -> None:
    if not _is_integer(num_classes):
        raise TypeError(f"num_classes: expected an integer, got {num_classes!r}")
    if num_classes < 0:
        raise ValueError(f"num_classes: expected 0 or more, got {num_classes}")


def check_drop_rate(drop_rate: float) -> None:
    check_number("drop_rate", drop_rate)
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate: expected a number in [0, 1), got {drop_rate}")


def check_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {_type(value)}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {_type(value)}")


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        shown = repr(value) if isinstance(value, (str, bool)) else _type(value)
        raise TypeError(f"{name}: expected a number, got {shown}")


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")

"""How a block's 1x1 convolutions run: kernels of our own on tensor cores, or operators of torch.

The kernels (csrc/bn_relu_conv1x1.h) normalise, multiply and take statistics at once, and the
normalised features never reach memory. They compute what torch would with the user's settings, so
float32 runs on them only where torch's convolutions may use TF32.
"""

from __future__ import annotations

import enum
import functools

import torch

from ._extension import _C


class Conv1x1(enum.IntEnum):
    """Numbered as in csrc/dense_block.cpp."""

    CONVOLUTION = 0
    PRODUCT = 1
    TENSOR_CORES = 2


def why_not_tensor_cores(
    device: torch.device, dtype: torch.dtype, channels: int, bottleneck: int
) -> str | None:
    """Why a block's 1x1 convolutions run as operators of torch; None where they do not.

    Args:
        device, dtype: of the features, as they are computed.
        channels: of the block's result.
        bottleneck: channels of each 1x1 convolution's result.
    """
    if device.type != "cuda":
        return f"the features are on {device.type}"
    if dtype == torch.float32 and _fp32_precision("cuda", "conv") != "tf32":
        return "TF32 is off for convolutions"
    return _why_not_on_device(device_index(device), dtype.itemsize, bottleneck, channels)


def device_index(device: torch.device) -> int:
    """Of a CUDA device."""
    return torch.cuda.current_device() if device.index is None else device.index


def choose_conv1x1(
    device: torch.device, dtype: torch.dtype, channels: int, bottleneck: int
) -> Conv1x1:
    """The fastest way that gives what torch's settings ask for. Arguments as above."""
    if why_not_tensor_cores(device, dtype, channels, bottleneck) is None:
        return Conv1x1.TENSOR_CORES
    return Conv1x1.PRODUCT if products_are_as_convolutions(device, dtype) else Conv1x1.CONVOLUTION


@functools.cache
def _why_not_on_device(index: int, itemsize: int, bottleneck: int, channels: int) -> str | None:
    return _C.why_no_tensor_cores(index, itemsize, bottleneck, channels) or None


def products_are_as_convolutions(device: torch.device, dtype: torch.dtype) -> bool:
    """Matrix products have TF32 settings of their own."""
    if dtype != torch.float32:
        return True
    backend = "cuda" if device.type == "cuda" else "mkldnn"
    convolution, product = (_fp32_precision(backend, name) for name in ("conv", "matmul"))
    exact = ("none", "ieee")
    return convolution == product or (convolution in exact and product in exact)


def _fp32_precision(backend: str, operator: str) -> str:
    """Both of torch's ways to set TF32 end in what is asked here; the older attributes raise once
    the newer were used.
    """
    return torch._C._get_fp32_precision_getter(backend, operator)

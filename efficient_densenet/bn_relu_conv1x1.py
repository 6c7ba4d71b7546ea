"""Torch's settings, and how the convolutions of a block run with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._extension import _C


def allows_tf32(device: torch.device) -> bool:
    """Whether torch's convolutions may use TF32."""
    return device.type == "cuda" and _fp32_precision("cuda", "conv") == "tf32"


def settings(device: torch.device, dtype: torch.dtype) -> tuple[bool, bool]:
    return allows_tf32(device), products_are_as_convolutions(device, dtype)


def kernel_path(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[int],
    growth: int,
    bottleneck: int,
    kernel: Sequence[int],
    drops: bool,
) -> tuple[str, str, str]:
    index = 0
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    path: tuple[str, str, str] = _C.kernel_path(
        device.type, index, dtype.itemsize, *settings(device, dtype), list(sizes), growth,
        bottleneck, list(kernel), drops,
    )  # fmt: skip
    return path


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

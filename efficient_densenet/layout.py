"""Memory formats of ``[N, C, *spatial]`` tensors with any number of spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """As ``torch.cat`` and convolutions see it: channels, columns, rows, images, from the inside.

    Where sizes of 1 make a tensor both, it is contiguous.
    """
    if x.dim() not in (4, 5):
        return False
    smallest = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        stride = x.stride(d)
        if x.size(d) == 0 or stride < smallest or (d == 0 and smallest == x.stride(1)):
            return False
        smallest = stride * max(x.size(d), 1)
    return x.stride(1) != 0


def dense_strides(sizes: Sequence[int], channels_last: bool) -> list[int]:
    """Strides without gaps, with the channels outside or inside of the spatial dimensions."""
    dims = range(len(sizes))
    order = [0, *dims[2:], 1] if channels_last else dims  # outermost first
    strides = [1] * len(sizes)
    stride = 1
    for d in reversed(order):
        strides[d] = stride
        stride *= max(sizes[d], 1)
    return strides


def with_strides(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values with the strides of a parameter: a view of them where that can be."""
    if tensor.stride() == tuple(strides):
        return tensor
    sizes = tensor.shape
    fits = all(n == 1 or a == b for n, a, b in zip(sizes, tensor.stride(), strides, strict=True))
    if fits:
        # The compiler of torch 2.11 takes an offset that is not given for 0.
        return tensor.as_strided(sizes, strides, tensor.storage_offset())
    overlaps = any(n > 1 and stride == 0 for n, stride in zip(sizes, strides, strict=True))
    if overlaps:  # an expanded parameter
        return tensor.contiguous()
    return tensor.new_empty_strided(sizes, strides).copy_(tensor)


def convolution_is_channels_last(
    x: Tensor, x_is_channels_last: bool, weight: Tensor, dtype: torch.dtype
) -> bool:
    """Whether torch's result of a convolution is, with images of ``x`` in some format and dtype."""
    dims = x.dim() - 2
    if x.is_cuda:
        knows_channels_last = dtype != torch.float64
        return knows_channels_last and (x_is_channels_last or is_channels_last(weight))
    sizes = x.size(0), weight.size(1), *x.shape[2:]
    strides = dense_strides(sizes, x_is_channels_last and dims > 1)
    images = torch.empty_strided(sizes, strides, dtype=dtype, device=x.device)
    padding = [size // 2 for size in weight.shape[2:]]
    ones, zeros = [1] * dims, [0] * dims
    weight = weight.detach().to(dtype)
    backend = torch._C._select_conv_backend(
        images, weight, None, ones, padding, ones, False, zeros, 1, None
    )
    format_ = torch._C._conv_determine_backend_memory_format(images, weight, backend)
    return dims > 1 and format_ in (torch.channels_last, torch.channels_last_3d)


def plain_formats(
    x: Tensor, convolutions: Sequence[Sequence[Tensor]], dtype: torch.dtype
) -> list[bool]:
    """Whether the new features of each dense layer are channels-last in the plain composition."""
    concatenation, formats = is_channels_last(x), []
    for weights in convolutions:
        new = concatenation
        for weight in weights:
            new = convolution_is_channels_last(x, new, weight, dtype)
        formats.append(new)
        concatenation = concatenation and formats[-1]
    return formats


def block_is_channels_last(
    x: Tensor, convolutions: Sequence[Sequence[Tensor]], dtype: torch.dtype
) -> bool:
    """Whether the output of a dense block is channels-last in the plain composition."""
    return is_channels_last(x) and all(plain_formats(x, convolutions, dtype))

"""How a block's second convolutions run: kernels of our own on tensor cores, or operators of torch.

The kernels (csrc/bn_relu_conv3x3.h) normalise, convolve and take statistics at once; backward, they
gather the gradient, convolve, and mask it. What is normalised never reaches memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from ._extension import _C
from .bn_relu_conv1x1 import device_index, why_not_tensor_cores


def why_not_conv3x3(
    features: Tensor, kernel: Sequence[int], growth: int, bottleneck: int, drops: bool
) -> str | None:
    """Why a block's second convolutions run as operators of torch; None where they do not.

    Args:
        features: ``[N, C, *spatial]`` of the block, of the dtype that is computed with.
        kernel: sizes of the convolutions.
        growth, bottleneck: channels of the convolutions' results and inputs.
        drops: whether dropout follows them.
    """
    why = why_not_tensor_cores(features.device, features.dtype, features.size(1), bottleneck)
    if why is not None:
        return why
    if features.dim() != 4 or tuple(kernel) != (3, 3):
        return f"convolutions of size {tuple(kernel)} of {features.dim() - 2} spatial dimensions"
    if drops:
        return "dropout follows the convolutions"
    index, itemsize = device_index(features.device), features.dtype.itemsize
    return _why_not_on_device(index, itemsize, growth, bottleneck, features.size(3))


@functools.cache
def _why_not_on_device(
    index: int, itemsize: int, growth: int, bottleneck: int, width: int
) -> str | None:
    return _C.why_no_conv3x3(index, itemsize, growth, bottleneck, width) or None

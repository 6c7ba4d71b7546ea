"""What the tests of tensor-core kernels share."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from efficient_densenet._extension import _C

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = {torch.float32: 2.0**-10, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # of operands
BN_EPS = 1e-5

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])


def has_tensor_cores():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


requires_tensor_cores = pytest.mark.skipif(
    not has_tensor_cores(), reason="needs a GPU of compute capability 8.0"
)


def kernels_of(function, names):
    """Which of these kernels a call launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    launched = [event.name for event in profiler.events()]
    return {name for name in names if any(name in one for one in launched)}


def train(block, x):
    block(x).float().square().mean().backward()


def kernel_path(
    device, dtype, sizes, growth, bottleneck, kernel=(3, 3), drops=False, products_match=True
):
    """How a block would run, where torch's convolutions may use TF32."""
    settings = dtype.itemsize, True, products_match
    return _C.kernel_path(
        device, 0, *settings, list(sizes), growth, bottleneck, list(kernel), drops
    )

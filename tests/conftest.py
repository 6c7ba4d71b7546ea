"""Every test that takes `device` runs on the CPU and, where there is one, on a GPU as well."""

import pytest
import torch

from reference import DEVICES


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def full_precision_and_seed():
    """Comparisons are about our arithmetic: cuDNN and cuBLAS stay in float32, and deterministic."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True

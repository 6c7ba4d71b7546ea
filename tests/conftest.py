"""Every test that takes `device` runs on the CPU and, where there is one, on a GPU as well."""

import os

import pytest
import torch

from efficient_densenet import runner
from efficient_densenet._extension import _C
from reference import DEVICES

# Processes of pytest-xdist share the cores instead of having all of them each.
processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if processes > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
THREADS = torch.get_num_threads()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def one_thread():
    """Small problems are no faster on more, and far slower where other processes run as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def all_threads(one_thread):
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def full_precision_and_seed():
    """Comparisons are about our arithmetic: cuDNN and cuBLAS stay in float32, and deterministic."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@pytest.fixture
def tf32():
    """As torch's defaults: on for convolutions. Here for products too, so that plain has it."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def specs(monkeypatch):
    """Descriptions of the blocks that modules run, in their order."""
    found, run = [], runner.run_dense_block

    def record(spec, *arguments):
        found.append(spec)
        return run(spec, *arguments)

    monkeypatch.setattr(runner, "run_dense_block", record)
    return found


@pytest.fixture
def little_shared_memory():
    """99 KB, as compute capability 8.6 and 8.9."""
    _C.limit_shared_memory(99 << 10)
    yield
    _C.limit_shared_memory(0)

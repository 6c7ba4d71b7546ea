"""Which errors of the operators become torch.OutOfMemoryError; no GPU is needed to decide that."""

import pytest
import torch

from efficient_densenet import out_of_memory
from efficient_densenet.out_of_memory import out_of_memory_as_torch_raises_it

HEADERS = 'torch_call_dispatcher("aten::empty") API call failed at ops.h, line 5'
OURS = "efficient_densenet: aten::convolution failed: torch has printed why"
WRONG = "efficient_densenet::dense_block: conv1: expected B times the sum of C_l elements"


@pytest.fixture
def refuse(monkeypatch):
    """An allocator of a GPU that has refused as many requests as it is told to."""
    stats = {"num_ooms": 0}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 70 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 79 * 2**30)
    monkeypatch.setattr(out_of_memory, "_refused", {})

    def more(count):
        stats["num_ooms"] += count

    return more


def raised(text, device="cuda:0"):
    """The error that leaves the context for one of this text."""
    with (
        pytest.raises(RuntimeError) as info,
        out_of_memory_as_torch_raises_it(torch.device(device)),
    ):
        raise RuntimeError(text)
    return info.value


@pytest.mark.parametrize("text", [HEADERS, OURS])
def test_a_call_that_fails_for_want_of_memory(refuse, text):
    refuse(1)
    error = raised(text)
    assert type(error) is torch.OutOfMemoryError
    assert text in str(error)
    assert "CUDA out of memory" in str(error) and "70.00 GiB is allocated by PyTorch" in str(error)
    # The same failure, but nothing has been refused since.
    assert type(raised(text)) is RuntimeError
    refuse(1)
    assert type(raised(text)) is torch.OutOfMemoryError


def test_a_torch_that_tells_why(refuse):
    text = "efficient_densenet: aten::mm failed: CUDA out of memory. Tried to allocate 2 GiB"
    error = raised(text)
    assert type(error) is torch.OutOfMemoryError and str(error) == text


def test_other_errors_stay(refuse):
    refuse(1)
    assert type(raised(WRONG)) is RuntimeError
    assert type(raised(OURS, device="cpu")) is RuntimeError
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with (
        pytest.raises(torch.OutOfMemoryError) as info,
        out_of_memory_as_torch_raises_it(torch.device("cuda:0")),
    ):
        raise error
    assert info.value is error

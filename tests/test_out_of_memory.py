"""Which errors of the operators become torch.OutOfMemoryError, and what such an error leaves."""

import copy

import pytest
import torch

from efficient_densenet import DenseBlock, out_of_memory
from efficient_densenet.out_of_memory import out_of_memory_as_torch_raises_it
from reference import requires_cuda

HEADERS = 'torch_call_dispatcher("aten::empty") API call failed at ops.h, line 5'
OURS = "efficient_densenet: aten::convolution failed: torch has printed why"
WRONG = "efficient_densenet::dense_block: conv1: expected B times the sum of C_l elements"


@pytest.fixture
def refuse(monkeypatch):
    """An allocator of a GPU; the fixture's value makes it refuse requests."""
    observers = []
    attach = "_cuda_attach_out_of_memory_observer"
    monkeypatch.setattr(torch._C, attach, observers.append, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 70 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 79 * 2**30)
    out_of_memory._count_refusals.cache_clear()

    def more(count, device=0):
        for _ in range(count):
            for observer in observers:
                observer(device, 2**30, 80 * 2**30, 2**20)

    yield more
    assert len(observers) <= 1
    out_of_memory._count_refusals.cache_clear()


def raised(text, device="cuda:0", within=lambda: None):
    """The error that leaves the context for one of this text, after `within` in the context."""
    with (
        pytest.raises(RuntimeError) as info,
        out_of_memory_as_torch_raises_it(torch.device(device)),
    ):
        within()
        raise RuntimeError(text)
    return info.value


@pytest.mark.parametrize("text", [HEADERS, OURS])
def test_a_call_that_fails_for_want_of_memory(refuse, text):
    error = raised(text, within=lambda: refuse(1))
    assert type(error) is torch.OutOfMemoryError
    assert text in str(error)
    assert "CUDA out of memory" in str(error) and "70.00 GiB is allocated by PyTorch" in str(error)


def test_what_was_refused_before_is_not_the_cause(refuse):
    with out_of_memory_as_torch_raises_it(torch.device("cuda:0")):
        refuse(1)  # and torch found another way
    refuse(3)
    assert type(raised(OURS)) is RuntimeError
    assert type(raised(OURS, within=lambda: refuse(1, device=1))) is RuntimeError
    assert type(raised(OURS, within=lambda: refuse(1))) is torch.OutOfMemoryError
    assert type(raised(OURS)) is RuntimeError
    second = raised(OURS, "cuda:1", lambda: refuse(2, device=1))
    assert type(second) is torch.OutOfMemoryError and "GPU 1" in str(second)


def test_a_torch_that_tells_why(refuse):
    text = "efficient_densenet: aten::mm failed: CUDA out of memory. Tried to allocate 2 GiB"
    error = raised(text)
    assert type(error) is torch.OutOfMemoryError and str(error) == text


def test_other_errors_stay(refuse):
    assert type(raised(WRONG, within=lambda: refuse(1))) is RuntimeError
    assert type(raised(OURS, "cpu", lambda: refuse(1))) is RuntimeError
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with (
        pytest.raises(torch.OutOfMemoryError) as info,
        out_of_memory_as_torch_raises_it(torch.device("cuda:0")),
    ):
        raise error
    assert info.value is error


def test_an_allocator_without_observers(refuse, monkeypatch):
    def attach(observer):
        raise RuntimeError("cudaMallocAsync does not yet support attachOutOfMemoryObserver")

    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", attach)
    assert type(raised(OURS)) is RuntimeError
    assert type(raised("CUDA out of memory")) is torch.OutOfMemoryError


class LimitedMemory:
    """Within it, the process may allocate so many bytes more than it has now."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def __enter__(self):
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        limit = torch.cuda.memory_reserved() + self.nbytes
        torch.cuda.set_per_process_memory_fraction(limit / total)

    def __exit__(self, *_):
        torch.cuda.set_per_process_memory_fraction(1.0)


def bytes_needed(function):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    return torch.cuda.max_memory_allocated() - before, result


def assert_same_state(block, expected):
    for name, value in block.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@requires_cuda
@pytest.mark.parametrize("recompute", ["bottleneck", "features"])
def test_out_of_memory_in_a_block(recompute):
    """Forward and backward are limited one by one: which needs more depends on torch's libraries,
    whose convolutions take workspace of their own."""
    block = DenseBlock(4, 32, 16, recompute=recompute).cuda()
    initial = copy.deepcopy(block.state_dict())
    small = torch.randn(2, 32, 96, 96, device="cuda")
    big = small.repeat(32, 1, 1, 1)

    def backward(y):
        y.square().mean().backward()

    def recovers():
        """A step that fits gives what it gives in a block that has met no error."""
        fresh = DenseBlock(4, 32, 16, recompute=recompute).cuda()
        fresh.load_state_dict(block.state_dict())
        block.zero_grad()
        for one in (block, fresh):
            backward(one(small))
        for ours, expected in zip(block.parameters(), fresh.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-6)

    recovers()  # libraries' workspaces stay
    block.load_state_dict(initial)
    forward_bytes, y = bytes_needed(lambda: block(big))
    after_forward = copy.deepcopy(block.state_dict())
    backward_bytes, _ = bytes_needed(lambda: backward(y))
    del y
    failed = {"forward": 0, "backward": 0}
    for part in (0.1, 0.3, 0.5, 0.7, 0.9):
        block.load_state_dict(initial)
        block.zero_grad()
        y = None
        with LimitedMemory(part * forward_bytes):
            try:
                y = block(big)
            except torch.OutOfMemoryError as error:
                assert "out of memory" in str(error)
                failed["forward"] += 1
        assert_same_state(block, initial if y is None else after_forward)
        y = None
        recovers()

        block.load_state_dict(initial)
        block.zero_grad()
        y = block(big)
        with LimitedMemory(part * backward_bytes):
            try:
                backward(y)
            except torch.OutOfMemoryError as error:
                assert "out of memory" in str(error)
                failed["backward"] += 1
        assert_same_state(block, after_forward)
        y = None
        recovers()
    assert failed["forward"] and failed["backward"], failed

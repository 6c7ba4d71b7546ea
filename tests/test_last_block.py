"""Sums over blocks that end in their last block (csrc/cuda/elementwise/last_block.cuh).

The counters that tell who is last belong to one call: neither another stream, nor a call that
failed, nor a replay of a graph may leave anything in them.
"""

from __future__ import annotations

import pytest
import torch

from efficient_densenet import DenseNet
from reference import requires_cuda

pytestmark = requires_cuda

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Images of 8 x 8: with so many, kernels have one block, a few, more than a hundred, or so many that
# teams of blocks add up before all of them do.
BATCHES = [1, 7, 64, 300, 512]


@pytest.fixture(autouse=True)
def default_precision(tf32):
    torch.backends.cudnn.deterministic = True


def make_step(dtype, batch, seed=0):
    """A training step that starts from the same state every time, and all that it computes."""
    torch.manual_seed(seed)
    model = DenseNet(12, (3, 2), num_init_features=24, num_classes=5, efficient=True)
    model = model.to("cuda", dtype, memory_format=torch.channels_last)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(batch, 3, 8, 8).to("cuda", dtype).requires_grad_()

    def step():
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(state[name])
        model.zero_grad(set_to_none=True)
        x.grad = None
        y = model(x)
        y.sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    return step


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


def assert_same_bits(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), i


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_times_on_two_streams(dtype, batch):
    steps = [make_step(dtype, batch, seed) for seed in range(2)]
    expected = [copies(step()) for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    for _ in range(100):
        found = []
        for stream, step in zip(streams, steps, strict=True):
            with torch.cuda.stream(stream):
                found.append(step())
        torch.cuda.synchronize()
        for ours, one_by_one in zip(found, expected, strict=True):
            assert_same_bits(ours, one_by_one)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replays_of_a_graph(dtype, batch):
    step = make_step(dtype, batch)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = copies(step())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(found, expected)


def test_after_running_out_of_memory():
    step, large = make_step(torch.bfloat16, 64), make_step(torch.bfloat16, 16384, seed=1)
    expected = copies(step())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_allocated() + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        for _ in range(3):
            with pytest.raises(torch.OutOfMemoryError):
                large()
            assert_same_bits(step(), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("rows", [1, 31 * 128, 32 * 128, 33 * 128, 40 * 128 + 1, 200_000])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_moments_of_any_number_of_blocks(rows, mean):
    x = torch.randn(rows, 40, device="cuda", dtype=torch.float64).add_(mean).float()
    found = torch.ops.efficient_densenet.concat_bn_stats([x])
    exact = x.double()
    expected = exact.mean(0), exact.var(0, correction=0)
    for ours, value in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("size", [64, 256])
def test_averages_of_few_large_images(images, size):
    """By several blocks each, and by several teams of them."""
    torch.manual_seed(0)
    model = DenseNet(12, (2, 2), num_init_features=24, num_classes=5, efficient=True)
    model = model.to("cuda", torch.float32).eval()
    plain = DenseNet(12, (2, 2), num_init_features=24, num_classes=5).to("cuda", torch.float64)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(images, 3, size, size, device="cuda")
    with torch.no_grad():
        found = [model(x) for _ in range(20)]
        torch.testing.assert_close(
            found[0].double(), plain.eval()(x.double()), rtol=2e-2, atol=2e-2
        )
    for again in found[1:]:
        assert torch.equal(again, found[0])

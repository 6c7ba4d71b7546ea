"""The running statistics of several norms, moved by one call."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from efficient_densenet import BatchNorm
from efficient_densenet.batch_norm import RunningUpdates
from reference import in_format

CHANNELS = [3, 1, 5]


def make_norms(device, strided, momentum=0.3, dtype=torch.float32):
    def buffer(channels, offset):
        values = offset + torch.rand(channels, device=device, dtype=dtype)
        return torch.stack([values] * 2, 1)[:, 0] if strided else values

    return [
        BatchNorm(
            buffer(c, -0.5), buffer(c, 0.5), training=True, momentum=momentum,
            num_batches_tracked=torch.tensor(4 + c, device=device),
        )
        for c in CHANNELS
    ]  # fmt: skip


def plain_update(norm, x, begin):
    count, momentum = norm.num_batches_tracked, norm.momentum
    if count is not None:
        count.add_(1)
    if norm.running_mean is None or x.numel() == 0:
        return
    if momentum is None:
        momentum = 1 / float(count)
    x = x[:, begin : begin + norm.running_mean.numel()].to(norm.running_mean.dtype)
    F.batch_norm(x, norm.running_mean, norm.running_var, training=True, momentum=momentum)


def update_running_statistics(norms, *batch):
    updates = RunningUpdates()
    add(updates, norms, *batch)
    updates.move()


def add(updates, norms, mean, var, rows):
    begins, norms = zip(*norms, strict=True)
    fields = ("running_mean", "running_var", "num_batches_tracked")
    buffers = [[getattr(norm, field) for norm in norms] for field in fields]
    updates.add(begins, buffers, [norm.momentum for norm in norms], mean, var, rows)


def copies(norms):
    """Of buffers; those that norms share stay shared."""
    memo = {}

    def copy(tensor):
        return None if tensor is None else memo.setdefault(id(tensor), tensor.clone())

    fields = ("running_mean", "running_var", "num_batches_tracked")
    return [norm._replace(**{f: copy(getattr(norm, f)) for f in fields}) for norm in norms]


def check(norms, x, begins):
    expected = copies(norms)
    for norm, begin in zip(expected, begins, strict=True):
        plain_update(norm, x, begin)
    rows = x.numel() // x.size(1)
    wide = x.double()
    mean, var = wide.mean((0, 2)), wide.var((0, 2), correction=0)
    update_running_statistics(list(zip(begins, norms, strict=True)), mean, var, rows)
    for ours, plain in zip(norms, expected, strict=True):
        for found, value in zip(ours, plain, strict=True):
            if isinstance(found, torch.Tensor):
                torch.testing.assert_close(found, value, equal_nan=True)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("momentum", [0.3, None, 0, 1, 2.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [6, 0])
def test_against_plain_batch_norm(device, strided, momentum, batch):
    norms = make_norms(device, strided, momentum)
    norms[1] = norms[1]._replace(training=True, running_mean=None, running_var=None)
    check(norms, torch.randn(batch, 9, 4, device=device), [0, 3, 4])


@pytest.mark.parametrize("strided", [False, True])
def test_norms_that_share_buffers_move_twice(device, strided):
    first, _, third = make_norms(device, strided)
    count_only = BatchNorm(None, None, training=True, num_batches_tracked=first.num_batches_tracked)
    norms = [first, third, first, count_only, third._replace(momentum=None)]
    check(norms, torch.randn(6, 9, 4, device=device), [0, 3, 5, 0, 1])


def test_what_does_not_move(device):
    without = BatchNorm(None, None, training=True)
    mean = torch.ones(9, device=device, dtype=torch.float64)
    update_running_statistics([(3, without)], mean, mean, 7)
    RunningUpdates().move()


@pytest.mark.parametrize("count", [2, 150])
@pytest.mark.parametrize("shared", [False, True])
def test_batches_of_several_blocks_move_in_one_call(device, count, shared):
    """With rows and statistics of their own; a norm that they share, once for each."""
    updates, expected = RunningUpdates(), []
    for i in range(count):
        if i == 0 or not shared:
            norms = make_norms(device, strided=i % 2 == 1)
            moved = copies(norms)
        x = torch.randn(3 + i % 5, 9, 4, device=device)
        for norm, begin in zip(moved, [0, 3, 4], strict=True):
            plain_update(norm, x, begin)
        wide = x.double()
        batch = wide.mean((0, 2)), wide.var((0, 2), correction=0), x.size(0) * 4
        add(updates, list(zip([0, 3, 4], norms, strict=True)), *batch)
        expected.append((norms, moved))
    updates.move()
    updates.move()  # nothing waits any more
    for norms, moved in expected:
        for ours, plain in zip(norms, moved, strict=True):
            for found, value in zip(ours[:2], plain[:2], strict=True):
                torch.testing.assert_close(found, value)
            assert torch.equal(ours.num_batches_tracked, plain.num_batches_tracked)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_dtypes(device, dtype, strided):
    norms = make_norms(device, strided, dtype=dtype)
    x = torch.randn(6, 9, 4, device=device, dtype=torch.float64)
    mean, var = x.mean((0, 2)), x.var((0, 2), correction=0)
    expected = [
        (0.7 * n.running_mean.double() + 0.3 * mean[b : b + n.running_mean.numel()]).to(dtype)
        for n, b in zip(norms, (0, 3, 4), strict=True)
    ]
    update_running_statistics(list(zip((0, 3, 4), norms, strict=True)), mean, var, 24)
    for norm, value in zip(norms, expected, strict=True):
        torch.testing.assert_close(norm.running_mean, value)


def test_versions_stay(device):
    """As with torch's batch norm, which keeps them for its backward pass."""
    for strided in (False, True):
        norms = make_norms(device, strided)
        buffers = list(itertools.chain(*(norm[:2] for norm in norms)))
        versions = [buffer._version for buffer in buffers]
        check(norms, in_format(torch.randn(6, 9, 4, device=device), "strided"), [0, 3, 4])
        assert [buffer._version for buffer in buffers] == versions

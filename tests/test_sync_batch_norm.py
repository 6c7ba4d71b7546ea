"""Statistics over processes: ranks with parts of a batch against one with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from efficient_densenet import SharedStorage, concat_bn_relu, recompute_in_backward
from reference import relative_error

CHANNELS = [3, 0, 5]
# Images of each rank.
BATCHES = [(3, 3), (5, 1), (4, 0), (0, 4), (1, 1), (2, 3, 4), (0, 6, 1), (7, 0, 0)]
SPATIAL = (3, 2)
MOMENTUM = 0.3


def make_tensors(images, dtype, mean=0.5):
    """All numbers of one problem: the whole batch, the norm, a convolution, the gradient."""
    generator = torch.Generator().manual_seed(images)
    channels = sum(CHANNELS)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {f"x{i}": mean + 2 * randn(images, c, *SPATIAL) for i, c in enumerate(CHANNELS)}
    tensors |= {"running_mean": randn(channels), "running_var": randn(channels).square() + 0.5}
    tensors |= {"weight": 1 + 0.3 * randn(channels), "bias": randn(channels)}
    tensors |= {"conv": randn(2, channels, 1, 1), "grad": randn(images, 2, *SPATIAL)}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: tensor.to(dtype if name[0] in "xg" or name == "conv" else wide)
        for name, tensor in tensors.items()
    }


def run(tensors, normalise):
    """Everything that a forward and a backward pass give."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    running = tensors.pop("running_mean"), tensors.pop("running_var")
    grad = tensors.pop("grad")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    features = [leaves[f"x{i}"] for i in range(len(CHANNELS))]
    y, z = normalise(features, running, leaves["weight"], leaves["bias"], leaves["conv"])
    y = y.detach().clone()
    gradients = torch.autograd.grad(z, list(leaves.values()), grad)
    found = dict(zip((f"grad_{name}" for name in leaves), gradients, strict=True))
    return found | {"y": y, "running_mean": running[0], "running_var": running[1]}


def plain(features, running, weight, bias, conv):
    y = F.relu(F.batch_norm(torch.cat(features, 1), *running, weight, bias, True, MOMENTUM))
    return y, F.conv2d(y, conv)


def synchronised(storage):
    def normalise(features, running, weight, bias, conv):
        y = concat_bn_relu(
            features, *running, weight, bias, True, MOMENTUM, 1e-5, storage, dist.group.WORLD
        )
        with recompute_in_backward(y):
            z = F.conv2d(y, conv)
        return y, z

    return normalise


def part_of(tensors, rank, batches):
    begin = sum(batches[:rank])
    part = slice(begin, begin + batches[rank])
    return {n: t[part] if n[0] in "xg" else t for n, t in tensors.items()}


def errors(found, expected, rank, batches):
    """Against the whole batch, for what is this rank's; the others are summed over ranks."""
    begin = sum(batches[:rank])
    part = slice(begin, begin + batches[rank])
    result = {}
    for name, value in found.items():
        exact = expected[name]
        if name in ("grad_weight", "grad_bias", "grad_conv"):
            value = value.double()
            dist.all_reduce(value)
        elif name == "y" or name.startswith("grad_x"):
            exact = exact[part]
        if exact.numel() > 0:
            # Of the whole tensor's size: a part may be all zeros.
            scale = expected[name].double().norm() * (exact.numel() / expected[name].numel()) ** 0.5
            result[name] = ((value.double() - exact.double()).norm() / scale).item()
    return result


class WhySkipped(str):
    """A process skipped the test: pytest has to hear of it in its own process."""


def processes(rank, world, file, work, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        results[rank] = work(rank, world)
    except pytest.skip.Exception as skipped:
        results[rank] = WhySkipped(skipped)
    dist.destroy_process_group()


def on_processes(world, work, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (world, tmp_path / "rendezvous", work, results)
        mp.spawn(processes, arguments, nprocs=world)
        found = [results[rank] for rank in range(world)]
    for result in found:
        if isinstance(result, WhySkipped):
            pytest.skip(result)
    return found


def compare(rank, world):
    """Largest errors by batch, dtype, mean and name."""
    found = {}
    for batches in BATCHES:
        if len(batches) != world:
            continue
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for mean in (0.5, 100.0):
                tensors = make_tensors(sum(batches), dtype, mean)
                exact = run({n: t.double() for n, t in tensors.items()}, plain)
                ours = run(part_of(tensors, rank, batches), synchronised(SharedStorage()))
                torchs = errors_of_plain(tensors, exact)
                for name, error in errors(ours, exact, rank, batches).items():
                    found[batches, dtype, mean, name] = error, torchs[name]
    return found


def errors_of_plain(tensors, exact):
    torchs = run(tensors, plain)
    return {name: relative_error(value, exact[name]) for name, value in torchs.items()}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_against_the_whole_batch(world, tmp_path):
    for rank, found in enumerate(on_processes(world, compare, tmp_path)):
        assert found
        for (batches, dtype, mean, name), (error, torchs) in found.items():
            # A part of a batch may have a larger error than all of it.
            limit = 1e-10 if dtype == torch.float64 else 4 * torchs + 8 * torch.finfo(dtype).eps
            assert error <= limit, (rank, batches, dtype, mean, name, error, torchs)


def misuse(rank, world):
    """Errors by name; every process gets the same one, and nothing has moved."""
    found = {}
    for name, rows in {"one value": [1, 0], "no values": [0, 0]}.items():
        x = torch.randn(rows[rank], 3, 1, 1, requires_grad=True)
        running = torch.zeros(3), torch.ones(3)
        try:
            y = concat_bn_relu([x], *running, training=True, process_group=dist.group.WORLD)
            y.sum().backward()
            found[name] = tuple(y.shape)
        except ValueError as error:
            found[name] = str(error)
        assert not running[0].any() and (running[1] == 1).all()
    return found


def test_fewer_than_two_values_on_all_processes(tmp_path):
    for found in on_processes(2, misuse, tmp_path):
        assert "Expected more than 1 value per channel when training" in found["one value"]
        assert found["no values"] == (0, 3, 1, 1)


def communication(rank, world):
    """Calls of all_reduce: forward, backward, and a second backward of the same graph; others."""
    calls, all_reduce = [], dist.all_reduce

    def count(*arguments, **options):
        calls.append(1)
        return all_reduce(*arguments, **options)

    dist.all_reduce = count
    found, begin = [], 0

    def lap():
        nonlocal begin
        found.append(len(calls) - begin)
        begin = len(calls)

    conv = nn.Conv2d(3, 2, 1)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    group, running = dist.group.WORLD, (torch.zeros(3), torch.ones(3))
    y = concat_bn_relu([x], *running, training=True, storage=SharedStorage(), process_group=group)
    with recompute_in_backward(y):
        z = conv(y)
    lap()
    z.sum().backward(retain_graph=True)
    lap()
    z.sum().backward()
    lap()
    concat_bn_relu([x], *running, training=False, process_group=group).sum().backward()
    lap()
    alone = [dist.new_group([i]) for i in range(world)][rank]
    concat_bn_relu([x], *running, training=True, process_group=alone).sum().backward()
    lap()
    dist.all_reduce = all_reduce
    return found


def test_recomputation_and_evaluation_communicate_nothing(tmp_path):
    assert on_processes(2, communication, tmp_path) == [[1, 1, 1, 0, 0]] * 2

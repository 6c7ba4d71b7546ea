"""DistributedDataParallel with the settings that its users choose, on two processes.

Gradients are the mean over the processes, with the strides of their parameters, so that its buckets
need no copies; it warns where they do.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from efficient_densenet import DenseNet, convert
from reference import relative_error
from test_convert import MODELS
from test_sync_batch_norm import on_processes

SETTINGS = {
    "default": {},
    "views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "own buffers": {"broadcast_buffers": False},
    "all": {"gradient_as_bucket_view": True, "static_graph": True, "broadcast_buffers": False},
}
FORMATS = [torch.contiguous_format, torch.channels_last]
STEPS = 3


def ours():
    return DenseNet(4, (2, 2), num_init_features=8, num_classes=5, efficient=True)


def converted():
    return convert(MODELS["torchvision"](), strict=True)


BUILDS = {"ours": ours}
if importlib.util.find_spec("torchvision"):
    BUILDS["torchvision"] = converted


def batch(rank, step):
    generator = torch.Generator().manual_seed(10 * rank + step)
    return torch.randn(2, 3, 32, 32, generator=generator)


def loss_of(model, x):
    return F.cross_entropy(model(x), torch.arange(len(x)) % 5)


def mean_gradients(model, world, step):
    """Of the parts of a batch that the processes have."""
    model.zero_grad()
    for rank in range(world):
        twin = copy.deepcopy(model)
        (loss_of(twin, batch(rank, step)) / world).backward()
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            own.grad = other.grad if own.grad is None else own.grad + other.grad
    return [parameter.grad.clone() for parameter in model.parameters()]


def train(rank, world):
    """Per network, format and setting: the largest error of a gradient; and what else is wrong."""
    found = {}
    for name, build in BUILDS.items():
        for memory_format in FORMATS:
            torch.manual_seed(0)
            model = build().to(memory_format=memory_format)
            for setting, options in SETTINGS.items():
                case = name, str(memory_format), setting
                found[case] = train_one(copy.deepcopy(model), options, rank, world)
    return found


def train_one(model, options, rank, world):
    plain = copy.deepcopy(model)
    parallel = DistributedDataParallel(model, **options)
    worst, strides = 0.0, []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(STEPS):
            parallel.zero_grad(set_to_none=True)
            loss_of(parallel, batch(rank, step)).backward()
            expected = mean_gradients(plain, world, step)
            for (name, parameter), exact in zip(model.named_parameters(), expected, strict=True):
                worst = max(worst, relative_error(parameter.grad, exact))
                if parameter.grad.stride() != parameter.stride():
                    strides.append(name)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return worst, strides, buffers


def test_settings(tmp_path):
    first, second = on_processes(2, train, tmp_path)
    assert set(first) == set(second) and len(first) == len(BUILDS) * len(FORMATS) * len(SETTINGS)
    for case in first:
        for worst, strides, _ in (first[case], second[case]):
            assert worst < 1e-4, case
            assert not strides, case
        # Every process has moved its statistics by its own part of the last batch.
        name = next(n for n in first[case][2] if n.endswith("running_mean"))
        assert not torch.equal(first[case][2][name], second[case][2][name]), case
        assert all(
            torch.equal(value, second[case][2][n])
            for n, value in first[case][2].items()
            if n.endswith("num_batches_tracked")
        ), case

"""What crosses autograd on its way to the backward pass: hooks, checkpoints, any strides."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from efficient_densenet import (
    BatchNorm,
    SharedStorage,
    bn_relu_max_pool,
    concat_bn_relu,
    recompute_in_backward,
)
from reference import FORMATS, in_format


class Layer(nn.Module):
    """Batch norm, ReLU and convolutions on a concatenation, plain or on the operator."""

    def __init__(self, channels, storage, consumers=1):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.convs = nn.ModuleList(nn.Conv2d(channels, 2, 3, padding=1) for _ in range(consumers))
        self.storage = storage

    def forward(self, *features):
        norm = self.norm
        if self.storage is None:
            y = F.relu(norm(torch.cat(features, 1)))
            return sum(conv(y) for conv in self.convs)
        running = norm.running_mean, norm.running_var
        y = concat_bn_relu(
            features, *running, norm.weight, norm.bias, norm.training, storage=self.storage
        )
        with recompute_in_backward(y):
            return sum(conv(y) for conv in self.convs)


class Block(nn.Module):
    def __init__(self, shares, consumers=1, run=lambda layer, *x: layer(*x)):
        super().__init__()
        storage = SharedStorage() if shares else None
        self.layers = nn.ModuleList(Layer(3 + 2 * i, storage, consumers) for i in range(3))
        self.run = run

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(self.run(layer, *features))
        return torch.cat(features, 1)


def step(block, x, wrap, retain=False):
    x = x.clone().requires_grad_()
    inputs = [x, *block.parameters()]
    y = wrap(block, x)
    loss = y.square().sum()
    if retain:
        torch.autograd.grad(loss, inputs[1:3], retain_graph=True)  # without the block's input
        torch.autograd.grad(loss, inputs, retain_graph=True)
    loss.backward()
    return [y.detach(), *(tensor.grad for tensor in inputs)]


def policy(ctx, op, *args, **kwargs):
    saved = op == torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


non_reentrant = functools.partial(checkpoint, use_reentrant=False)
selective = functools.partial(
    non_reentrant, context_fn=lambda: create_selective_checkpoint_contexts(policy)
)


def strided(tensor):
    return in_format(tensor, "strided") if tensor.dim() > 1 else torch.stack([tensor] * 2, 1)[:, 0]


def permuted(tensor):
    """Memory in the reverse order of dimensions."""
    return (
        tensor.permute(*reversed(range(tensor.dim())))
        .contiguous()
        .permute(*reversed(range(tensor.dim())))
    )


def with_hooks(unpack, pack=lambda t: t):
    def wrap(f, x):
        with saved_tensors_hooks(pack, unpack):
            return f(x)

    return wrap


def on_cpu(f, x):
    with save_on_cpu():
        return f(x)


def nested(f, x):
    inner = functools.partial(non_reentrant, f)
    return non_reentrant(lambda x: non_reentrant(inner, x) * 1, x)


WRAPS = {
    "plain": lambda f, x: f(x),
    "checkpoint": non_reentrant,
    "reentrant checkpoint": functools.partial(checkpoint, use_reentrant=True),
    "nested checkpoints": nested,
    "selective checkpoint": selective,
    "save_on_cpu": on_cpu,
    "checkpoint in save_on_cpu": lambda f, x: on_cpu(functools.partial(non_reentrant, f), x),
    "save_on_cpu in checkpoint": lambda f, x: non_reentrant(functools.partial(on_cpu, f), x),
    "contiguous": with_hooks(lambda t: t.contiguous()),
    "strided": with_hooks(strided),
    "permuted": with_hooks(permuted),
    "numpy": with_hooks(torch.from_numpy, lambda t: t.detach().cpu().numpy()),
}


# Torch allows one backward pass through these.
ONCE = ("reentrant checkpoint", "selective checkpoint")


@pytest.mark.parametrize("consumers", [1, 3])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("memory_format", FORMATS[:2])
def test_a_block_of_operators(memory_format, wrap, consumers):
    torch.manual_seed(0)
    plain = Block(False, consumers).double()
    ours = Block(True, consumers).double()
    ours.load_state_dict(plain.state_dict())
    x = in_format(torch.randn(2, 3, 5, 4, dtype=torch.float64), memory_format)
    retain = wrap not in ONCE
    expected = step(plain, x, WRAPS["plain"])
    for found, value in zip(step(ours, x, WRAPS[wrap], retain), expected, strict=True):
        torch.testing.assert_close(found, value)
    if "checkpoint" not in wrap:  # which recompute a forward pass, as plain modules do
        for name, buffer in plain.named_buffers():
            if "running" in name:
                torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)


@pytest.mark.parametrize("inner", ["checkpoint", "selective checkpoint", "nested checkpoints"])
@pytest.mark.parametrize("outer", ["plain", "checkpoint", "save_on_cpu"])
def test_checkpoints_of_single_layers(outer, inner):
    def run(layer, *features):
        def one(x):
            return layer(*x.split([3, *[2] * (len(features) - 1)], 1))

        return WRAPS[inner](one, torch.cat(features, 1))

    plain, ours = Block(False).double(), Block(True, run=run).double()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = step(plain, x, WRAPS["plain"])
    for found, value in zip(step(ours, x, WRAPS[outer], True), expected, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrap", [w for w in WRAPS if w not in ("numpy", *ONCE)])
@pytest.mark.parametrize("memory_format", FORMATS[:3])
def test_pooling(device, memory_format, wrap, dtype):
    x = in_format(torch.randn(4, 8, 7, 9, device=device).to(dtype), memory_format)
    weight, bias = torch.rand(8, device=device), torch.rand(8, device=device)

    def gradients(wrap):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        norm = BatchNorm(None, None, *leaves[1:], training=True)
        y = wrap(lambda x: bn_relu_max_pool(x, norm), leaves[0])
        loss = y.float().square().sum()
        torch.autograd.grad(loss, leaves, retain_graph=True)
        return [y, *torch.autograd.grad(loss, leaves)]

    for found, expected in zip(gradients(WRAPS[wrap]), gradients(WRAPS["plain"]), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_was_unpacked_is_let_go(device):
    """By the node's own backward pass; where that does not run, with the graph."""
    storage = SharedStorage()
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    conv = nn.Conv2d(3, 2, 1, device=device)
    unpacked = []

    def unpack(tensor):
        copy = tensor.clone()
        unpacked.append(weakref.ref(copy))
        return copy

    def alive():
        return sum(reference() is not None for reference in unpacked)

    gc.collect()
    gc.disable()
    try:
        with saved_tensors_hooks(lambda t: t, unpack):
            y = concat_bn_relu([x], None, None, training=True, storage=storage)
            with recompute_in_backward(y):
                z = conv(y).square().sum()
        torch.autograd.grad(z, [x, conv.weight], retain_graph=True)
        assert len(unpacked) > 0 and alive() == 0
        torch.autograd.grad(z, [conv.weight], retain_graph=True)
        del y, z
        assert alive() == 0
    finally:
        gc.enable()


def test_each_saved_tensor_is_unpacked_once_per_backward_pass():
    storage, count = SharedStorage(), []
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    convs = [nn.Conv2d(3, 2, 1, bias=False) for _ in range(3)]

    def unpack(index):
        count.append(index)
        return kept[index]

    def pack(tensor):
        kept.append(tensor)
        return len(kept) - 1

    kept = []
    with saved_tensors_hooks(pack, unpack):
        y = concat_bn_relu([x], None, None, training=True, storage=storage)
        with recompute_in_backward(y):
            z = sum(conv(y) for conv in convs).sum()
    z.backward(retain_graph=True)
    assert sorted(count) == sorted(set(count))
    z.backward()
    assert len(count) == 2 * len(set(count))

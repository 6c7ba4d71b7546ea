"""Compiled with CUDA graphs, a network of ours or a converted one is graphs without a break.

By torch's two ways: ``mode="reduce-overhead"`` and ``backend="cudagraphs"``.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from efficient_densenet import DenseNet, convert
from reference import requires_cuda
from test_convert import MODELS

pytestmark = requires_cuda

WAYS = {"reduce-overhead": {"mode": "reduce-overhead"}, "cudagraphs": {"backend": "cudagraphs"}}
NAMES = ["ours", "torchvision", "timm", "MONAI 2-d", "torchxrayvision"]


def build(name, memory_format):
    torch.manual_seed(0)
    if name == "ours":
        model = DenseNet(8, (2, 2), num_init_features=16, num_classes=5, small_inputs=False,
                         efficient=True)  # fmt: skip
    else:
        model = convert(MODELS[name](), strict=True)
    return model.cuda().to(memory_format=memory_format)


def run(model, x, training, autocast, steps=4):
    """Logits, and gradients and state behind a few steps."""
    logits = []
    for step in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        autocast_ = torch.autocast("cuda", torch.bfloat16, enabled=autocast)
        with autocast_, torch.set_grad_enabled(training):
            y = model(x + step)
        logits.append(y.detach().clone())
        if training:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(y.float(), torch.arange(len(x), device="cuda") % 5).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return logits, gradients, [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_graphs(name, way, memory_format, autocast, training):
    torch._dynamo.reset()
    counters.clear()
    model = build(name, memory_format).train(training)
    eager = copy.deepcopy(model)
    x = torch.randn(4, 3, 64, 64, device="cuda").to(memory_format=memory_format)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, **WAYS[way])
    found, expected = (run(each, x, training, autocast) for each in (compiled, eager))
    assert not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"], counters["inductor"]
    tolerance = dict(rtol=3e-2, atol=3e-2) if autocast else dict(rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
    for parameter in compiled.parameters():
        if parameter.grad is not None:
            assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("way", WAYS)
def test_dropout_differs_from_call_to_call(way):
    torch._dynamo.reset()
    model = DenseNet(8, (2, 2), num_init_features=16, drop_rate=0.5, efficient=True).cuda()
    model.compile(fullgraph=True, **WAYS[way])
    x = torch.randn(4, 3, 16, 16, device="cuda")
    results = []
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        results.append(model(x).detach().clone())
    assert all(not torch.equal(a, b) for a, b in zip(results, results[1:], strict=False))

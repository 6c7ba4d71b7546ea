"""A model called by CUDA graphs computes what it computes without, step by step."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from efficient_densenet import DenseNet, convert, graphed
from reference import requires_cuda
from test_convert import MODELS


def ours(**settings):
    settings = {"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16, **settings}
    return DenseNet(num_classes=5, efficient=True, **settings)


def build(name, **settings):
    torch.manual_seed(0)
    if name in ("ours", "features"):
        recompute = {"ours": "bottleneck", "features": "features"}[name]
        return ours(recompute=recompute, **settings)
    if name == "plain":
        return DenseNet(8, (2, 2), num_init_features=16, num_classes=5)
    return convert(MODELS[name](), strict=True)


def images(batch=4, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator)
    return x.cuda().to(memory_format=torch.channels_last)


def on_gpu(model):
    return model.cuda().to(memory_format=torch.channels_last)


def train(model, steps=4, autocast=False, **settings):
    """Logits, parameters, gradients and buffers of a few steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    logits = []
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = model(images(seed=step, **settings))
        F.cross_entropy(y.float(), torch.arange(len(y), device="cuda") % 5).backward()
        logits.append(y)
        optimizer.step()
    gradients = [p.grad for p in model.parameters()]
    return [*logits, *model.parameters(), *gradients, *model.buffers()]


def assert_same(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, i=i: f"{i}: {text}")


def reasons(caplog):
    return [record.getMessage() for record in caplog.records]


@requires_cuda
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", ["ours", "features", "plain", "torchvision", "timm"])
def test_training(name, autocast, caplog):
    torch.backends.cudnn.deterministic = True
    model = on_gpu(build(name))
    eager = copy.deepcopy(model)
    size = 64 if name in MODELS else 32
    with caplog.at_level(logging.WARNING, "efficient_densenet"):
        found = train(graphed(model), autocast=autocast, size=size)
    assert_same(found, train(eager, autocast=autocast, size=size))
    assert not reasons(caplog)
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()


@requires_cuda
def test_shapes_and_modes_have_graphs_of_their_own(caplog):
    model = on_gpu(build("ours"))
    eager, run = copy.deepcopy(model), graphed(model)
    for batch, size, training in [(4, 32, True), (3, 32, True), (4, 16, False), (4, 32, True)]:
        for each in (run, eager):
            each.train(training)
        with torch.set_grad_enabled(training), caplog.at_level(logging.WARNING):
            found, expected = (each(images(batch, size)) for each in (run, eager))
        assert found.requires_grad is training
        assert_same([found, *model.buffers()], [expected, *eager.buffers()])
        if training:
            for each in (found, expected):
                each.sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in eager.parameters()])
    assert not reasons(caplog)


@requires_cuda
def test_statistics_random_numbers_and_gradients_are_those_of_one_step():
    model = on_gpu(build("ours", drop_rate=0.4))
    eager, x = copy.deepcopy(model), images()
    drawn = []
    for each in (eager, graphed(model)):
        torch.cuda.manual_seed(3)
        y = each(x)
        y.sum().backward()
        drawn.append((y, torch.rand(5, device="cuda")))
    assert_same(drawn[1], drawn[0])
    assert_same(model.buffers(), eager.buffers())
    assert_same([p.grad for p in model.parameters()], [p.grad for p in eager.parameters()])


@requires_cuda
def test_dropout_differs_from_call_to_call():
    run = graphed(on_gpu(build("ours", drop_rate=0.4)))
    results = [run(images()).detach() for _ in range(4)]
    assert all(not torch.equal(a, b) for a, b in zip(results, results[1:], strict=False))


@requires_cuda
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_add_up_over_calls(set_to_none):
    model = on_gpu(build("ours"))
    eager, run = copy.deepcopy(model), graphed(model)
    for each in (run, eager):
        each(images()).sum().backward()
        each.zero_grad(set_to_none=set_to_none)
        for seed in range(3):
            each(images(seed=seed)).square().sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in eager.parameters()])


@requires_cuda
def test_results_and_gradients_are_not_overwritten():
    run = graphed(on_gpu(build("ours")))
    kept = []
    for seed in range(2):
        run.zero_grad(set_to_none=True)
        y = run(images(seed=seed))
        y.sum().backward()
        kept.append([y.detach(), *(p.grad for p in run.parameters())])
        if seed == 0:
            before = [tensor.clone() for tensor in kept[0]]
    for now, then in zip(kept[0], before, strict=True):
        assert torch.equal(now, then)


@requires_cuda
def test_gradient_of_the_images():
    model = on_gpu(build("ours"))
    eager, run = copy.deepcopy(model), graphed(model)
    gradients = []
    for each in (run, eager):
        x = images().requires_grad_()
        each(x).sum().backward()
        gradients.append(x.grad)
    assert_same(gradients[:1], gradients[1:])


@requires_cuda
def test_backward_behind_a_later_call_is_an_error():
    run = graphed(on_gpu(build("ours")))
    first = run(images())
    run(images(seed=1))
    with pytest.raises(RuntimeError, match="a later call with the same shapes"):
        first.sum().backward()


@requires_cuda
def test_changes_of_the_model_are_seen(caplog):
    model = on_gpu(build("ours"))
    run, x = graphed(model), images()
    with caplog.at_level(logging.WARNING, "efficient_densenet"):
        run(x).sum().backward()
        for change in (
            lambda: model.load_state_dict(build("ours").state_dict()),
            lambda: setattr(model.features.norm_final, "eps", 0.1),
            lambda: model.classifier.weight.requires_grad_(False),
            lambda: setattr(model, "classifier", nn.Linear(model.classifier.in_features, 7).cuda()),
        ):
            change()
            model.zero_grad(set_to_none=True)
            eager = copy.deepcopy(model)
            for each in (run, eager):
                each(x).square().sum().backward()
            for a, b in zip(model.parameters(), eager.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None)
                if a.grad is not None:
                    assert_same([a.grad], [b.grad])
    assert not reasons(caplog)


@requires_cuda
def test_what_cannot_be_captured_runs_as_it_is(caplog):
    class ReadsOnTheHost(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build("ours")

        def forward(self, x):
            return self.model(x) * (2 if x.sum().item() > 0 else 3)

    model = on_gpu(ReadsOnTheHost())
    eager, run = copy.deepcopy(model), graphed(model)
    with caplog.at_level(logging.WARNING, "efficient_densenet"):
        for _ in range(2):
            assert_same([run(images())], [eager(images())])
    assert_same(model.buffers(), eager.buffers())
    assert len(reasons(caplog)) == 1
    assert "it waits for the GPU" in reasons(caplog)[0]


@requires_cuda
def test_hooks_and_too_many_graphs_run_as_they_are(caplog):
    model = on_gpu(build("ours"))
    run, seen = graphed(model, max_graphs=1), []
    with caplog.at_level(logging.WARNING, "efficient_densenet"):
        run(images())
        run(images(batch=2))
        assert "max_graphs=1" in reasons(caplog)[-1]
        handle = model.classifier.register_forward_hook(lambda *arguments: seen.append(1))
        run(images())
        assert seen
        assert "hooks" in reasons(caplog)[-1]
        handle.remove()
        before = len(reasons(caplog))
        run(images())
    assert len(reasons(caplog)) == before


@requires_cuda
def test_under_a_checkpoint_and_in_another_capture():
    model = on_gpu(build("ours"))
    eager, run, x = copy.deepcopy(model), graphed(model), images()
    assert_same([checkpoint(run, x, use_reentrant=False)], [eager(x)])
    run.eval()
    with torch.no_grad():
        expected = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(x)
        graph.replay()
    assert_same([y], [expected])


def test_without_a_gpu_it_is_the_model(caplog):
    model = ours()
    run, x = graphed(model), torch.randn(2, 3, 16, 16)
    with caplog.at_level(logging.WARNING, "efficient_densenet"):
        assert torch.equal(run.eval()(x), model(x))
        run(x)
    assert len(reasons(caplog)) == 1
    assert "CUDA tensors" in reasons(caplog)[0]


def test_copies_and_pickles():
    run = graphed(ours()).eval()
    x = torch.randn(2, 3, 16, 16)
    for other in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert torch.equal(other(x), run(x))


def test_arguments():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        graphed(3)
    with pytest.raises(TypeError, match=r"max_graphs: expected a positive integer, got 2\.0"):
        graphed(ours(), max_graphs=2.0)
    with pytest.raises(ValueError, match="max_graphs: expected a positive integer, got 0"):
        graphed(ours(), max_graphs=0)

"""At the edges a block accepts, refuses and computes what its plain modules do."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from block_reference import RECOMPUTE, make_block_problem, run
from efficient_densenet import DenseBlock, DenseNet, dense_block
from reference import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def outcome(block, x):
    """Everything that can be seen of a step, or the type of the error."""
    x = x.detach().requires_grad_()
    try:
        y = block(x)
        y.sum().backward()
    except Exception as error:
        return type(error)
    gradients = [p.grad for p in block.parameters()]
    return [y.detach(), x.grad, *gradients, *block.buffers()]


def assert_as_plain(block, x):
    plain = copy.deepcopy(block)
    for module in (plain, *plain.children()):
        module.efficient = False
    ours, expected = outcome(block, x), outcome(plain, x)
    if isinstance(expected, type):
        assert isinstance(ours, type) and issubclass(ours, expected)
        return
    assert not isinstance(ours, type), ours
    for found, value in zip(ours, expected, strict=True):
        assert (found is None) == (value is None)
        if found is not None:
            assert found.shape == value.shape and found.dtype == value.dtype
            torch.testing.assert_close(found, value, equal_nan=True)


def make(spatial_dims=2, dtype=torch.float64, **options):
    return DenseBlock(2, 8, 4, spatial_dims=spatial_dims, **options).to(dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(0, 8, 4, 4), (0, 8, 4), (0, 8, 2, 3, 4), (1, 8, 1, 1), (1, 8, 1), (1, 8, 1, 2), (2, 8, 1, 1),
     (2, 7, 4, 4), (2, 0, 4, 4), (8, 4, 4), (2, 8, 0, 4), (2, 8, 4, 0), (2, 8, 0), (2, 8, 2, 0, 3),
     (0, 8, 0, 4), (1, 8, 0, 1)],
    ids=str,
)  # fmt: skip
def test_shapes(shape, training):
    dims = max(1, min(3, len(shape) - 2))
    if shape == (8, 4, 4):
        dims = 2  # an image without a batch
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    block = make(dims).train(training)
    assert_as_plain(block, x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("norm", ["norm1", "norm2"])
def test_one_running_statistic(norm, missing, training):
    block = make().train(training)
    setattr(getattr(block.denselayer2, norm), missing, None)
    plain = copy.deepcopy(block)
    plain.efficient = False
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    assert outcome(block, x) is outcome(plain, x)


@pytest.mark.parametrize("momentum", [0, 1, 2.0, -1.0, None, math.nan, math.inf])
def test_momentum(momentum):
    block = make()
    block.denselayer1.norm2.momentum = momentum
    assert_as_plain(block, torch.randn(2, 8, 4, 4, dtype=torch.float64))


def strides_that_count(t):
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("autocast", [None, "cpu", "cuda"])
@pytest.mark.parametrize("drop_rate", [0, 0.3])
@pytest.mark.parametrize("small_inputs", [True, False, None])
def test_meta(small_inputs, drop_rate, autocast, recompute):
    """Shapes, dtypes and formats without data, forward and backward."""
    x = torch.randn(2, 8 if small_inputs is None else 3, 32, 32)
    if small_inputs is None:
        model = DenseBlock(2, 8, 4, drop_rate=drop_rate, recompute=recompute)
    else:
        model = DenseNet(
            4, (2, 2), num_init_features=8, small_inputs=small_inputs, efficient=True,
            drop_rate=drop_rate, recompute=recompute,
        )  # fmt: skip
    found = []
    for device in ("cpu", "meta"):
        model, leaf = model.to(device), x.detach().to(device).requires_grad_()
        model.zero_grad()
        context = nullcontext()
        if autocast is not None and device == "meta":  # it does not know the meta device
            context = torch.autocast(autocast, torch.bfloat16)
        with context:
            y = model(leaf)
            y.sum().backward()
        grads = [leaf.grad, *(p.grad for p in model.parameters())]
        found.append([(t.shape, t.dtype, strides_that_count(t)) for t in (*grads, y)])
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------
# Memory formats of gradients, and of what crosses autograd


def permuted(t):
    return (
        t.detach()
        .permute(*reversed(range(t.dim())))
        .contiguous()
        .permute(*reversed(range(t.dim())))
    )


FORMATS = {
    "contiguous": lambda t: t,
    "channels-last": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    ),
    "permuted": permuted,
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_have_the_strides_of_their_parameters(device, memory_format, recompute):
    model = DenseNet(4, (2, 2), num_init_features=8, efficient=True, recompute=recompute)
    model = model.to(device)
    for name, parameter in model.named_parameters():
        if "dense" in name:
            parameter.data = FORMATS[memory_format](parameter.data)
    model(torch.randn(2, 3, 16, 16, device=device)).sum().backward()
    for name, parameter in model.named_parameters():
        if "dense" in name:
            assert parameter.grad.stride() == parameter.stride(), name


def test_ddp_does_not_warn(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DenseNet(4, (2, 2), num_init_features=8, efficient=True)
        model = model.to(memory_format=torch.channels_last)
        parallel = nn.parallel.DistributedDataParallel(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                parallel(torch.randn(2, 3, 16, 16)).sum().backward()
    finally:
        dist.destroy_process_group()


def spread(t):
    """The same values with gaps between them, and dimensions in the opposite order."""
    if t.dim() == 0 or t.numel() == 0:
        return t
    wide = t.new_empty([2 * size for size in reversed(t.shape)])
    view = wide.permute(*reversed(range(t.dim())))[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


HOOKS = {
    "gaps": lambda: torch.autograd.graph.saved_tensors_hooks(spread, lambda t: t),
    "contiguous": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    ),
    "on the CPU": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(drop_rate=0.3),
        dict(norms="mixed"),
        dict(entry_channels=5),
        dict(shape=(2, 3, 4, 5)),
    ],
    ids=str,
)
def test_saved_tensors_may_come_back_in_other_formats(device, options, hooks, recompute):
    def operator(x, layers, drop_rate, recompute, entry=None):
        from efficient_densenet.dense_block import describe, run_dense_block

        described = describe(x, layers, drop_rate, recompute, projection=entry)
        return run_dense_block(*described, x)

    problem = make_block_problem(dtype=torch.float64, device=device, **options)
    ours = run(operator, problem, forward_in=HOOKS[hooks], recompute=recompute)
    for name, value in run(operator, problem, recompute=recompute).items():
        assert relative_error(ours[name], value) <= 1e-12, name


# ------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize("change", [lambda w: w[0], lambda w: w[..., 0], lambda w: w[:1, 0, 0, 0]])
@pytest.mark.parametrize("field", ["conv1", "conv2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_weight_of_another_rank_is_named(device, layer, field, change):
    p = make_block_problem(device=device).fresh()
    weight = change(getattr(p.layers[layer], field).detach())
    p.layers[layer] = p.layers[layer]._replace(**{field: weight})
    with pytest.raises(ValueError, match=rf"layers\[{layer}\]\.{field}"):
        dense_block(p.x, p.layers)


@pytest.mark.parametrize("cut", [lambda w: w[:, :-1], lambda w: w[:, :0], lambda w: w[..., :2]])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_wrong_conv2_is_named(device, layer, cut):
    p = make_block_problem(device=device).fresh()
    weight = cut(p.layers[layer].conv2.detach())
    p.layers[layer] = p.layers[layer]._replace(conv2=weight)
    with pytest.raises(ValueError, match=rf"layers\[{layer}\]\.conv2"):
        dense_block(p.x, p.layers)


@pytest.mark.parametrize("x", [None, 3, "x", [1.0]])
def test_x_is_no_tensor(x):
    with pytest.raises(TypeError, match="x: expected a tensor"):
        dense_block(x, make_block_problem().layers)


def test_an_image_without_a_batch_is_named():
    p = make_block_problem()
    with pytest.raises(ValueError, match="x: expected .* 2 spatial dimensions"):
        dense_block(p.x[0], p.layers)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_default_device_is_not_read(compiled, training):
    """What the operators make for themselves lies beside their input."""
    network = DenseNet(4, (2, 2), num_init_features=8, num_classes=3, drop_rate=0.2).train(training)
    run = torch.compile(network, backend="aot_eager") if compiled else network
    x = torch.randn(2, 3, 16, 16)
    with torch.device("meta"):
        y = run(x)
        y.backward(torch.ones(y.shape, device="cpu"))
    assert y.device == x.device and y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in network.parameters())

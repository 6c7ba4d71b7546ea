"""The dense block: memory, hooks, the module, and its launches on a GPU."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from block_reference import (
    BOTH,
    MODES,
    MODIFIED,
    SHAPES,
    assert_same,
    by_dtype,
    kept_by,
    make_block_problem,
    plain_dense_block,
    run,
)
from efficient_densenet import DenseBlock, dense_block
from reference import (
    FORMATS,
    requires_cuda,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# Who owns which memory


def forward(device, recompute="bottleneck", dtype=torch.float64, **settings):
    p = make_block_problem(device=device, dtype=dtype, **settings).fresh()
    return p, dense_block(p.x, p.layers, p.drop_rate, recompute)


def grads(p):
    return {name: t.grad for name, t in p.inputs().items()}


@BOTH
@by_dtype(torch.float64, torch.bfloat16)
def test_two_backwards_double_the_gradients(device, dtype, recompute):
    p, y = forward(device, recompute, dtype, drop_rate=0.2)
    y.backward(p.grad_y, retain_graph=True)
    first = {name: grad.clone() for name, grad in grads(p).items()}
    y.backward(p.grad_y)
    assert_same(grads(p), {name: 2 * grad for name, grad in first.items()})


@BOTH
def test_gradient_tensor_is_left_alone(device, recompute):
    """The same tensor, in each layout that a block could be tempted to work in."""
    for memory_format in FORMATS[:3]:
        p, y = forward(device, recompute, memory_format=memory_format)
        grad_y = torch.empty_like(y).copy_(p.grad_y) if memory_format == "strided" else p.grad_y
        before = grad_y.clone()
        inputs = list(p.inputs().values())
        first = torch.autograd.grad(y, inputs, grad_y, retain_graph=True)
        second = torch.autograd.grad(y, inputs, grad_y)
        assert torch.equal(grad_y, before)
        assert all(map(torch.equal, first, second))


@BOTH
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen layers"])
def test_gradients_survive_a_later_backward(device, frozen, recompute):
    settings = dict(frozen=(lambda name: name != "x") if frozen else lambda name: False)
    p, y = forward(device, recompute, **settings)
    y.backward(p.grad_y, retain_graph=True)
    kept = grads(p)
    before = {name: grad.clone() for name, grad in kept.items()}
    for t in p.inputs().values():
        t.grad = None
    y.backward(-3 * p.grad_y)
    y = dense_block(p.x, p.layers, recompute=recompute)
    y.backward(y.detach())
    assert_same(kept, before)
    memory = {grad.untyped_storage().data_ptr() for grad in kept.values()}
    assert y.untyped_storage().data_ptr() not in memory
    assert kept["x"].untyped_storage().nbytes() == 8 * p.x.numel()


def test_output_is_used_twice(device):
    """A second loss on the output, and its own gradient retained."""
    problem = make_block_problem(dtype=torch.float64, device=device)
    head = nn.Conv2d(16, 2, 1, device=device, dtype=torch.float64)

    def losses(block):
        p = problem.fresh()
        y = block(p.x, p.layers)
        y.retain_grad()
        loss = head(y).square().sum() + (y * p.grad_y).sum()
        loss.backward(retain_graph=True)
        first = {"y": y.grad.clone(), **{n: g.clone() for n, g in grads(p).items()}}
        y[:, 3:12].square().mean().backward()
        return {**{f"{n} once": g for n, g in first.items()}, "y": y.grad, **grads(p)}

    assert_same(losses(dense_block), losses(plain_dense_block), bits=False)


@pytest.mark.parametrize("loss", ["expanded", "transposed", "part"])
def test_gradients_of_any_strides(device, loss):
    problem = make_block_problem(dtype=torch.float64, device=device)

    def gradients(block):
        p = problem.fresh()
        y = block(p.x, p.layers)
        weights = p.grad_y.transpose(2, 3).contiguous().transpose(2, 3)
        {"expanded": y, "transposed": y * weights, "part": y[:, 2:9, 1:]}[loss].sum().backward()
        return grads(p)

    assert_same(gradients(dense_block), gradients(plain_dense_block), bits=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS[:3])
def test_output_is_channels_last(device, shape, memory_format):
    for norms in MODES:
        _, y = forward(device, shape=shape, memory_format=memory_format, norms=norms)
        assert y.movedim(1, -1).is_contiguous() and y.untyped_storage().nbytes() == 8 * y.numel()
        if y.dim() > 3:
            last = torch.channels_last if y.dim() == 4 else torch.channels_last_3d
            assert y.is_contiguous(memory_format=last)


@pytest.mark.parametrize("change", [lambda y: y.mul_(2), lambda y: y.detach().zero_()])
def test_output_modified_before_backward(device, change):
    _, y = forward(device)
    assert not y._is_view()
    change(y)
    with pytest.raises(RuntimeError, match=MODIFIED):
        y.sum().backward()


@pytest.mark.parametrize("changed", ["conv1", "conv2", "norm1.weight", "norm1.bias", "norm2.bias"])
def test_parameter_modified_before_backward(device, changed):
    """Autograd's error, or no influence."""
    p, y = forward(device)
    expected = torch.autograd.grad(y, list(p.inputs().values()), p.grad_y, retain_graph=True)
    p.inputs()[f"layers[1].{changed}"].detach().mul_(-2)
    try:
        y.backward(p.grad_y)
    except RuntimeError as error:
        assert MODIFIED in str(error)
    else:
        assert_same(grads(p), dict(zip(grads(p), expected, strict=True)))


@BOTH
@pytest.mark.parametrize("norms", MODES)
def test_running_statistics_may_move_before_backward(device, norms, recompute):
    problem = make_block_problem(dtype=torch.float64, device=device, norms=norms)
    expected = run(dense_block, problem, recompute=recompute)
    p = problem.fresh()
    y = dense_block(p.x, p.layers, recompute=recompute)
    dense_block(2 * p.x, p.layers, recompute=recompute)  # another step's
    y.backward(p.grad_y)
    assert_same(grads(p), {name: expected[f"grad {name}"] for name in p.inputs()})


@BOTH
def test_second_derivative_raises(device, recompute):
    p, y = forward(device, recompute)
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(y.square().sum(), p.x, create_graph=True)
        gradient.square().sum().backward()


@BOTH
def test_save_on_cpu(device, recompute):
    problem = make_block_problem(dtype=torch.float64, device=device, drop_rate=0.2)
    expected = run(dense_block, problem, recompute=recompute)
    ours = run(
        dense_block, problem, forward_in=torch.autograd.graph.save_on_cpu, recompute=recompute
    )
    assert_same(ours, expected, bits=False)


@BOTH
@pytest.mark.parametrize("memory_format", FORMATS[:2])
@pytest.mark.parametrize("drop_rate", [0, 0.2])
@by_dtype(torch.float32, torch.bfloat16)
def test_memory_is_linear_in_depth(device, dtype, drop_rate, memory_format, recompute):
    kept = []
    for num_layers in (4, 8, 12):
        settings = dict(channels=8, growth_rate=4, drop_rate=drop_rate, memory_format=memory_format)
        problem = make_block_problem((4, 32, 32), dtype, device, num_layers=num_layers, **settings)
        rows, total = problem.x.numel() // 8, 8 + 4 * num_layers
        per_row = (total + (16 * num_layers if recompute == "bottleneck" else 0)) * dtype.itemsize
        masks = 4 * num_layers if drop_rate else 0  # a byte each at most
        # Statistics of each channel in double, and a copy of each parameter.
        few = 16 * (total + 16 * num_layers)
        few += sum(t.numel() * max(t.itemsize, 4) for t in problem.inputs().values())
        few -= problem.x.numel() * max(dtype.itemsize, 4)
        kept.append(kept_by(dense_block, problem, recompute=recompute))
        assert rows * per_row <= kept[-1] <= rows * 1.03 * (per_row + masks) + few
    assert kept_by(plain_dense_block, problem) > 4 * kept[2]


@BOTH
def test_nothing_is_kept_without_gradients(device, recompute):
    problem = make_block_problem(device=device, frozen=lambda name: True)
    assert kept_by(dense_block, problem, recompute=recompute) == 0


# The module


def block_pair(device, dtype=torch.float64, dims=2, **settings):
    """A plain and an efficient block of 3 layers for 8 channels, with the same random state."""
    plain = DenseBlock(3, 8, 4, efficient=False, spatial_dims=dims, **settings)
    for name, t in plain.state_dict().items():
        if t.dtype.is_floating_point and "conv" not in name:
            t.uniform_(0.5, 1.5)
    efficient = DenseBlock(3, 8, 4, spatial_dims=dims, **settings)
    efficient.load_state_dict(plain.state_dict())
    return plain.to(device, dtype), efficient.to(device, dtype)


def module_step(block, x, seed=0):
    """Result, gradients and state after one step of training."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    block.zero_grad()
    y = block(x)
    y.square().mean().backward()
    result = {"y": y.detach(), "x": x.grad}
    result |= {f"grad {name}": p.grad.clone() for name, p in block.named_parameters()}
    return result | {name: t.clone() for name, t in block.state_dict().items()}


@BOTH
@pytest.mark.parametrize("settings", [{}, dict(drop_rate=0.3), dict(bn_size=2)], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_module(device, dims, settings, recompute):
    plain, efficient = block_pair(device, dims=dims, recompute=recompute, **settings)
    for seed in range(2):
        x = torch.randn(3, 8, *[5] * dims, dtype=torch.float64, device=device)
        assert_same(module_step(efficient, x, seed), module_step(plain, x, seed), bits=False)
    for block in (plain, efficient):
        block.eval()
    assert_same(module_step(efficient, x), module_step(plain, x), bits=False)
    efficient.train().denselayer2.norm1.eval()
    plain.train().denselayer2.norm1.eval()
    assert_same(module_step(efficient, x), module_step(plain, x), bits=False)
    other = copy.deepcopy(efficient)
    assert_same(module_step(other, x), module_step(efficient, x))


def test_module_has_the_names_of_the_model():
    layer = list(DenseBlock(2, 8, 4).denselayer2.named_children())
    assert [name for name, _ in layer] == ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"]
    assert [type(module).__name__ for _, module in layer[:3]] == ["BatchNorm2d", "ReLU", "Conv2d"]
    with pytest.raises(ValueError, match="recompute: expected"):
        DenseBlock(2, 8, 4, recompute="all")


def test_hooks_on_the_block(device):
    found = []
    for block in block_pair(device):
        calls = []
        block.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        block.register_forward_hook(lambda module, args, y: 3 * y)
        block.register_full_backward_hook(
            lambda module, grad_x, grad_y, calls=calls: calls.extend(map(torch.clone, grad_y))
        )
        x = torch.ones(2, 8, 5, 5, dtype=torch.float64, device=device).cumsum(-1).sin()
        result = module_step(block, x)
        assert len(calls) == 1
        found.append(result | {"hook": calls[0]})
    assert_same(found[1], found[0], bits=False)


def test_gradient_accumulation(device):
    found = []
    x = torch.randn(3, 2, 8, 5, 5, dtype=torch.float64, device=device)
    for block in block_pair(device):
        for part in x:
            block(part).square().mean().backward()
        found.append({name: p.grad for name, p in block.named_parameters()})
    assert_same(found[1], found[0], bits=False)


@BOTH
def test_memory_does_not_creep(device, recompute):
    _, block = block_pair(device, torch.float32, recompute=recompute, drop_rate=0.1)
    x = torch.randn(4, 8, 6, 6, device=device, requires_grad=True)

    def state():
        gc.collect()
        if device == "cpu":
            return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), peak

    def steps(count):
        for _ in range(count):
            block(x).square().mean().backward()
        return state()

    steps(10)
    before = steps(10)
    assert steps(180 if device == "cuda" else 20) == before


# On a GPU


@requires_cuda
def test_side_stream():
    problem = make_block_problem((8, 32, 32), device="cuda", channels=24, drop_rate=0.1)
    expected, stream = run(dense_block, problem), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            result = run(dense_block, problem)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(result, expected)


def on_a_side_stream(function, count=3):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(count):
            function()
    torch.cuda.current_stream().wait_stream(stream)


@requires_cuda
@BOTH
@pytest.mark.parametrize("momentum", [0.1, None])
@by_dtype(torch.float32, torch.bfloat16)
def test_cuda_graph_of_a_whole_step(dtype, momentum, recompute):
    def norms(layer, norm):
        return dict(momentum=momentum, training=(layer, norm) != (1, 1))

    problem = make_block_problem((4, 16, 16), dtype, "cuda", norms=norms)
    p = problem.fresh()
    inputs = list(p.inputs().values())

    def step():
        y = dense_block(p.x, p.layers, recompute=recompute)
        return y, torch.autograd.grad(y, inputs, p.grad_y)

    on_a_side_stream(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = step()
    for seed in range(1, 4):
        new = make_block_problem((4, 16, 16), dtype, "cuda", norms=norms, seed=seed)
        for ours, theirs in ((p.inputs(), new.inputs()), (p.statistics(), new.statistics())):
            for name, t in theirs.items():
                ours[name].detach().copy_(t)
        p.grad_y.copy_(new.grad_y)
        expected = run(dense_block, p, recompute=recompute)
        graph.replay()
        ours = {"y": y, **{f"grad {n}": g for n, g in zip(p.inputs(), gradients, strict=True)}}
        assert_same(ours | p.statistics(), expected, bits=False, limit=4 * torch.finfo(dtype).eps)


@requires_cuda
@BOTH
def test_make_graphed_callables(recompute):
    _, eager = block_pair("cuda", torch.float32, recompute=recompute)
    graphed = copy.deepcopy(eager)
    sample = torch.randn(4, 8, 12, 12, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(graphed, (sample,))
    graphed.load_state_dict(eager.state_dict())  # the warm-up moved the running statistics
    for _ in range(3):
        x = torch.randn_like(sample)
        assert_same(module_step(graphed, x), module_step(eager, x), bits=False, limit=1e-5)


@requires_cuda
@BOTH
def test_number_of_kernels_is_linear_in_depth(recompute):
    def kernels(num_layers):
        problem = make_block_problem(
            (4, 16, 16), device="cuda", num_layers=num_layers, channels=16, growth_rate=8
        )
        p = problem.fresh()

        def count(function, *arguments):
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                result = function(*arguments)
                torch.cuda.synchronize()
            cuda = torch.autograd.DeviceType.CUDA
            return result, sum(event.device_type == cuda for event in profiler.events())

        for _ in range(2):  # the first time, libraries choose and prepare
            y, forward = count(dense_block, p.x, p.layers, 0.0, recompute)
            _, backward = count(torch.autograd.grad, y, list(p.inputs().values()), p.grad_y)
        return forward, backward

    for few, some, many in zip(*map(kernels, (4, 8, 16)), strict=True):
        assert 0 < few < some < many
        # Libraries may choose other kernels for other sizes; one addition per pair of layers
        # would be 48 more.
        assert abs((many - some) - 2 * (some - few)) <= 16, (few, some, many)

"""Compiled blocks and networks: the same operators as in eager mode, and the same results."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from block_reference import RECOMPUTE, make_block_problem, make_reader
from efficient_densenet import DenseBlock, DenseNet, convert, dense_block
from efficient_densenet.block_spec import Pool
from efficient_densenet.dense_block import describe
from efficient_densenet.dense_block_operators import operands
from efficient_densenet.dropout import dropout_mask
from reference import in_format, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = torch.ops.efficient_densenet
FORMATS = ["contiguous", "channels_last"]
BATCH_NORMS = {torch.ops.aten.native_batch_norm, torch.ops.aten._native_batch_norm_legit_functional,
               torch.ops.aten._native_batch_norm_legit_no_training, torch.ops.aten.batch_norm,
               torch.ops.aten.cudnn_batch_norm}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------
# The operators themselves

OPTIONS = {
    "default": {},
    "no affine": dict(norms=lambda layer, norm: dict(affine=False)),
    "some affine": dict(norms=lambda layer, norm: dict(affine=(layer + norm) % 2 == 0)),
    "no statistics": dict(norms=lambda layer, norm: dict(statistics=False)),
    "frozen": dict(frozen=lambda name: "layers[1]" in name or name == "x"),
    "all frozen but one": dict(frozen=lambda name: name != "layers[1].conv1"),
    "evaluation": dict(norms="evaluation"),
    "mixed": dict(norms="mixed"),
    "1-d": dict(shape=(4, 15)),
    "3-d": dict(shape=(2, 3, 4, 5)),
    "one channel": dict(channels=1, growth_rate=1, bottleneck=1),
    "one pixel": dict(shape=(4, 1, 1)),
    "channels-last": dict(memory_format="channels_last", weights_format="channels_last"),
    "dropout": dict(drop_rate=0.3),
    "float32 norms": dict(dtype=torch.bfloat16, norm_dtype=torch.float32),
    "float32": dict(dtype=torch.float32),
    "float16": dict(dtype=torch.float16),
    "bfloat16": dict(dtype=torch.bfloat16),
}


def describe_problem(device, options, recompute, pool=None, projects=False, trains=True):
    """A block, its reader (for a pool) and the convolution in front, as they are described."""
    options = {"dtype": torch.float64, **options}
    options |= dict(entry_channels=5) if projects else {}
    p = make_block_problem(device=device, **options).fresh()
    reader = None
    if pool is not None:
        reader = make_reader(p, trains)
        reader = reader._replace(
            weight=reader.weight.detach().requires_grad_(),
            bias=reader.bias.detach().requires_grad_(),
        )
    described = describe(
        p.x, p.layers, p.drop_rate, recompute, reader, pool or Pool.NONE, projection=p.entry
    )
    return p, *described


def draw(p, spec, tensors):
    if spec.drop_rate == 0:
        return None
    return dropout_mask(p.x, tensors.conv1, tensors.conv2, spec.dtype, spec.drop_rate, False)


CALLS = [(options, None, False) for options in OPTIONS]
CALLS += [("default", pool, False) for pool in (Pool.NONE, Pool.WINDOWS, Pool.IMAGES)] + [
    ("mixed", Pool.WINDOWS, True)
]
CALLS += [("float16", Pool.IMAGES, True), ("default", None, True), ("evaluation", Pool.NONE, True)]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(("options", "pool", "projects"), CALLS)
def test_opcheck(device, options, pool, projects, recompute):
    """Schema, fake results with their strides, and autograd, as torch asks of an operator."""
    p, spec, tensors = describe_problem(device, OPTIONS[options], recompute, pool, projects)
    arguments = operands(spec, tensors, p.x, draw(p, spec, tensors))
    torch.library.opcheck(OPS.dense_block, arguments)
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPS.dense_block_backward.default:
                calls.append(torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, args))
            return func(*args, **(kwargs or {}))

    result = OPS.dense_block(*arguments)[0]
    with Record():
        result.backward(torch.randn_like(result))
    assert len(calls) == 1
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OPS.dense_block_backward, calls[0], test_utils=checks)


@pytest.mark.parametrize("drops_channels", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_dropout_mask(device, memory_format, drops_channels):
    assert torch.Tag.nondeterministic_seeded in OPS.dropout_mask.default.tags
    options = dict(drop_rate=0.3, memory_format=memory_format)
    p, spec, tensors = describe_problem(device, options, "bottleneck")
    arguments = (p.x, tensors.conv1, tensors.conv2, spec.dtype, 0.3, drops_channels)
    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
    torch.library.opcheck(
        OPS.dropout_mask, arguments, test_utils=("test_schema", "test_faketensor")
    )
    torch.manual_seed(1)
    eager = dropout_mask(*arguments)
    torch.manual_seed(1)
    assert torch.equal(OPS.dropout_mask(*arguments), eager)


SECOND = {
    "result and x": lambda y, p, t: (y, p.x, p.x),
    "x and a weight": lambda y, p, t: (y, p.x, t.conv1[0]),
    "a weight and x": lambda y, p, t: (y, t.conv2[-1], p.x),
    "a weight and itself": lambda y, p, t: (y, t.weights[0], t.weights[0]),
    "two weights": lambda y, p, t: (y, t.biases[1], t.conv1[-1]),
}


@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("pool", [None, Pool.NONE, Pool.IMAGES])
def test_operators_refuse_second_derivatives(device, pool, name):
    p, spec, tensors = describe_problem(device, {}, "bottleneck", pool)
    y = OPS.dense_block(*operands(spec, tensors, p.x, None))[0]
    y, first, second = SECOND[name](y, p, tensors)
    (gradient,) = torch.autograd.grad(y.sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(gradient.sum(), second, allow_unused=True)


def test_operators_refuse_batched_gradients(device):
    p, spec, tensors = describe_problem(device, {}, "bottleneck")
    y = OPS.dense_block(*operands(spec, tensors, p.x, None))[0]
    with pytest.raises(RuntimeError, match="gradients cannot be batched"):
        torch.autograd.grad(y, p.x, torch.ones(2, *y.shape).to(y), is_grads_batched=True)


def test_only_the_result_is_differentiable(device):
    p, spec, tensors = describe_problem(device, {}, "bottleneck", Pool.NONE)
    outputs = OPS.dense_block(*operands(spec, tensors, p.x, None))
    assert [t.requires_grad for t in outputs[:-1]] == [True] + [False] * (len(outputs) - 2)


# ------------------------------------------------------------------------------------------------
# Networks


def torchvision_network():
    models = pytest.importorskip("torchvision.models")
    return convert(models.DenseNet(4, (2, 3), 8, num_classes=5), strict=True)


NETWORKS = {
    "DenseBlock": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), DenseBlock(3, 8, 4)),
    "bare DenseBlock": lambda: DenseBlock(3, 3, 4),
    "small inputs": lambda: DenseNet(
        4, (2, 3), num_init_features=8, small_inputs=True, efficient=True
    ),
    "DenseNet": lambda: DenseNet(
        4, (2, 3), num_init_features=8, small_inputs=False, efficient=True
    ),
    "torchvision": torchvision_network,
}
NUM_BLOCKS = {"DenseBlock": 1, "bare DenseBlock": 1}


def make(name, device, dtype=torch.float64, memory_format="contiguous"):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 36, 36).to(device, dtype)
    model = NETWORKS[name]().to(device, dtype)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # else many gradients are rounding errors
            nn.init.normal_(parameter)
    if memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    return model, in_format(x, memory_format)


def step(model, call, x, context=None):
    """What a step gives, by name, with the gradients as they are."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    with context or torch.autocast("cpu", enabled=False):
        y = call(x)
    y.float().square().mean().backward() if y.dtype != torch.float64 else y.pow(2).mean().backward()
    result = {"y": y.detach(), "grad x": x.grad}
    result |= {f"grad {n}": p.grad for n, p in model.named_parameters()}
    return result | {n: t.clone() for n, t in model.named_buffers()}


def assert_as_eager(model, x, limit=1e-10, context=None, steps=2, **options):
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, **options)
    for _ in range(steps):
        ours, expected = step(model, compiled, x, context), step(twin, twin, x, context)
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert ours[name].dtype == value.dtype, name
            error = relative_error(ours[name], value)
            assert error <= limit, f"{name}: error {error:.3g}"
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(device, name, memory_format, training):
    model, x = make(name, device, memory_format=memory_format)
    assert_as_eager(model.train(training), x, backend="aot_eager")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_autocast(device, name, memory_format, training):
    model, x = make(name, device, torch.float32, memory_format)
    context = torch.autocast(device, torch.bfloat16)
    assert_as_eager(model.train(training), x, 2**-4, context, backend="aot_eager")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(device, dtype):
    model, x = make("bare DenseBlock", device, dtype)
    assert_as_eager(model, x, torch.finfo(dtype).eps, backend="aot_eager")


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", ["DenseBlock", "DenseNet"])
def test_inductor(device, name, memory_format):
    model, x = make(name, device, memory_format=memory_format)
    assert_as_eager(model, x, 1e-8, steps=1)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("drop_rate", [0, 0.4])
def test_dropout_and_recompute(device, drop_rate, recompute):
    torch.manual_seed(0)
    block = DenseBlock(3, 8, 4, drop_rate=drop_rate, recompute=recompute).to(device).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, device=device)
    assert_as_eager(block, x, backend="aot_eager")


def targets_of(model, x):
    """The operators of the forward graph, as autograd's compiler sees them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    found = []

    def look(graph, inputs):
        found.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=look, bw_compiler=lambda graph, _: make_boxed_func(graph))
    torch.compile(model, backend=compiler, fullgraph=True)(x)
    assert len(found) == 1
    return [t.overloadpacket for t in found[0] if isinstance(t, torch._ops.OpOverload)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_is_a_few_operators(device, name, training):
    model, x = make(name, device)
    found = targets_of(model.train(training), x)
    assert found.count(OPS.dense_block) == NUM_BLOCKS.get(name, 2)
    stems = name in ("DenseNet", "torchvision")
    assert found.count(OPS.functional_bn_relu_max_pool) == stems
    assert not BATCH_NORMS.intersection(found)
    convolutions = {"bare DenseBlock": 0}.get(name, 1)  # that of a transition is in the next block
    assert found.count(torch.ops.aten.convolution) == convolutions


@pytest.mark.parametrize("name", NETWORKS)
def test_dynamo_records_nothing_but_operators(device, name):
    graphs = []

    def look(graph, inputs):
        graphs.append(graph.graph)
        return graph

    model, x = make(name, device)
    torch.compile(model, backend=look, fullgraph=True)(x)
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    assert not [n for n in names if "functorch" in n or "function eq" in n]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["DenseBlock", "small inputs"])
def test_export(device, name, training):
    model, x = make(name, device)
    model.train(training)
    program = torch.export.export(model, (x,))
    twin = copy.deepcopy(model)
    assert relative_error(program.module()(x), twin(x)) <= 1e-10


def test_an_unfused_block_compiles_as_it_runs(device):
    model = DenseBlock(2, 8, 4).to(device).double()
    model.denselayer1.relu1 = nn.SiLU()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, device=device)
    assert_as_eager(model, x, backend="aot_eager")


def test_the_function(device):
    problem = make_block_problem(dtype=torch.float64, device=device).fresh()
    compiled = torch.compile(dense_block, backend="aot_eager", fullgraph=True)
    twin = problem.fresh()
    assert (
        relative_error(compiled(problem.x, problem.layers), dense_block(twin.x, twin.layers)) == 0
    )


# ------------------------------------------------------------------------------------------------
# Randomness, and batches at the edge

BACKENDS = ["aot_eager", "inductor"]


def make_dropping(device, drop_rate=0.5):
    torch.manual_seed(0)
    block = DenseBlock(2, 8, 4, drop_rate=drop_rate).to(device).double()
    return block, torch.randn(2, 8, 5, 5, dtype=torch.float64, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_calls_draw_twice(device, backend):
    block, x = make_dropping(device)
    difference = torch.compile(lambda x: block(x) - block(x), backend=backend)
    assert difference(x).abs().max() > 0.1
    block.eval()
    assert difference(x).abs().max() == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_draws_the_same_again(device, backend, use_reentrant):
    block, x = make_dropping(device)
    twin = copy.deepcopy(block)

    def checkpointed(x):
        return checkpoint(block, x, use_reentrant=use_reentrant)

    ours = step(block, torch.compile(checkpointed, backend=backend), x)
    expected = step(twin, twin, x)
    for name, value in expected.items():
        if name.startswith(("y", "grad")):  # the running statistics move twice, as plain ones do
            assert relative_error(ours[name], value) <= 1e-10, name


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 8, 1), (1, 8, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_one_value_per_channel(device, shape, training):
    block = DenseBlock(2, 8, 4, spatial_dims=len(shape) - 2).to(device).train(training)
    before, x = copy.deepcopy(block.state_dict()), torch.randn(shape, device=device)
    compiled = torch.compile(block, backend="aot_eager")
    if not training:
        torch.testing.assert_close(compiled(x), block(x))
        return
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        compiled(x)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (0, 8, 4)], ids=str)
def test_empty_batch(device, shape, backend):
    block = DenseBlock(2, 8, 4, spatial_dims=len(shape) - 2).to(device)
    plain = DenseBlock(2, 8, 4, spatial_dims=len(shape) - 2, efficient=False).to(device)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(shape, device=device)
    ours = step(block, torch.compile(block, backend=backend, fullgraph=True), x)
    for name, value in step(plain, plain, x).items():
        assert ours[name].shape == value.shape, name
        if value.numel():
            assert torch.equal(ours[name].nan_to_num(), value.nan_to_num()), name
    assert block.denselayer1.norm1.num_batches_tracked == 1

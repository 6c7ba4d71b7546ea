"""The traced dense block: as the eager one, in graphs without a break."""

import copy

import pytest
import torch
from torch import nn

from block_reference import MODES, RECOMPUTE, make_block_problem, run
from efficient_densenet import (
    DenseBlock,
    DenseNet,
    convert,
    dense_block,
    functional,
)
from efficient_densenet.dense_block import Plan
from reference import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = torch.ops.efficient_densenet


def traced(x, layers, drop_rate, recompute="bottleneck", drops_channels=False):
    return functional.dense_block(x, layers, drop_rate, recompute, drops_channels)


def planned(x, layers, drop_rate, drops_channels):
    return Plan(x, layers, drop_rate, drops_channels=drops_channels).run(x)


def assert_same(ours, expected, limit=1e-10):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        error = relative_error(ours[name], value)
        assert error <= limit, f"{name}: error {error:.3g}"


OPTIONS = {
    "default": {},
    "no affine": dict(norms=lambda layer, norm: dict(affine=False)),
    "no statistics": dict(norms=lambda layer, norm: dict(statistics=False)),
    "some affine": dict(norms=lambda layer, norm: dict(affine=(layer + norm) % 2 == 0)),
    "cumulative": dict(norms=lambda layer, norm: dict(momentum=None)),
    "frozen": dict(frozen=lambda name: "layers[1]" in name or name == "x"),
    "all frozen but one": dict(frozen=lambda name: name != "layers[1].conv1"),
    "evaluation": dict(norms="evaluation"),
    "mixed": dict(norms="mixed"),
    "1-d": dict(shape=(4, 15)),
    "3-d": dict(shape=(2, 3, 4, 5)),
    "channels-last": dict(memory_format="channels_last", weights_format="channels_last"),
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("options", OPTIONS)
def test_as_the_eager_block(device, options, recompute):
    problem = make_block_problem(dtype=torch.float64, device=device, **OPTIONS[options])
    ours = run(traced, problem, recompute=recompute)
    assert_same(ours, run(dense_block, problem, recompute=recompute))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("norms", MODES)
def test_compiled_without_a_break(device, norms, recompute):
    torch._dynamo.reset()
    problem = make_block_problem(dtype=torch.float64, device=device, norms=norms)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_same(run(compiled, problem, recompute=recompute), run(dense_block, problem))


@pytest.mark.parametrize("drops_channels", [False, True])
def test_dropout_is_that_of_the_eager_block(device, drops_channels):
    problem = make_block_problem(dtype=torch.float64, device=device, drop_rate=0.3)
    ours, expected = (run(f, problem, drops_channels=drops_channels) for f in (traced, planned))
    assert_same(ours, expected)


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_opcheck(device, drop_rate, recompute):
    """Schema, fake results and autograd registration, as torch asks of an operator."""
    p = make_block_problem(dtype=torch.float64, device=device, norms="mixed").fresh()
    norms = [*(la.norm1 for la in p.layers), *(la.norm2 for la in p.layers)]
    arguments = (
        p.x.detach().requires_grad_(),
        [norm.weight for norm in norms],
        [norm.bias for norm in norms],
        [norm.running_mean for norm in norms if not norm.training],
        [norm.running_var for norm in norms if not norm.training],
        [layer.conv1 for layer in p.layers],
        [layer.conv2 for layer in p.layers],
        [True] * len(norms),
        [True] * len(norms),
        [norm.training for norm in norms],
        [norm.eps for norm in norms],
        drop_rate,
        False,
        recompute,
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    tests += ("test_aot_dispatch_static",) if drop_rate == 0 else ()
    torch.library.opcheck(OPS.functional_dense_block, arguments, test_utils=tests)
    outputs = [t.detach() for t in OPS.functional_dense_block(*arguments)]
    needed = [True] * (1 + 2 * len(norms) + 2 * len(p.layers))
    backward = torch.randn_like(outputs[0]), p.x.detach(), *outputs, needed, *arguments[1:]
    torch.library.opcheck(
        OPS.functional_dense_block_backward, backward, test_utils=("test_schema", "test_faketensor")
    )


def networks():
    torch.manual_seed(0)
    model = DenseNet(4, (2, 3), num_init_features=8, efficient=True).double()
    yield "DenseNet", model
    yield "DenseBlock", nn.Sequential(nn.Conv2d(3, 8, 3), DenseBlock(3, 8, 4)).double()
    try:
        from torchvision.models.densenet import DenseNet as TorchvisionDenseNet
    except ImportError:
        return
    model = TorchvisionDenseNet(4, (2, 3), 8, num_classes=5).double()
    yield "converted torchvision", convert(model)


NETWORKS = dict(networks())


def step(model, call, x):
    model.zero_grad()
    y = call(x)
    y.square().mean().backward()
    result = {"y": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}
    return result | {f"state {n}": t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compile_without_a_break(device, name):
    torch._dynamo.reset()
    model = copy.deepcopy(NETWORKS[name]).to(device)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 36, 36, dtype=torch.float64, device=device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_same(step(model, compiled, x), step(twin, twin, x), limit=1e-8)
    graphs = []

    def look(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=look, fullgraph=True)(x)
    assert "functional_dense_block" in graphs[0]  # our operator, not the plain modules


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_exports(device, name):
    model = copy.deepcopy(NETWORKS[name]).to(device).eval()
    x = torch.randn(2, 3, 36, 36, dtype=torch.float64, device=device)
    program = torch.export.export(model, (x,))
    assert_same({"y": program.module()(x)}, {"y": model(x)})


def test_inductor(device):
    torch._dynamo.reset()
    model = copy.deepcopy(NETWORKS["DenseBlock"]).to(device)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64, device=device)
    compiled = torch.compile(model, fullgraph=True)
    assert_same(step(model, compiled, x), step(twin, twin, x), limit=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["model", "autocast"])
def test_compiled_in_16_bits(device, dtype, autocast):
    torch._dynamo.reset()
    model = DenseBlock(2, 8, 4).to(device, torch.float32 if autocast else dtype)
    compiled, twin = torch.compile(model, backend="aot_eager", fullgraph=True), copy.deepcopy(model)
    x = torch.randn(2, 8, 6, 6, device=device).to(dtype)
    found = []
    for each, call in ((model, compiled), (twin, twin)):
        leaf = x.to(each.denselayer1.conv1.weight.dtype).requires_grad_()
        with torch.autocast(device, dtype, enabled=autocast):
            y = call(leaf)
        y.float().square().sum().backward()
        gradients = {n: p.grad for n, p in each.named_parameters()}
        found.append({"y": y.detach(), "grad x": leaf.grad} | gradients)
    assert_same(*found, limit=torch.finfo(dtype).eps)


def test_an_unfused_block_compiles_as_it_runs(device):
    torch._dynamo.reset()
    model = DenseBlock(2, 8, 4).to(device).double()
    model.denselayer1.relu1 = nn.SiLU()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, device=device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same({"y": compiled(x)}, {"y": copy.deepcopy(model)(x)})

"""Converted DenseNets of other libraries: same results, same objects, and what is not converted."""

import copy
import importlib
import io
import pickle
import re
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import efficient_densenet
from block_reference import clear_model_of_kinks
from efficient_densenet import (
    BlockReport,
    DenseBlock,
    DenseNet,
    SharedStorage,
    concat_bn_relu,
    convert,
    explain,
    revert,
    runner,
)
from efficient_densenet.block_spec import Pool
from efficient_densenet.bn_relu_max_pool import run_bn_relu_max_pool
from reference import DTYPES, assert_error_rule, compare, kept_bytes, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = """
import torch
import torch.nn as nn
import torch.nn.functional as F

class _DenseLayer(nn.Module):
    def __init__(self, channels, growth_rate, bn_size, drop_rate):
        super().__init__()
        self.add_module("norm1", nn.BatchNorm2d(channels))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv1", nn.Conv2d(channels, bn_size * growth_rate, 1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(bn_size * growth_rate))
        self.add_module("relu2", nn.ReLU(inplace=True))
        conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.add_module("conv2", conv2)
        self.drop_rate = drop_rate

    def forward(self, *features):
        z = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        new = self.conv2(self.relu2(self.norm2(z)))
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new

class _DenseBlock(nn.Module):
    def __init__(self, layers, channels, growth_rate, bn_size, drop_rate):
        super().__init__()
        for i in range(layers):
            layer = _DenseLayer(channels + i * growth_rate, growth_rate, bn_size, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x):
        features = [x]
        for layer in self.children():
            features.append(layer(*features))
        return torch.cat(features, 1)

class _Transition(nn.Sequential):
    def __init__(self, channels, to):
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("conv", nn.Conv2d(channels, to, 1, bias=False))
        self.add_module("pool", nn.AvgPool2d(2, 2))

class Net(nn.Module):
    def __init__(self, drop_rate=0.0):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, 8, 3, padding=1, bias=False))
        self.features.add_module("denseblock1", _DenseBlock(2, 8, 4, 4, drop_rate))
        self.features.add_module("transition1", _Transition(16, 8))
        self.features.add_module("denseblock2", _DenseBlock(3, 8, 4, 4, drop_rate))
        self.features.add_module("norm_final", nn.BatchNorm2d(20))
        self.classifier = nn.Linear(20, 5)

    def forward(self, x):
        x = F.relu(self.features(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
"""
BLOCKS = (2, 3, 2)


def library(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs {name}: {error}")


def torchvision(growth_rate=4, classes=5, **options):
    module = library("torchvision.models.densenet")
    return module.DenseNet(growth_rate, BLOCKS, 2 * growth_rate, num_classes=classes, **options)


def timm(growth_rate=4, classes=5, **options):
    module = library("timm.models.densenet")
    return module.DenseNet(growth_rate, BLOCKS, classes, **options)


def monai(dims=2, growth_rate=4, classes=5, **options):
    module = library("monai.networks.nets.densenet")
    return module.DenseNet(dims, 3, classes, 2 * growth_rate, growth_rate, BLOCKS, **options)


def torchxrayvision(growth_rate=4, classes=5, **options):
    module = library("torchxrayvision.models")
    return module.DenseNet(
        growth_rate, BLOCKS, 2 * growth_rate, num_classes=classes, in_channels=3, **options
    )


@pytest.fixture
def seed(monkeypatch):
    module = types.ModuleType("models_densenet")
    exec(SEED, module.__dict__)
    monkeypatch.setitem(sys.modules, "models_densenet", module)
    return module.Net


MODELS = {
    "torchvision": torchvision,
    "torchvision memory_efficient": partial(torchvision, memory_efficient=True),
    "timm": timm,
    "timm memory_efficient": partial(timm, memory_efficient=True),
    "MONAI 1-d": partial(monai, 1),
    "MONAI 2-d": monai,
    "MONAI 3-d": partial(monai, 3),
    "torchxrayvision": torchxrayvision,
}
NAMES = [name for name in MODELS if "memory_efficient" not in name]
by_model = pytest.mark.parametrize("name", MODELS)
BOTH = pytest.mark.parametrize("recompute", ["bottleneck", "features"])


def build(name, device="cpu", dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = MODELS[name](**settings)
    for buffer in model.buffers():
        if buffer.dtype.is_floating_point and buffer.dim():
            buffer.uniform_(0.5, 1.5)
    return model.to(device, dtype)


def images(name, device="cpu", dtype=torch.float64, n=2):
    dims = {"MONAI 1-d": 1, "MONAI 3-d": 3}.get(name, 2)
    torch.manual_seed(1)
    x = torch.randn(n, 3, *[{1: 96, 2: 40, 3: 33}[dims]] * dims)
    return (x.mul(8).round() / 8).to(device, dtype)  # sums of few digits, exact in every dtype


def train(model, x, steps=3, autocast=None):
    """Outputs of SGD steps, the first and the last gradients, and the state after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    results = {}
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            y = model(x + step)
            loss = F.cross_entropy(y, torch.arange(len(x), device=x.device))
        loss.backward()
        results[f"y{step}"] = y.detach()
        if step in (0, steps - 1):
            results |= {
                f"grad{step} {n}": p.grad.clone()
                for n, p in model.named_parameters()
                if p.grad is not None
            }
        optimizer.step()
    return results | {n: t.detach().clone() for n, t in model.state_dict().items()}


def assert_same(ours, expected, limit=1e-8):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype == torch.int64:
            assert torch.equal(ours[name], value), name
        else:
            scale = value.double().norm()
            error = (ours[name].double() - value.double()).norm() / max(scale, 1e-6)
            assert error <= limit, f"{name}: {error:.3g}"


def without_checkpointing(model):
    """The library's own counts every batch twice in the norms that it recomputes."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for attribute in ("memory_efficient", "grad_checkpointing"):
            if hasattr(module, attribute):
                setattr(module, attribute, False)
    return model


# Results


@by_model
@BOTH
def test_training_and_evaluation(device, name, recompute):
    model, x = build(name, device), images(name, device)
    expected = train(plain := without_checkpointing(model), x)
    assert convert(model, recompute=recompute) is model
    assert_same(train(model, x), expected)
    assert_same({"y": model.eval()(x)}, {"y": plain.eval()(x)})
    assert all(report.path.startswith("matrix products") for report in explain(model, x))


@by_model
@pytest.mark.parametrize("hooked", [False, True])
def test_the_stem_is_one_operator(name, hooked, monkeypatch):
    model, x = convert(build(name)), images(name)
    stems = []
    monkeypatch.setattr(
        runner, "run_bn_relu_max_pool", lambda *args: stems.append(0) or run_bn_relu_max_pool(*args)
    )
    if hooked:
        model.get_submodule("features.pool0").register_forward_hook(lambda module, x, y: None)
    model(x)
    assert len(stems) == (0 if hooked else 1)


@BOTH
def test_the_seeds_layout(device, seed, recompute):
    torch.manual_seed(0)
    model, x = seed().to(device).double(), images("torchvision", device)
    expected = train(copy.deepcopy(model), x)
    assert_same(train(convert(model, recompute=recompute), x), expected)
    assert [report.path[:6] for report in explain(model)] == ["fused"] * 2
    again = pickle.loads(pickle.dumps(model))
    assert_same({"y": again.eval()(x)}, {"y": model.eval()(x)}, limit=0)


PRECISIONS = {  # of the model, and of autocast
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "float16 autocast": (torch.float32, torch.float16),
    "bfloat16 autocast": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "name, channels_last",
    [*((name, False) for name in NAMES), *((name, True) for name in NAMES if "1-d" not in name)],
)
def test_working_precisions(device, name, precision, channels_last):
    """As close to float64 as the library's network; wide enough for the rule to be steady."""
    dtype, autocast = PRECISIONS[precision]
    if device == "cpu" and name == "MONAI 3-d" and precision != "float32":
        pytest.skip("torch has no avg_pool3d in 16 bits on the CPU")
    model = build(name, device, dtype, growth_rate=16, classes=40)
    x = images(name, device, dtype, n=4)
    eps = torch.finfo(autocast or dtype).eps
    clear_model_of_kinks(model, x, max(16 * eps, 1e-5))  # 16: a network adds up rounding errors
    if channels_last:
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
        model, x = (t.to(memory_format=memory_format) for t in (model, x))
    exact = train(copy.deepcopy(model).double(), x.double())
    plain = train(copy.deepcopy(model), x, autocast=autocast)
    ours = train(convert(model), x, autocast=autocast)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        paths = {re.split(":| but ", report.path)[0] for report in explain(model, x)}
    assert paths == {expected_path(device, autocast or dtype)}
    found = compare(ours, plain, exact)
    # Weights that have moved have kinks again.
    found = {name: errors for name, errors in found.items() if not name.startswith("grad2")}
    assert_error_rule(found, autocast or dtype)


def expected_path(device, dtype):
    if device == "cuda" and dtype.itemsize == 2 and torch.cuda.get_device_capability() >= (8, 0):
        return "tensor cores"
    return "matrix products"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "build_model",
    [
        lambda: torchvision(drop_rate=0.3),
        lambda: timm(proj_drop_rate=0.3),
        lambda: torchxrayvision(drop_rate=0.3),
        *(partial(monai, dims, dropout_prob=0.3) for dims in (1, 2, 3)),
    ],
    ids=["torchvision", "timm", "torchxrayvision", "MONAI 1-d", "MONAI 2-d", "MONAI 3-d"],
)
def test_dropout_draws_the_same_masks(device, build_model, channels_last):
    torch.manual_seed(0)
    model = build_model().to(device).double()
    x = images(f"MONAI {model.features.conv0.weight.dim() - 2}-d", device)
    if channels_last and x.dim() == 4:
        x, model = (t.to(memory_format=torch.channels_last) for t in (x, model))
    expected = train(copy.deepcopy(model), x)
    assert_same(train(convert(model), x), expected)
    assert all("fused" in report.path for report in explain(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [2, 3])
def test_dropout_of_channels(device, dims, dtype):
    """The same channels of the same images as MONAI drops, and as many numbers drawn."""
    block = monai(dims, dropout_prob=0.4).features.denseblock2.to(device, dtype)
    x = torch.randn(4, 8, *[5] * dims, device=device).to(dtype)
    found = []
    for run in (block, convert(copy.deepcopy(block), strict=True)):
        torch.manual_seed(3)
        y = run(x)
        assert y.isfinite().all()
        found.append(((y == 0).flatten(2).all(2), torch.rand(3, device=device)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert 0 < found[0][0][:, 8:].float().mean() < 1 and not found[0][0][:, :8].any()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dropout_compiles(device, dims):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = convert(monai(dims, dropout_prob=0.3)).to(device).double()
    x = images(f"MONAI {dims}-d", device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert_same({"y": compiled(x)}, {"y": expected})


def test_autocast_and_frozen_norms(device):
    model = build("torchvision", device, torch.float32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = images("torchvision", device, torch.float32)
    plain = copy.deepcopy(model)
    convert(model)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast(device, torch.bfloat16):
        ours, expected = model(x), plain(x)
    assert ours.dtype == expected.dtype
    assert relative_error(ours, expected) < 5e-2
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_gradient_of_the_input_and_accumulation(device):
    model, x = build("torchvision", device), images("torchvision", device)
    plain, found = copy.deepcopy(model), []
    for each in (convert(model), plain):
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            each(leaf).square().sum().backward()
        found.append({"x": leaf.grad} | {n: p.grad for n, p in each.named_parameters()})
    assert_same(*found)


def test_a_norm_that_runs_plainly_and_fused(device):
    """In one graph: module by module, as timm's forward_intermediates does it, and as a whole."""
    model, x = build("torchvision", device), images("torchvision", device)
    found = []
    for each in (copy.deepcopy(model), convert(model)):
        y = x
        for module in each.features:
            y = module(y)
        (y.square().sum() + each(x).square().sum()).backward()
        found.append({name: p.grad for name, p in each.named_parameters()})
        found[-1] |= {name: t.clone() for name, t in each.state_dict().items()}
    assert_same(*found)


@by_model
def test_the_whole_network_runs_in_its_blocks(name, specs):
    """Every transition and the head; the stem is an operator of its own."""
    model, x = convert(build(name)), images(name)
    specs.clear()  # of what convert has tried out
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = model(x)
    called = [event.name for event in profile.events()]
    assert called.count("aten::batch_norm") == 0
    assert called.count("efficient_densenet::bn_relu_max_pool") == 1
    assert [spec.pool for spec in specs] == [Pool.WINDOWS, Pool.WINDOWS, Pool.IMAGES]
    assert [spec.projected_channels > 0 for spec in specs] == [False, True, True]
    assert_same({"y": revert(model)(x)}, {"y": y})


def listen(module, seen):
    module.register_forward_hook(lambda module, arguments, y: seen.append(y.detach().clone()))


LISTENED = {
    "torchvision": ["features", "features.norm5", "features.denseblock3"],
    "timm": ["features", "features.norm5", "global_pool", "global_pool.pool"],
    "MONAI 3-d": ["features.norm5", "class_layers", "class_layers.relu", "class_layers.pool"],
    "torchxrayvision": ["features", "features.norm5"],
}


@pytest.mark.parametrize(
    "name, module", [(name, module) for name, modules in LISTENED.items() for module in modules]
)
def test_hooks_around_the_head(name, module, specs):
    model, plain, x, seen = convert(build(name)), build(name), images(name), []
    for each in (model, plain):
        listen(each.get_submodule(module), seen)
    assert_same(train(model, x, 1), train(plain, x, 1))
    assert_same({"seen": seen[0]}, {"seen": seen[1]})
    assert specs[-1].pool != Pool.IMAGES


def own_forward(model):
    class Own(type(model)):
        def forward(self, x):
            return self.classifier(self.features(x).mean((2, 3)))

    model.__class__ = Own


def inherited(model):
    model.__class__ = type("Inherited", (type(model),), {})


# Of a model, before it is converted; and whether the head averages in the last block all the same.
HEADS = {
    "a forward of its own": ("torchvision", own_forward, False),
    "inherited": ("torchvision", inherited, True),
    "a module behind the norm": (
        "torchvision", lambda m: m.features.add_module("more", nn.Identity()), False,
    ),
    "another norm": (
        "torchxrayvision",
        lambda m: setattr(m.features, "norm5", nn.GroupNorm(1, m.classifier.in_features).double()),
        False,
    ),
    "an instance's head": (
        "timm", lambda m: setattr(m, "forward_head", lambda x: x.amax((2, 3)).sigmoid()), False,
    ),
    "no classifier": ("timm", lambda m: m.reset_classifier(0), True),
    "no pooling": ("timm", lambda m: m.reset_classifier(0, ""), False),
    "maximum": ("timm", lambda m: m.reset_classifier(3, "max"), False),
    "a norm without ReLU": (
        "timm", lambda m: setattr(m.features, "norm5", nn.BatchNorm2d(m.num_features).double()),
        False,
    ),
    "another activation": (
        "MONAI 2-d", lambda m: setattr(m.class_layers, "relu", nn.LeakyReLU()), False,
    ),
    "averages of quarters": (
        "MONAI 2-d", lambda m: setattr(m.class_layers, "pool", nn.AdaptiveAvgPool2d((2, 1))) or
        setattr(m.class_layers, "out", nn.Identity()), False,
    ),
    "no head": ("MONAI 2-d", lambda m: setattr(m, "class_layers", nn.Identity()), False),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_other_heads(head, specs):
    name, change, averages = HEADS[head]
    model, x = build(name), images(name)
    change(model)
    expected = model.eval()(x)
    assert_same({"y": convert(model)(x)}, {"y": expected})
    assert (specs[-1].pool == Pool.IMAGES) == averages
    assert_same({"y": revert(model)(x)}, {"y": expected}, limit=0)


@by_model
def test_features_alone_are_what_they_were(name):
    model, x = build(name).eval(), images(name)
    methods = [m for m in ("features", "forward_features", "features2") if hasattr(model, m)]
    expected = {method: getattr(model, method)(x) for method in methods}
    convert(model)
    for _ in range(2):
        assert_same({method: getattr(model, method)(x) for method in methods}, expected)
        model(x)


def test_an_error_leaves_the_features_as_they_are():
    model, x = convert(build("torchvision")).eval(), images("torchvision")
    expected = model.features(x)
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    assert_same({"y": model.features(x)}, {"y": expected}, limit=0)


def test_a_hook_on_timms_last_norm_sees_the_block():
    model, x, seen = convert(build("timm")), images("timm"), []
    plain = revert(copy.deepcopy(model))
    for each in (model, plain):
        norm = each.features.norm5
        norm.register_forward_hook(lambda module, arguments, y: seen.extend([*arguments, y]))
        each(x)
    assert_same({"x": seen[0], "y": seen[1]}, {"x": seen[2], "y": seen[3]})


# Objects


@by_model
def test_every_object_stays(name):
    model = build(name)
    before = dict(model.named_modules())
    tensors = dict(model.state_dict(keep_vars=True))
    classes = {n: type(m) for n, m in before.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model)
    assert list(before) == [n for n, _ in model.named_modules()]
    assert all(before[n] is m and isinstance(m, classes[n]) for n, m in model.named_modules())
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors) and all(after[n] is t for n, t in tensors.items())
    model(images(name)).sum().backward()
    optimizer.step()
    assert revert(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert not any("_efficient_densenet" in vars(m) for m in model.modules())


def test_again_changes_nothing_but_recompute():
    model = convert(build("torchvision"))
    classes = [type(m) for m in model.modules()]
    assert [type(m) for m in convert(model, recompute="features").modules()] == classes
    assert model.features.denseblock1._efficient_densenet.recompute == "features"
    revert(revert(model))
    assert type(model.features) is nn.Sequential


def test_not_in_place():
    model = build("torchvision")
    other = convert(model, inplace=False)
    assert other is not model and type(model.features) is nn.Sequential
    x = images("torchvision")
    assert_same({"y": other.eval()(x)}, {"y": model.eval()(x)})


def test_copies_and_pickles():
    model, x = convert(build("torchvision")), images("torchvision")
    model(x)  # has specs
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert {id(p) for p in other.parameters()}.isdisjoint(map(id, model.parameters()))
        assert_same({"y": other.eval()(x)}, {"y": model.eval()(x)}, limit=0)
        assert type(revert(other).features) is nn.Sequential


def test_state_dict_loads_either_way():
    model, plain = convert(build("torchvision")), torchvision().double()
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    model.load_state_dict(copy.deepcopy(plain).state_dict(), assign=True)  # other parameters
    x = images("torchvision")
    assert_same(train(model, x, 1), train(plain, x, 1))


def test_averaged_model_and_functional_call():
    model, x = convert(build("torchvision")), images("torchvision")
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert_same({"y": average.eval()(x)}, {"y": model.eval()(x)}, limit=0)
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    ours = torch.func.functional_call(model, doubled, (x,))
    expected = torch.func.functional_call(revert(model), doubled, (x,))
    assert_same({"y": ours}, {"y": expected})


def refused(block, x):
    """What is refused: each with a sentence that says what to use instead."""
    with pytest.raises(RuntimeError, match="transforms.* not supported; use plain modules"):
        torch.vmap(block)(x[None])
    with pytest.raises(RuntimeError, match="transforms.* not supported; use plain modules"):
        torch.func.grad(lambda v: block(v).sum())(x)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="forward-mode .* not supported; use plain modules"):
            block(forward_ad.make_dual(x, x))
        block(x)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(block(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; use plain modules"):
        gradient.sum().backward()


def test_what_is_refused(device):
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, device=device)
    refused(DenseBlock(2, 8, 4).to(device).double(), x)
    storage = SharedStorage()

    def layer(x):
        return concat_bn_relu([x], None, None, training=True, storage=storage).clone()

    refused(layer, x)
    block = convert(build("torchvision", device)).features.denseblock1
    refused(block, x)
    plain = revert(block)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(plain(leaf).square().sum(), leaf, create_graph=True)
    gradient.sum().backward()


# Around


def test_a_block_alone_and_inside_other_models():
    block, x = build("torchvision").features.denseblock1, torch.randn(2, 8, 6, 6).double()
    wrapped = nn.ModuleDict({"encoder": nn.Sequential(block, nn.ReLU(inplace=True))})
    expected = wrapped.encoder(x)
    convert(wrapped)
    y = wrapped.encoder(x)
    assert_same({"y": y}, {"y": expected})
    y.sum().backward()  # the ReLU has written to a copy
    assert convert(block) is block


def blocks_of(model, device="cpu"):
    reports = explain(model, images("torchvision", device))
    return {report.name: report.path for report in reports}


def test_tracing_and_scripting_see_the_library(device):
    model, x = convert(build("torchvision", device)).eval(), images("torchvision", device)
    expected = model(x)
    nodes = {node.target for node in torch.fx.symbolic_trace(model).graph.nodes}
    assert "features.denseblock1.denselayer1.conv1" in nodes
    assert_same({"y": torch.jit.trace(model, x)(x)}, {"y": expected})
    assert_same({"y": torch.export.export(model, (x,)).module()(x)}, {"y": expected})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same({"y": compiled(x)}, {"y": expected})
    assert blocks_of(model, device)["features.denseblock1"].startswith("matrix products")
    blocks = [module for module in model.modules()]
    assert_same({"y": torch.jit.script(model)(x)}, {"y": expected})
    assert all(a is b for a, b in zip(model.modules(), blocks, strict=True))
    assert blocks_of(model, device)["features.denseblock1"].startswith("library: not")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiles_without_a_break(device, name, training):
    torch._dynamo.reset()
    model, x = convert(build(name, device)).train(training), images(name, device)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        results = []
        for each, call in ((model, compiled), (twin, twin)):
            each.zero_grad()
            y = call(x)
            y.square().mean().backward()
            gradients = {f"grad {n}": p.grad.clone() for n, p in each.named_parameters()}
            state = {n: t.clone() for n, t in each.state_dict().items()}
            results.append({"y": y.detach()} | gradients | state)
        assert_same(*results)


def test_memory_and_explain(capsys):
    """The bytes that explain says are those that autograd keeps."""
    model = build("torchvision")
    block = model.features.denseblock2
    y = torch.randn(2, 8, 10, 10).double().requires_grad_()
    own = [y, *block.parameters()]
    plain = kept_bytes(lambda: block(y), own)
    convert(model)
    for recompute in ("bottleneck", "features"):
        convert(model, recompute=recompute)
        report = next(r for r in explain(block, y) if r)
        assert isinstance(report, BlockReport)
        ours = kept_bytes(lambda: block(y), own)
        # Batch norm keeps two numbers per channel; we keep parameters packed as well.
        assert abs(report.kept_bytes - ours) < 0.1 * ours
        result = 8 * 2 * 20 * 100  # that of plain is kept by who reads it
        assert abs(report.plain_bytes - (plain + result)) < 0.1 * plain
    text = capsys.readouterr().out
    assert "kept MB" in text and "matrix products: the features are on cpu" in text


def test_explain_restores_modes_and_statistics():
    model, x = convert(build("torchvision")), images("torchvision")
    model.features.denseblock1.eval()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    explain(model, x)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_explain_our_own():
    model = DenseNet(4, (2, 2), efficient=True)
    reports = explain(model, torch.randn(2, 3, 16, 16))
    assert [report.name for report in reports] == ["features.denseblock1", "features.denseblock2"]
    assert all(report.kept_bytes < report.plain_bytes for report in reports)
    plain = explain(DenseNet(4, (2, 2)), torch.randn(2, 3, 16, 16))
    assert {report.path for report in plain} == {"plain modules: efficient=False"}
    assert efficient_densenet.explain is explain


@pytest.mark.parametrize("name", ["torchvision", "timm", "MONAI 2-d"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_run_fused(name, copied, specs):
    """Also where a compiler traces their first call."""
    model, x = convert(build(name)), images(name)
    twins = copied(model), copied(model)
    specs.clear()
    model(x)
    expected = [(spec.pool, spec.projected_channels) for spec in specs]
    torch._dynamo.reset()
    for twin in (twins[0], torch.compile(twins[1], backend="aot_eager", fullgraph=True)):
        specs.clear()
        twin(x)
        assert [(spec.pool, spec.projected_channels) for spec in specs] == expected

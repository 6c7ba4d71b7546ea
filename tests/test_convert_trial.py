"""What a block computes decides about its conversion, not the names of its classes and parts.

Each variant is a block that looks like one that we know and computes something else. It has to be
left alone: its results stay, ``strict`` refuses it, and ``explain`` says why.
"""

import copy
import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from efficient_densenet import convert, explain
from test_convert import MODELS, build, images, library, timm, torchvision

pytestmark = pytest.mark.usefixtures("one_thread")


class Parts(nn.Sequential):
    """The parts of a layer under the names that every copy of the original has."""

    def __init__(self, channels, growth):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(2 * growth), nn.ReLU()
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.drop_rate = 0.0

    def new(self, x):
        z = self.conv1(self.relu1(self.norm1(x)))
        return self.conv2(self.relu2(self.norm2(z)))


def gated(self, x):
    return torch.cat([x, self.new(x) * self.gate(self.new(x))], 1)


def with_gate(layer, growth):
    layer.gate = nn.Sigmoid()


def squeezed(self, x):
    y = self.new(x)
    return torch.cat([x, y * self.excite(y.mean((2, 3), keepdim=True)).sigmoid()], 1)


def with_excitation(layer, growth):
    layer.excite = nn.Conv2d(growth, growth, 1)


def dropped_between(self, x):
    z = F.dropout(self.conv1(self.relu1(self.norm1(x))), 0.5, self.training)
    return torch.cat([x, self.conv2(self.relu2(self.norm2(z)))], 1)


def dropped_between_by_rate(self, x):
    z = F.dropout(self.conv1(self.relu1(self.norm1(x))), self.drop_rate, self.training)
    return torch.cat([x, self.conv2(self.relu2(self.norm2(z)))], 1)


def scaled(self, x):
    return torch.cat([x, 0.5 * self.new(x)], 1)


def scaled_by_attribute(self, x):
    return torch.cat([x, self.scale * self.new(x)], 1)


def with_scale(layer, growth):
    layer.scale = 0.2


def with_parameter(layer, growth):
    layer.scale = nn.Parameter(torch.tensor(0.3))


def new_first(self, x):
    return torch.cat([self.new(x), x], 1)


def detached(self, x):
    return torch.cat([x, self.new(x.detach())], 1)


def sum_of_features(self, x):
    y = self.new(x)
    return torch.cat([x + 1e-3, y], 1)


def swapped_order(self, x):
    z = self.relu1(self.norm1(x))
    return torch.cat([x, self.conv2(self.norm2(self.relu2(self.conv1(z))))], 1)


def only_in_training(self, x):
    y = self.new(x)
    return torch.cat([x, 2 * y if self.training else y], 1)


def only_in_evaluation(self, x):
    y = self.new(x)
    return torch.cat([x, y if self.training else y.clamp(max=0.1)], 1)


def two_updates(self, x):
    self.norm1(x)
    return torch.cat([x, self.new(x)], 1)


def fails(self, x):
    raise RuntimeError("not for you")


LAYERS = {
    "gate": (gated, with_gate),
    "squeeze and excitation": (squeezed, with_excitation),
    "dropout between": (dropped_between, None),
    "scaled": (scaled, None),
    "scaled by an attribute": (scaled_by_attribute, with_scale),
    "scaled by a parameter": (scaled_by_attribute, with_parameter),
    "new features first": (new_first, None),
    "detached features": (detached, None),
    "shifted features": (sum_of_features, None),
    "ReLU before norm": (swapped_order, None),
    "only in training": (only_in_training, None),
    "only in evaluation": (only_in_evaluation, None),
    "statistics moved twice": (two_updates, None),
}


def block_of(forward, prepare=None, block_forward=None):
    """Two layers of classes that carry the names of the original."""
    Layer = type("_DenseLayer", (Parts,), {"forward": forward, "__qualname__": "_DenseLayer"})
    members = {"__qualname__": "_DenseBlock"}
    if block_forward is not None:
        members["forward"] = block_forward
    Block = type("_DenseBlock", (nn.Sequential,), members)
    torch.manual_seed(0)
    layers = [Layer(8, 4), Layer(12, 4)]
    for layer in layers:
        if prepare is not None:
            prepare(layer, 4)
    return Block(*layers)


def outcome(block, x):
    """Result and all that has moved."""
    torch.manual_seed(0)
    found = [block(x).detach()]
    return found + [buffer.clone() for buffer in block.buffers()]


def assert_left_alone(block, caplog):
    holder, x = nn.ModuleDict({"block": block}), torch.randn(2, 8, 6, 6)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match="cannot be converted wholly: block: "):
        convert(holder, strict=True)
    with caplog.at_level(logging.INFO, "efficient_densenet"):
        convert(holder)
    assert "block: not converted: " in caplog.text
    assert explain(holder)[0].path.startswith("library: ")
    for training in (True, False):
        block.train(training)
        twin = copy.deepcopy(block)
        for ours, plain in zip(outcome(block, x), outcome(twin, x), strict=True):
            assert torch.equal(ours, plain)
        block.load_state_dict(before)
    assert type(block).__mro__[1] is nn.Sequential


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_computes_something_else(layer, caplog):
    assert_left_alone(block_of(*LAYERS[layer]), caplog)


def scaled_block(self, x):
    for layer in self:
        x = layer(x)
    return 2 * x


def last_features_only(self, x):
    for layer in self:
        x = layer(x)
    return x[:, 8:]


def reversed_layers(self, x):
    return torch.cat([self[1](self[0](x))[:, 8:], x], 1)


@pytest.mark.parametrize("forward", [scaled_block, last_features_only, reversed_layers])
def test_a_block_that_computes_something_else(forward, caplog):
    plain = lambda self, x: torch.cat([x, self.new(x)], 1)  # noqa: E731
    assert_left_alone(block_of(plain, None, forward), caplog)


def test_a_copy_that_computes_the_same_is_converted():
    block = block_of(lambda self, x: torch.cat([x, self.new(x)], 1))
    plain, x = copy.deepcopy(block), torch.randn(2, 8, 6, 6)
    assert explain(convert(block, strict=True))[0].path == "fused"
    torch.testing.assert_close(block(x), plain(x))


def test_dropout_in_another_place_is_noticed_where_it_is_on(caplog):
    """Without dropout the block is the original's; with it, it is not."""
    block = block_of(dropped_between_by_rate)
    plain, x = copy.deepcopy(block), torch.randn(2, 8, 6, 6)
    convert(block)
    for each in (block, plain):
        for layer in each:
            layer.drop_rate = 0.5
    results = []
    for each in (block, plain):
        torch.manual_seed(0)
        results.append(each(x))
    torch.testing.assert_close(*results)
    fresh = block_of(dropped_between_by_rate)
    for layer in fresh:
        layer.drop_rate = 0.5
    assert_left_alone(fresh, caplog)


def doubled(forward):
    @functools.wraps(forward)  # carries __wrapped__, __module__ and the name of the original
    def double(self, *arguments):
        return 2 * forward(self, *arguments)

    return double


CLASSES = {
    "torchvision layer": ("torchvision.models.densenet", "_DenseLayer", torchvision),
    "torchvision block": ("torchvision.models.densenet", "_DenseBlock", torchvision),
    "timm layer": ("timm.models.densenet", "DenseLayer", timm),
    "timm block": ("timm.models.densenet", "DenseBlock", timm),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_was_changed(name, when, monkeypatch):
    module, kind, make = CLASSES[name]
    kind = getattr(library(module), kind)
    torch.manual_seed(0)
    model, x = make().double().eval(), images("torchvision")
    if when == "after":
        convert(model)
        model(x)
    monkeypatch.setattr(kind, "forward", doubled(kind.forward))
    torch.manual_seed(0)
    expected = make().double().eval()(x)
    if when == "before":
        convert(model)
    torch.testing.assert_close(model(x), expected)
    assert all(report.path.startswith("library: ") for report in explain(model))


def test_a_method_that_the_layer_calls_was_changed(monkeypatch):
    kind = library("torchvision.models.densenet")._DenseLayer
    torch.manual_seed(0)
    model, x = torchvision().double().eval(), images("torchvision")
    plain = copy.deepcopy(model)
    convert(model)(x)
    monkeypatch.setattr(kind, "bn_function", doubled(kind.bn_function))
    torch.testing.assert_close(model(x), plain(x))


def test_an_attribute_of_a_layer_changed_after_conversion():
    """The code of the copy reads it, although it was 1 when the block was tried out."""
    block = block_of(scaled_by_attribute, lambda layer, growth: setattr(layer, "scale", 1.0))
    plain, x = copy.deepcopy(block), torch.randn(2, 8, 6, 6)
    convert(block, strict=True)(x)
    plain(x)
    for each in (block, plain):
        each[1].scale = 3.0
    torch.testing.assert_close(block(x), plain(x))
    assert "attribute" in explain(block)[0].path


def test_an_attribute_of_a_subclass_of_a_library():
    kind = library("torchvision.models.densenet")._DenseLayer

    class Scaled(kind):
        def forward(self, x):
            return super().forward(x) * self.scale

    model, x = build("torchvision").eval(), images("torchvision")
    for layer in model.features.denseblock2.children():
        layer.__class__, layer.scale = Scaled, 1.0
    plain = copy.deepcopy(model)
    convert(model, strict=True)(x)
    for each in (model, plain):
        each.features.denseblock2.denselayer1.scale = 2.0
    torch.testing.assert_close(model(x), plain(x))


class OtherTransition(nn.Sequential):
    """Has the parts of a transition and computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_changed_transition(monkeypatch):
    model, x = build("torchvision").eval(), images("torchvision")
    model.features.transition1.__class__ = OtherTransition
    plain = copy.deepcopy(model)
    torch.testing.assert_close(convert(model)(x), plain(x))
    kind = library("torchvision.models.densenet")._Transition
    monkeypatch.setattr(kind, "forward", doubled(kind.forward))
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_head(when, monkeypatch):
    kind = library("torchvision.models.densenet").DenseNet
    model, x = build("torchvision").eval(), images("torchvision")
    plain = copy.deepcopy(model)
    if when == "after":
        convert(model)(x)

    def other(self, x):
        return self.classifier(F.leaky_relu(self.features(x), 0.1).mean((2, 3)))

    monkeypatch.setattr(kind, "forward", other)
    if when == "before":
        convert(model)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize(
    "setting",
    [
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: torch.random.fork_rng(),
        torch.inference_mode,
        torch.no_grad,
        torch.autograd.forward_ad.dual_level,
        FakeTensorMode,
    ],
    ids=["meta", "autocast", "anomaly", "rng", "inference", "no_grad", "forward_ad", "fake"],
)
@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_what_is_set_around_a_conversion_does_not_reach_the_trial(name, setting):
    model, state = build(name), torch.get_rng_state()
    with setting():
        convert(model, strict=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["torchvision", "timm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_reach_the_trial(name, dtype):
    model, before = build(name), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        convert(model, strict=True)
    finally:
        torch.set_default_dtype(before)


def test_a_model_that_is_made_without_memory_is_converted_there():
    with torch.device("meta"):
        model = convert(MODELS["torchvision"](), strict=True)
    model.to_empty(device="cpu").load_state_dict(build("torchvision").state_dict())
    x = images("torchvision")
    torch.testing.assert_close(model.double().eval()(x), build("torchvision").eval()(x))

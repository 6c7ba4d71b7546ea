"""Networks with changed modules: what keeps a block from running as one, and hooks that listen."""

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from efficient_densenet import DenseBlock, DenseNet
from efficient_densenet import densenet as densenet_module
from test_densenet import SMALL, assert_same_training, blocks, calls, images, input_of, pair


class Other(nn.BatchNorm2d):
    """Not exactly batch norm."""

    def forward(self, x):
        return 2 * super().forward(x)


def replace_norm1(model):
    for module in model.modules():
        if isinstance(module, densenet_module._DenseLayer):
            other = Other(module.norm1.num_features).to(module.norm1.weight)
            other.load_state_dict(module.norm1.state_dict())
            module.norm1 = other


def replace_relu(model):
    for module in model.modules():
        if isinstance(module, densenet_module._DenseLayer):
            module.relu2 = nn.LeakyReLU(0.1)


def on_second_layer(change):
    def apply(model):
        change(model.features.denseblock1.denselayer2)

    return apply


def use_other_convolution(layer, **changes):
    settings = dict(kernel_size=3, padding=1, bias=False) | changes
    conv = nn.Conv2d(layer.conv2.in_channels, layer.conv2.out_channels, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in conv.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    layer.conv2 = conv.to(layer.conv1.weight)


def call_twice(layer):
    forward = layer.conv1.forward
    layer.conv1.forward = lambda x: forward(x) + forward(x)


def prune(layer):
    nn.utils.prune.l1_unstructured(layer.conv2, "weight", amount=0.5)


def parametrise(layer):
    nn.utils.parametrizations.weight_norm(layer.conv1)


def widen_layer(model):
    """Another growth rate in one layer, and all that reads it."""
    block = model.features.denseblock3
    use_other_convolution(block.denselayer2)
    old = block.denselayer2.conv2
    conv = nn.Conv2d(old.in_channels, old.out_channels + 1, 3, padding=1, bias=False).to(old.weight)
    with torch.no_grad():
        conv.weight.copy_(torch.ones_like(conv.weight) / 7)
    block.denselayer2.conv2 = conv
    channels = model.features.norm_final.num_features + 1
    model.features.norm_final = nn.BatchNorm2d(channels).to(old.weight)
    model.classifier = nn.Linear(channels, 5, bias=False).to(old.weight)
    nn.init.ones_(model.classifier.weight)


# What keeps a block from running as one operator, and why_not_fused says so.
FALLBACKS = {
    "norm1 is Other": replace_norm1,
    "activation is LeakyReLU": replace_relu,
    "convolution has hooks": on_second_layer(prune),
    "convolution is ParametrizedConv2d": on_second_layer(parametrise),
    "convolution has a forward of its own": on_second_layer(call_twice),
    "dilation": on_second_layer(lambda m: use_other_convolution(m, dilation=2, padding=2)),
    "groups": on_second_layer(lambda m: use_other_convolution(m, groups=2)),
    "a bias": on_second_layer(lambda m: use_other_convolution(m, bias=True)),
    "padding": on_second_layer(lambda m: use_other_convolution(m, padding_mode="circular")),
    "kernel (2, 2)": on_second_layer(
        lambda m: use_other_convolution(m, kernel_size=2, padding="same")
    ),
    "denselayer2: other dropout": on_second_layer(lambda m: setattr(m, "drop_rate", 0.4)),
    "other numbers of channels": widen_layer,
}


@pytest.mark.parametrize("why", FALLBACKS)
def test_falls_back_to_layers(device, why):
    plain, efficient = pair(device)
    x = images(device)
    assert blocks(efficient)[0].why_not_fused(input_of(blocks(efficient)[0], x)) is None
    changed = [FALLBACKS[why](model) or model for model in (plain, efficient)]
    reasons = [block.why_not_fused(input_of(block, x)) for block in blocks(changed[1])]
    assert any(why.removeprefix("norm1 ") in (reason or "") for reason in reasons)
    assert_same_training(*changed, device=device)


def test_a_block_on_another_device_or_of_another_dtype_says_so():
    block = DenseBlock(2, 8, 4)
    x = images(dtype=torch.float32).repeat(1, 3, 1, 1)[:, :8]
    assert block.why_not_fused(x) is None
    assert "torch.float32, its input torch.float64" in block.why_not_fused(x.double())
    assert "on cpu, its input on meta" in block.why_not_fused(x.to("meta"))
    block, x = block.to("meta"), x.to("meta")
    assert "torch.float32, its input torch.float64" in block.why_not_fused(x.double())


@pytest.mark.parametrize(
    "name",
    [
        "", "denseblock1", "transition1", "transition1.conv", "transition1.pool", "denseblock2",
        "norm_final",
    ],
)  # fmt: skip
def test_hooks_on_blocks_and_readers_are_called(device, name):
    plain, efficient = pair(device)
    shapes = []
    for model in (plain, efficient):
        module = model.features.get_submodule(name)
        module.register_forward_hook(lambda module, x, y: shapes.append(y.shape))
        module.register_full_backward_hook(lambda module, *grads: shapes.append(grads[1][0].shape))
    assert_same_training(plain, efficient, steps=2, device=device)
    assert len(shapes) == 8 and shapes[:4] == shapes[4:]


def listen(module):
    module.register_forward_hook(lambda module, x, y: None)


def put_convolution(**options):
    def change(model):
        old = model.features.transition1.conv
        settings = dict(kernel_size=1, bias=False) | options
        conv = nn.Conv2d(old.in_channels, old.out_channels, **settings)
        for p in conv.parameters():
            nn.init.constant_(p, 0.1)
        model.features.transition1.conv = conv.to(old.weight)

    return change


def on(name, function, *args):
    return lambda model: function(model.features.get_submodule(name), *args)


# How many of the two transitions convolve straight into the next block's features.
TRANSITIONS = {
    "as they are": (lambda model: None, 2),
    "another convolution": (put_convolution(), 2),
    "with a bias": (put_convolution(bias=True), 1),
    "3x3": (put_convolution(kernel_size=3, padding=1), 1),
    "parametrised": (on("transition1.conv", nn.utils.parametrizations.weight_norm), 1),
    "pruned": (on("transition1.conv", nn.utils.prune.l1_unstructured, "weight", 0.5), 1),
    "hook on a transition": (on("transition1", listen), 1),
    "hook on its convolution": (on("transition1.conv", listen), 1),
    "hook on the next block": (on("denseblock2", listen), 0),
    "hook on the next block's reader": (on("transition2.norm", listen), 0),
    "hook in the next block": (on("denseblock2.denselayer1.conv1", listen), 0),
    "hook on the final norm": (on("norm_final", listen), 1),
}


def entries(specs):
    return sum(spec.projected_channels > 0 for spec in specs)


@pytest.mark.parametrize("drop_rate", [0, 0.3])
@pytest.mark.parametrize("change", TRANSITIONS)
def test_transitions_convolve_into_the_next_block(device, change, drop_rate, specs):
    change, expected = TRANSITIONS[change]
    models = pair(device, drop_rate=drop_rate)
    for model in models:
        torch.manual_seed(0)
        change(model)
    assert_same_training(*models, steps=1, device=device)
    # Masks depend on the format of what the convolution makes.
    assert entries(specs) == (0 if drop_rate else expected)
    assert_same_training(*(model.eval() for model in models), steps=1, device=device)
    assert entries(specs) == expected * (1 if drop_rate else 2)


@pytest.mark.parametrize("hooked", [False, True])
def test_the_head_averages_in_the_last_block(device, hooked):
    model = DenseNet(**SMALL, efficient=True).to(device)
    if hooked:
        listen(model.features.norm_final)
    x = images(device, torch.float32)
    specs = [model(x), model.forward_features(x)]  # each use of the block has a plan of its own
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = model(x)
    names = {event.name for event in profile.events()}
    assert hooked == bool(names & {"aten::adaptive_avg_pool2d", "aten::relu"})
    torch.testing.assert_close(y, specs[0])
    torch.testing.assert_close(y, model.classifier(specs[1].mean((2, 3))))


STEMS = {
    "as it is": (lambda stem: None, "bn_relu_max_pool"),
    "hook on pool0": (lambda stem: listen(stem.pool0), "concat_bn_relu"),
    "ceil_mode": (lambda stem: setattr(stem.pool0, "ceil_mode", True), "concat_bn_relu"),
    "other windows": (lambda stem: setattr(stem, "pool0", nn.MaxPool2d(2)), "concat_bn_relu"),
    "average": (lambda stem: setattr(stem, "pool0", nn.AvgPool2d(3, 2, 1)), "concat_bn_relu"),
    "hook on norm0": (lambda stem: listen(stem.norm0), None),
    "hook on relu0": (lambda stem: listen(stem.relu0), None),
    "activation": (lambda stem: setattr(stem, "relu0", nn.LeakyReLU()), None),
}


@pytest.mark.parametrize("stem", STEMS)
def test_stem(device, stem):
    change, operator = STEMS[stem]
    models = pair(device, small_inputs=False)
    for model in models:
        change(model.features)
    x = images(device, size=32)
    found = calls(models[1], x)
    for name in ("bn_relu_max_pool", "concat_bn_relu"):
        assert (found[name] > 0) == (name == operator), name
    models[0](x)  # running statistics move here, too
    assert_same_training(*models, device=device, size=32)


@pytest.mark.parametrize("name", ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"])
def test_hooks_are_called(device, name):
    plain, efficient = pair(device)
    calls = []
    for model in (plain, efficient):
        layer = blocks(model)[0].denselayer2
        getattr(layer, name).register_forward_hook(lambda module, x, y: calls.append(y.shape))
    assert_same_training(plain, efficient, steps=1, device=device)
    assert len(calls) == 2 and calls[0] == calls[1]


def test_global_hooks_are_called(device):
    calls = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, x, y: calls.append(type(module))
    )
    try:
        for model in pair(device):
            model(images(device))
    finally:
        hook.remove()
    half = len(calls) // 2
    assert nn.BatchNorm2d in calls and calls[:half] == calls[half:]

"""Traced, scripted and exported networks are plain ones: ours, and those that were converted."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from efficient_densenet import DenseNet, convert, explain
from efficient_densenet.convert import _warn_of_recording
from test_convert import library, monai, timm, torchvision

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]
SMALL = dict(growth_rate=4, block_config=(2, 3, 2), num_init_features=8, num_classes=5)


def own(**options):
    return DenseNet(**SMALL | dict(small_inputs=False, efficient=True) | options)


NETWORKS = {
    "own": own,
    "own, plain": lambda: own(efficient=False),
    "own, small inputs": lambda: own(small_inputs=True),
    "own, without bottleneck": lambda: own(bn_size=None),
    "own, without classifier": lambda: own(num_classes=0),
    "own, 1-d": lambda: own(spatial_dims=1),
    "own, 3-d": lambda: own(spatial_dims=3),
    "torchvision": lambda: convert(torchvision()),
    "timm": lambda: convert(timm()),
    "MONAI 3-d": lambda: convert(monai(3)),
}


def network_and_images(name, training):
    torch.manual_seed(0)
    model = NETWORKS[name]().double().train(training)
    dims = next(m for m in model.modules() if hasattr(m, "kernel_size")).weight.dim() - 2
    return model, torch.randn(2, 3, *[{1: 96, 2: 40, 3: 33}[dims]] * dims, dtype=torch.float64)


def traced(model, x):
    return torch.jit.trace(model, x, check_trace=False)


def scripted(model, x):
    return torch.jit.script(copy.deepcopy(model))  # reverts a converted one for good


def saved_and_loaded(model, x):
    buffer = io.BytesIO()
    torch.jit.save(scripted(model, x), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def fx_traced(model, x):
    return torch.fx.symbolic_trace(model)


def exported(model, x):
    return torch.export.export(model, (x,)).module()


def extracted(model, x):
    module = library("torchvision.models.feature_extraction")
    last = "classifier" if hasattr(model, "classifier") else "class_layers.out"
    extractor = module.create_feature_extractor(model, {last: "y", "features.transition1": "t"})
    return lambda x: extractor(x)["y"]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "record", [traced, scripted, saved_and_loaded, fx_traced, exported, extracted]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_recorded_network(name, record, training):
    if record is extracted and "without classifier" in name:
        pytest.skip("has no module whose result it is")
    model, x = network_and_images(name, training)
    before = copy.deepcopy(model.state_dict())
    recorded = record(model, x)
    model.load_state_dict(before)
    found = recorded(x)
    model.load_state_dict(before)  # fx shares the modules
    torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
@pytest.mark.parametrize("name", ["own", "own, without bottleneck", "torchvision"])
def test_onnx(name, dynamo):
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    model, x = network_and_images(name, training=False)
    buffer = io.BytesIO()
    torch.onnx.export(model.float(), (x.float(),), buffer, dynamo=dynamo)
    assert buffer.tell() > 0


@pytest.mark.parametrize("record", [traced, fx_traced, exported])
def test_a_warning_once_and_the_reason_in_explain(record):
    _warn_of_recording.cache_clear()
    model, x = network_and_images("torchvision", training=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorded = [record(model, x) for _ in range(2)]
    messages = [str(warning.message) for warning in caught]
    assert sum("a converted model is being traced" in message for message in messages) == 1
    if record is exported:
        return  # a GraphModule without any of the modules' names
    for function in (explain, convert):
        with pytest.raises(ValueError, match="was traced or scripted: convert the model before"):
            function(recorded[0])


# Parametrised weights


class Counted(nn.Module):
    """Doubles a weight, and counts."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, weight):
        self.count += 1
        return 2 * weight


PARAMETRISED = [
    "conv0", "norm0", "denseblock1.denselayer1.norm1", "denseblock1.denselayer2.conv1",
    "denseblock2.denselayer1.norm2", "denseblock2.denselayer3.conv2", "transition1.norm",
    "transition2.conv", "-1",
]  # fmt: skip


@pytest.mark.parametrize("make", [own, torchvision], ids=["own", "torchvision"])
@pytest.mark.parametrize("where", PARAMETRISED)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_parametrised_weight_is_computed_once(make, where, when):
    torch.manual_seed(0)
    model = make().double()
    is_library = make is torchvision
    if is_library and when == "after":
        convert(model)
    module = list(model.features.children())[-1]
    if where != "-1":
        module = model.features.get_submodule(where)
    counted = Counted()
    parametrize.register_parametrization(module, "weight", counted)
    counted.count = 0
    if is_library and when == "before":
        convert(model)
    explain(model)
    assert counted.count == 0
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    model(x).square().sum().backward()
    assert counted.count == 1


@pytest.mark.parametrize("where", ["denseblock1.denselayer2.conv1", "transition1.conv"])
def test_power_iterations_of_spectral_norm(where):
    torch.manual_seed(0)
    plain = torchvision().double()
    parametrizations.spectral_norm(plain.features.get_submodule(where))
    model, x = convert(copy.deepcopy(plain)), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x))
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


# Memory


LIVES = {
    "own": own,
    "own, features": lambda: own(recompute="features"),
    "own, without bottleneck": lambda: own(bn_size=None),
    "torchvision": lambda: convert(torchvision()),
    "timm": lambda: convert(timm()),
}


@pytest.mark.parametrize("name", LIVES)
def test_nothing_outlives_a_model(name):
    """Without the garbage collector: no cycle, and nothing that is remembered holds a tensor."""
    model, x = LIVES[name](), torch.randn(2, 3, 40, 40)
    gc.collect()
    gc.disable()
    try:
        y = model(x)
        model.eval()(x)
        block = model.train().features.denseblock1
        block.last = y  # attributes of modules are no one's but the user's
        model(x).sum().backward()
        del block.last, block
        tensors = [x, y, *model.parameters(), *model.buffers()]
        alive = [weakref.ref(kept) for kept in (*tensors, *model.modules())]
        del model, x, y, tensors
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()


def test_rounds_of_conversion_leave_nothing():
    def count():
        return sum(isinstance(kept, (torch.Tensor, nn.Module)) for kept in gc.get_objects())

    counts = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            model = convert(torchvision())
            model(torch.randn(2, 3, 40, 40)).sum().backward()
            del model
            counts.append(count())
    finally:
        gc.enable()
    assert counts[-1] <= counts[1]

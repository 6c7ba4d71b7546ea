"""What the libraries check of their own DenseNets, checked of converted ones.

timm's tests are those of its source distribution. The other distributions hold no tests, so the
checks are made here, for the functions by which users get these networks: shapes and values against
the unconverted network, gradients of images and of every parameter, TorchScript, fx, feature
extractors, class activation maps, and weights by the names of torchvision's files. None downloads.
"""

import copy
import io
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from efficient_densenet import convert, explain
from test_convert import assert_same, library

pytestmark = pytest.mark.usefixtures("one_thread")


def torchvision(name, **options):
    return getattr(library("torchvision.models"), name)(num_classes=50, **options)


def monai(name, dims, **options):
    networks = library("monai.networks.nets.densenet")
    return getattr(networks, name)(spatial_dims=dims, in_channels=2, out_channels=3, **options)


def torchxrayvision(classes, **options):
    return library("torchxrayvision.models").DenseNet(num_classes=classes, **options)


VOLUME = (1, 2, 32, 64, 32)
CASES = {  # how to make a network, the shape of its input, its number of classes
    **{
        name: (partial(torchvision, name), (1, 3, 64, 64), 50)
        for name in ("densenet121", "densenet161", "densenet169", "densenet201")
    },
    "densenet121 memory_efficient": (
        partial(torchvision, "densenet121", memory_efficient=True), (1, 3, 64, 64), 50
    ),
    **{
        f"MONAI {name} {dims}-d": (partial(monai, name, dims), (1, 2, *[32] * dims), 3)
        for name in ("DenseNet121", "Densenet169", "densenet201", "DenseNet264")
        for dims in (1, 2)
    },
    "MONAI DenseNet121 3-d": (partial(monai, "DenseNet121", 3), VOLUME, 3),
    **{
        f"torchxrayvision, {classes} classes": (
            partial(torchxrayvision, classes), (1, 1, 64, 64), classes
        )
        for classes in (1, 20)
    },
    "torchxrayvision, sigmoid": (
        partial(torchxrayvision, 18, apply_sigmoid=True), (1, 1, 64, 64), 18
    ),
}  # fmt: skip
SMALLEST = ["densenet121", "MONAI DenseNet121 2-d", "MONAI DenseNet121 3-d"]  # that can be scripted


def make(name, device="cpu"):
    """A network in evaluation mode, its converted copy, and an input."""
    build, shape, _ = CASES[name]
    torch.manual_seed(0)
    model = build().to(device).double().eval()
    return model, convert(model, inplace=False, strict=True), torch.randn(shape).to(device).double()


def gradients(model, x):
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    model(leaf).sum().backward()
    return {"x": leaf.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_evaluation_and_gradients(device, name):
    """In evaluation mode, as the libraries' tests; tests of training are in test_convert.py."""
    model, converted, x = make(name, device)
    y = converted(x)
    assert y.shape == (1, CASES[name][2])
    assert_same({"y": y}, {"y": model(x)})
    found = gradients(converted, x)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    assert_same(found, gradients(model, x))


@pytest.mark.parametrize("name", SMALLEST)
def test_scripts_are_saved_and_loaded(name):
    model, converted, x = make(name)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(converted), buffer)
    buffer.seek(0)
    assert_same({"y": torch.jit.load(buffer)(x)}, {"y": model(x)})


@pytest.mark.parametrize("name", ["densenet121", "MONAI DenseNet121 1-d"])
def test_symbolic_and_recorded_traces(name):
    model, converted, x = make(name)
    expected = {"y": model(x)}
    assert_same({"y": torch.fx.symbolic_trace(converted)(x)}, expected)
    assert_same({"y": torch.jit.trace(converted, x)(x)}, expected)


def test_feature_extractors_of_torchvision():
    extraction = library("torchvision.models.feature_extraction")
    model, converted, x = make("densenet121")
    for names in zip(*map(extraction.get_graph_node_names, (model, converted)), strict=True):
        assert names[0] == names[1]
    nodes = [
        "features.pool0",
        "features.denseblock2.denselayer3.conv1",
        "features.norm5",
        "flatten",
    ]
    found = []
    for each in (model.train(), converted.train()):
        x = torch.cat([x, -x])[:2]
        features = extraction.create_feature_extractor(each, nodes)
        values = features(x)
        sum(value.square().mean() for value in values.values()).backward()
        found.append(values | {name: p.grad for name, p in each.features.named_parameters()})
        found[-1]["scripted"] = torch.jit.script(features)(x)["flatten"]
    assert_same(*found)


@pytest.mark.parametrize(
    "layer, blocks",
    [("features.denseblock4", 4), ("class_layers.relu", 4),
     ("features.denseblock3.denselayer24.layers.conv1", 3)],
)  # fmt: skip
def test_class_activation_maps_of_monai(layer, blocks):
    """Hooks on a block, behind it, and on a convolution inside, whose block runs as MONAI's."""
    visualize = library("monai.visualize")
    model, converted, x = make("MONAI DenseNet121 2-d")
    maps = [visualize.GradCAM(nn_module=each, target_layers=layer) for each in (model, converted)]
    fused = [report for report in explain(converted, x) if report.path.startswith("matrix")]
    assert len(fused) == blocks
    assert_same({"map": maps[1](x)}, {"map": maps[0](x)})


@pytest.mark.parametrize("name", ["DenseNet121", "DenseNet169", "DenseNet201"])
def test_pretrained_networks_of_monai(name, monkeypatch):
    """They load torchvision's file, whose names of norms and convolutions have a dot inside."""
    torch.manual_seed(0)
    theirs = torchvision(name.lower())
    state = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", key): value
        for key, value in theirs.state_dict().items()
    }
    networks = library("monai.networks.nets.densenet")
    monkeypatch.setattr(networks, "load_state_dict_from_url", lambda *a, **k: dict(state))
    model = convert(getattr(networks, name)(2, 3, 1, pretrained=True), strict=True)
    x = torch.randn(1, 3, 64, 64).double()
    found = [convert(each).double().eval().features(x) for each in (model, theirs)]
    assert_same({"features": found[0]}, {"features": found[1]}, limit=0)


def test_features_of_torchxrayvision():
    model, converted, x = make("torchxrayvision, 20 classes")
    assert_same({"features": converted.features2(x)}, {"features": model.features2(x)})
    again = copy.deepcopy(converted)
    assert str(again) == str(model)
    assert_same({"y": again(x)}, {"y": model(x)})


@pytest.mark.skipif(
    "TIMM_SOURCE" not in os.environ,
    reason="needs TIMM_SOURCE, the source distribution of timm, unpacked: wheels have no tests",
)
def test_timms_own_tests():
    """Without those that download weights; of seven networks, each stem's and the deepest."""
    source = Path(os.environ["TIMM_SOURCE"])
    networks = "densenet121 or densenetblur121d or densenet264d"
    options = ["-q", "-W", "ignore", "-c", os.devnull, "--rootdir", source, "-p", "timm_converted"]
    options += ["-p", "no:cacheprovider", "-k", f"({networks}) and not pretrained"]
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", *options, source / "tests" / "test_models.py"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-1000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    converted, fused = map(int, re.search(r"converted=(\d+) fused=(\d+)", done.stdout).groups())
    assert passed >= 24 and converted >= passed and fused >= 4 * passed

"""The named networks, their options, and what else is done with a whole network."""

import copy
import pickle

import pytest
import torch
from torch import nn

import efficient_densenet
from block_reference import clear_model_of_kinks
from efficient_densenet import DenseNet, densenet121
from efficient_densenet.densenet import DenseBlock
from reference import assert_error_rule, compare, requires_cuda
from test_densenet import images, step

PARAMETERS = [
    ("densenet121", 1000, 7_978_856),
    ("densenet161", 1000, 28_681_000),
    ("densenet169", 1000, 14_149_480),
    ("densenet201", 1000, 20_013_928),
    ("densenet264", 1000, 33_337_704),
    ("densenet_bc_100_12", 10, 769_162),
    ("densenet_bc_100_12", 100, 800_032),
    ("densenet_bc_190_40", 10, 25_624_430),
    ("densenet_bc_190_40", 100, 25_821_620),
    ("densenet_bc_250_24", 10, 15_324_406),
    ("densenet_bc_250_24", 100, 15_480_556),
]
DEFAULT_CLASSES = {name: classes for name, classes, _ in reversed(PARAMETERS)}


def create(name, **options):
    return getattr(efficient_densenet, name)(**options)


@pytest.mark.parametrize("name, classes, parameters", PARAMETERS)
def test_number_of_parameters(name, classes, parameters):
    options = {} if classes == DEFAULT_CLASSES[name] else dict(num_classes=classes)
    with torch.device("meta"):
        model = create(name, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(m.efficient for m in model.modules() if isinstance(m, DenseBlock))


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_are_the_networks_of_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        ours, theirs = create(name), getattr(models, name)()

    def shapes(model):
        return {
            name.replace("norm5", "norm_final"): x.shape for name, x in model.named_parameters()
        }

    assert shapes(ours) == shapes(theirs)


def test_options():
    model = create("densenet_bc_100_12", efficient=False, in_chans=1, drop_rate=0.2, num_classes=4)
    assert not model.efficient and model.drop_rate == 0.2
    assert model(images(dtype=torch.float32, size=8)[:, :1]).shape == (4, 4)


@pytest.mark.parametrize(
    "options, memory_format",
    [
        ({}, torch.channels_last),
        (dict(spatial_dims=3), torch.channels_last_3d),
    ],
)
def test_memory_format(options, memory_format):
    with torch.device("meta"):
        plain = create("densenet121", **options)
        model = create("densenet121", memory_format=memory_format, **options)
    weights = [m.features.denseblock1.denselayer1.conv2.weight for m in (plain, model)]
    assert [w.is_contiguous(memory_format=memory_format) for w in weights] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, size", [("densenet121", 96), ("densenet_bc_100_12", 32)])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=requires_cuda)])
def test_named_networks_train(device, name, size, dtype):
    """As close to float64 as plain modules with the same weights."""
    options = dict(memory_format=torch.channels_last, num_classes=40)
    plain = create(name, efficient=False, **options).to(device, dtype)
    x = images(device, dtype, size=size, memory_format=torch.channels_last)
    # A hundred layers add up more rounding errors than the few of a block.
    clear_model_of_kinks(plain, x, 32 * torch.finfo(dtype).eps)
    ours = create(name, weights=plain.state_dict(), **options).to(device, dtype)
    exact = copy.deepcopy(plain).double()
    results = []
    for model, batch in ((ours, x), (plain, x), (exact, x.double())):
        y, gradients = step(model, batch)
        results.append({"y": y} | gradients | dict(model.named_buffers()))
    assert_error_rule(compare(*results), dtype)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            dict(memory_format=torch.channels_last_3d),
            ValueError,
            r"memory_format: expected one of \(torch.contiguous_format, torch.channels_last\), got "
            "torch.channels_last_3d",
        ),
        (dict(growth_rate=48), TypeError, "growth_rate"),
        (dict(colour=True), TypeError, "colour"),
        (dict(weights=nn.Linear(1, 1)), TypeError, "weights: expected a state dict, .* got Linear"),
        (dict(weights=3), TypeError, "weights: expected a state dict, .* got int"),
        (dict(weights=False), TypeError, "weights: expected a state dict, .* got bool"),
        (dict(weights=b"a"), TypeError, "weights: expected a state dict, .* got bytes"),
        (dict(weights={1: torch.ones(1)}), TypeError, "weights: expected names as keys, got 1"),
        (
            dict(weights=__file__),
            ValueError,
            "weights: .* got .*test_factories",
        ),
        (dict(weights={}), ValueError, "missing: features.conv0.weight"),
        (dict(weights=["a"]), TypeError, "weights: expected a state dict, .* got list"),
        (dict(weights={"a": 1}), TypeError, r"weights\['a'\]: expected a tensor, got int"),
        (dict(weights="DEFAULT"), FileNotFoundError, "weights: expected a file, got 'DEFAULT'"),
    ],
)
def test_wrong_options(options, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        create("densenet121", **options)


def test_meta_device_and_pickles(device):
    """A network without memory, then with it; copies of it run alike."""
    with torch.device("meta"):
        model = densenet121(num_classes=5)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    state = densenet121(num_classes=5).state_dict()
    model.to_empty(device=device).load_state_dict(state)
    x = torch.randn(1, 3, 32, 32, device=device)
    expected = model.eval()(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)


def test_grad_scaler(device):
    """Scaled losses, as in float16 under autocast: the same update."""
    model = DenseNet(4, (2, 2), efficient=True).to(device)
    plain = copy.deepcopy(model)
    x = torch.randn(4, 3, 16, 16, device=device)
    for each in (model, plain):
        scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        loss = each(x).square().mean()
        if each is plain:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, plain.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [torch.nn.utils.parametrizations.weight_norm], ids=["weight norm"])
def test_parametrized_convolutions(device, norm):
    """A block with one runs layer by layer, with the same results."""
    model = DenseNet(4, (2, 2), efficient=True).to(device).double()
    norm(model.features.denseblock1.denselayer2.conv1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device)
    block = model.features.denseblock1
    assert "Parametrized" in block.why_not_fused(torch.zeros(1, 24, 8, 8).to(x))
    results = []
    for efficient in (True, False):
        for module in model.modules():
            if hasattr(module, "efficient"):
                module.efficient = efficient
        model.zero_grad()
        model(x).square().mean().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)

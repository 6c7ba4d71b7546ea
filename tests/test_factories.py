"""The named networks, and weights by the names that others give them."""

import builtins
import copy
import pickle
import re

import pytest
import torch
from torch import nn

import efficient_densenet
from block_reference import clear_model_of_kinks
from efficient_densenet import DenseNet, densenet121, load_weights
from efficient_densenet.densenet import DenseBlock
from reference import assert_error_rule, compare, requires_cuda
from test_densenet import SMALL, images, step

SMALL = SMALL | dict(small_inputs=False)

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
        (dict(weights=["a"]), TypeError, "weights: expected a state dict, .* got list"),
        (dict(weights={"a": 1}), TypeError, r"weights\['a'\]: expected a tensor, got int"),
        (dict(weights="DEFAULT"), FileNotFoundError, "weights: expected a file, got 'DEFAULT'"),
    ],
)
def test_wrong_options(options, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        create("densenet121", **options)


# ------------------------------------------------------------------------------------------------
# Weights


def randomise(model):
    """Statistics, scales and biases of norms too, so that a mix-up shows."""
    for x in model.state_dict().values():
        if x.dim() == 1:
            x.uniform_(0.5, 1.5)
    return model.double().eval()


@pytest.fixture
def theirs():
    """torchvision's network, and timm's, are those of SMALL."""
    models = pytest.importorskip("torchvision.models")
    settings = {name: value for name, value in SMALL.items() if name != "small_inputs"}
    return randomise(models.DenseNet(**settings))


def dotted(state):
    """As in torchvision's files."""
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name): x
        for name, x in state.items()
        if "num_batches_tracked" not in name
    }


def of_seed(state):
    return {name.replace("norm5", "norm_final"): x for name, x in state.items()}


def prefixed(prefix):
    return lambda state: {prefix + name: x for name, x in of_seed(state).items()}


STYLES = {
    "torchvision": dict,
    "dotted": dotted,
    "seed": of_seed,
    "DataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "DataParallel, compiled": prefixed("module._orig_mod."),
}


def assert_same_network(ours, theirs):
    x = images(size=64)
    with torch.no_grad():
        y = ours.eval()(x.to(ours.classifier.weight.device)).cpu()
        torch.testing.assert_close(y, theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("efficient", [True, False])
def test_names_of_others(device, theirs, style, efficient):
    ours = DenseNet(**SMALL, efficient=efficient).to(device).double()
    assert any("norm.1" in name for name in dotted(theirs.state_dict()))
    load_weights(ours, STYLES[style](theirs.state_dict()))
    assert_same_network(ours, theirs)


@pytest.mark.parametrize("efficient", [True, False])
def test_timm(device, efficient):
    reason = "needs timm, whose names and network this compares"
    timm = pytest.importorskip("timm.models.densenet", reason=reason)
    theirs = randomise(timm.DenseNet(growth_rate=4, block_config=(3, 2, 2), num_classes=5))
    ours = DenseNet(**SMALL, efficient=efficient).to(device).double()
    load_weights(ours, theirs.state_dict())
    assert_same_network(ours, theirs)
    if not hasattr(theirs, "forward_intermediates"):
        pytest.skip("this timm has no forward_intermediates to compare with")
    x = images(device, size=64)
    maps = ours.forward_intermediates(x)[1]
    their_maps = theirs.to(device).forward_intermediates(x, intermediates_only=True)
    assert len(maps) == 4
    torch.testing.assert_close(maps, their_maps, rtol=1e-10, atol=1e-10)


def test_weights_are_cast_and_counts_kept(device, theirs):
    """Files of torchvision have float32 tensors and no batch counts."""
    ours = DenseNet(**SMALL).to(device, torch.bfloat16)
    ours(images(device, torch.bfloat16, size=64))
    load_weights(ours, dotted(theirs.state_dict()))
    norm = ours.features.norm_final
    assert torch.equal(norm.weight.cpu(), theirs.features.norm5.weight.bfloat16())
    assert norm.num_batches_tracked == 1


def test_files(device, theirs, tmp_path):
    """Of models on any device, into one on the CPU."""
    state = {name: x.to(device) for name, x in theirs.state_dict().items()}
    torch.save(state, tmp_path / "state.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    torch.save({"model": state, "arguments": {"seed": 0}}, tmp_path / "demo.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        ours = DenseNet(**SMALL).double()
        load_weights(ours, str(path))
        assert_same_network(ours, theirs)


def test_safetensors(device, theirs, tmp_path):
    """Whatever the file is called."""
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    for name in ("model.safetensors", "weights"):
        safetensors.save_file(theirs.state_dict(), tmp_path / name)
        ours = DenseNet(**SMALL).to(device).double()
        load_weights(ours, tmp_path / name)
        assert_same_network(ours, theirs)
    content = (tmp_path / "weights").read_bytes()
    (tmp_path / "damaged").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="weights: '.*damaged' is damaged"):
        load_weights(DenseNet(**SMALL), tmp_path / "damaged")


def test_safetensors_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    real_import = builtins.__import__

    def without_safetensors(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_safetensors)
    with pytest.raises(ImportError, match="weights: .* pip install safetensors"):
        load_weights(DenseNet(**SMALL), tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", ["text", "nothing", "model", "half"])
def test_unreadable_files(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "model":  # a pickle that would run code
        torch.save(DenseNet(**SMALL), path)
    elif content == "half":
        torch.save(DenseNet(**SMALL).state_dict(), path)
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.write_text("no weights" if content == "text" else "")
    with pytest.raises(
        ValueError, match="weights: expected a file of tensors alone, .*weights.pth"
    ):
        load_weights(DenseNet(**SMALL), path)


def test_a_file_of_something_else(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(TypeError, match="weights: expected a state dict, .* got list"):
        load_weights(DenseNet(**SMALL), tmp_path / "list.pth")


def test_members_of_torchvision(monkeypatch):
    """Downloaded as torchvision does it, from its address and with its checksum."""
    models = pytest.importorskip("torchvision.models")
    theirs = models.densenet121()
    downloads = []

    def download(url, **options):
        downloads.append((url, options))
        return dotted(theirs.state_dict())

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    member = models.DenseNet121_Weights.DEFAULT
    ours = create("densenet121", weights=member, progress=False)
    assert downloads == [(member.url, dict(progress=False, check_hash=True))]
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
    message = "weights: expected those of densenet169, got DenseNet121_Weights.IMAGENET1K_V1"
    with torch.device("meta"), pytest.raises(TypeError, match=message):
        create("densenet169", weights=member)
    message = "expected num_classes=10 of the model, got 1000"
    with pytest.raises(ValueError, match=message):
        create("densenet121", weights=member, num_classes=10)


def changed(state, **values):
    """With other tensors under some names; None takes the name out."""
    state = dict(state)
    for name, value in values.items():
        state[name.replace("__", ".")] = value
    return {name: value for name, value in state.items() if value is not None}


def without(part):
    return lambda state: {name: x for name, x in state.items() if part not in name}


WRONG = {
    "missing": (without("conv0"), ["missing: features.conv0.weight. Nothing was changed"]),
    "unexpected": (
        lambda state: changed(state, head__weight=torch.ones(1), head__bias=torch.ones(1)),
        ["unexpected: head.weight, head.bias. Nothing"],
    ),
    "shape": (
        lambda state: changed(state, features__conv0__weight=torch.ones(8, 1, 7, 7)),
        ["shapes: features.conv0.weight (expected [8, 3, 7, 7], got [8, 1, 7, 7]). Nothing"],
    ),
    "many": (
        lambda state: {f"net.{name}": x for name, x in state.items()},
        [
            "missing: features.conv0.weight, features.norm0.weight, features.norm0.bias, "
            "features.norm0.running_mean, features.norm0.running_var, and",
            "unexpected: net.features.conv0.weight, ",
        ],
    ),
    "another network": (
        lambda state: changed(without("classifier")(state), fc__weight=torch.ones(1)),
        ["missing: classifier.weight, classifier.bias\n  unexpected: fc.weight."],
    ),
    "other classes": (
        lambda state: changed(
            state, classifier__weight=torch.ones(9, 17), classifier__bias=torch.ones(9)
        ),
        [
            "weights: expected num_classes=5 of the model, got 9. Load them into a model with "
            "num_classes=9, then call its reset_classifier(5). Nothing was changed"
        ],
    ),
    "no classifier": (
        without("classifier"),
        ["num_classes=0, then call its reset_classifier(5). Nothing was changed"],
    ),
    "twice": (
        lambda state: state | {"features.norm5.bias": torch.ones(17)},
        ["expected one tensor for features.norm_final.bias, got another in features.norm5.bias"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_other_tensors(wrong):
    change, messages = WRONG[wrong]
    model = DenseNet(**SMALL)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    weights = change({name: x + 1 for name, x in before.items()})
    with pytest.raises(ValueError) as caught:
        load_weights(model, weights)
    for message in messages:
        assert message in str(caught.value)
    assert len(str(caught.value)) < 1000
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_the_way_to_other_classes():
    """As the message says."""
    source, model = DenseNet(**SMALL | dict(num_classes=9)), DenseNet(**SMALL)
    with pytest.raises(ValueError, match=r"num_classes=9, then call its reset_classifier\(5\)"):
        load_weights(model, source.state_dict())
    model = DenseNet(**SMALL | dict(num_classes=9))
    load_weights(model, source.state_dict())
    model.reset_classifier(5)
    assert model(images(dtype=torch.float32, size=64)).shape == (4, 5)
    load_weights(
        DenseNet(**SMALL | dict(num_classes=0)), without("classifier")(source.state_dict())
    )


def test_only_our_own_models():
    with pytest.raises(TypeError, match="model: expected a DenseNet of this package, got Linear"):
        load_weights(nn.Linear(1, 1), {})


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

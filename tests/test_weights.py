"""Weights by the names that others give them, and everything that is no such weights."""

import builtins
import pickle
import random
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import efficient_densenet
from efficient_densenet import DenseNet, load_weights
from test_densenet import SMALL, images

SMALL = SMALL | dict(small_inputs=False)


def create(name, **options):
    return getattr(efficient_densenet, name)(**options)


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


@pytest.fixture
def model():
    """With statistics and counts that are not those of a new model."""
    return randomise(DenseNet(**SMALL)).float()


def contents(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_unchanged(model, before):
    """Bit for bit, though a damaged file may have put NaN there."""
    for name, x in model.state_dict().items():
        a, b = (t.reshape(-1).view(torch.uint8) for t in (x, before[name]))
        assert torch.equal(a, b), name


def dotted(state):
    """As in torchvision's files."""
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name): x
        for name, x in state.items()
        if "num_batches_tracked" not in name
    }


def of_seed(state):
    return {name.replace("norm5", "norm_final"): x for name, x in state.items()}


def of_monai(state):
    """See test_monai for the real ones."""
    state = {re.sub(r"(denselayer\d+)\.", r"\1.layers.", name): x for name, x in state.items()}
    return {name.replace("classifier", "class_layers.out"): x for name, x in state.items()}


def prefixed(prefix):
    return lambda state: {prefix + name: x for name, x in of_seed(state).items()}


STYLES = {
    "torchvision": dict,
    "dotted": dotted,
    "seed": of_seed,
    "MONAI": of_monai,
    "MONAI, DataParallel": lambda state: prefixed("module.")(of_monai(state)),
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


@pytest.mark.parametrize("spatial_dims, channels", [(1, 3), (2, 1), (2, 3), (3, 1)])
def test_monai(spatial_dims, channels):
    nets = pytest.importorskip("monai.networks.nets", reason="needs MONAI, whose names these are")
    theirs = nets.DenseNet(
        spatial_dims, channels, 5, init_features=8, growth_rate=4, block_config=(3, 2, 2)
    )
    theirs = randomise(theirs)
    ours = DenseNet(**SMALL, spatial_dims=spatial_dims, in_chans=channels, efficient=True).double()
    load_weights(ours, theirs.state_dict())
    x = torch.randn(2, channels, *[32] * spatial_dims, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [(1, 3), (3, 1), (4, 3)])
def test_a_stem_for_other_numbers_of_channels(channels):
    """Refused with two ways out, and the second is exact for images of equal channels."""
    theirs, ours = (randomise(DenseNet(**SMALL, in_chans=n)) for n in channels)
    state, before = theirs.state_dict(), contents(ours)
    message = rf"expected in_chans={channels[1]} of the model, got {channels[0]}\. Load them into"
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(ours, of_monai(state))
    assert_unchanged(ours, before)
    recipe = re.search(r"replace this tensor W by (.*), which", str(caught.value))[1]
    stem = "features.conv0.weight"
    load_weights(ours, state | {stem: eval(recipe, {"W": state[stem]})})
    x = images(size=64)[:, :1]
    with torch.no_grad():
        y = ours(x.expand(-1, channels[1], -1, -1))
        expected = theirs(x.expand(-1, channels[0], -1, -1))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_other_channels_and_other_classes():
    theirs, ours = DenseNet(**SMALL | dict(num_classes=2), in_chans=1), DenseNet(**SMALL)
    with pytest.raises(ValueError) as caught:
        load_weights(ours, theirs.state_dict())
    for words in ("num_classes=5 of the model, got 2", "in_chans=3 of the model, got 1"):
        assert words in str(caught.value)


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


def write_text(path):
    path.write_text("no weights")


def write_index(path):
    """Text that reads as a pickle for a while."""
    path.write_text("features.conv0.weight\n")


def write_model(path):
    """A pickle that would run code."""
    torch.save(DenseNet(**SMALL), path)


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")


def write_half(path):
    torch.save(DenseNet(**SMALL).state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])


def write_unknown_dtype(path):
    header = b'{"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


UNREADABLE = {
    "text": (write_text, "is damaged or in another format"),
    "text with a key": (write_index, "is damaged or in another format"),
    "nothing": (Path.touch, "is empty"),
    "model": (write_model, "holds objects of other classes"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps(Path("a"), 2)), ""),
    "zip": (write_zip, "is a zip archive that is damaged, cut off or not written by torch.save"),
    "half": (write_half, "is a zip archive that is damaged"),
}


@pytest.mark.parametrize("content", UNREADABLE)
def test_unreadable_files(tmp_path, content):
    path = tmp_path / "weights.pth"
    write, reason = UNREADABLE[content]
    write(path)
    message = f"weights: expected a file of tensors alone, .*weights.pth', which .*{reason}"
    with pytest.raises(ValueError, match=message):
        load_weights(DenseNet(**SMALL), path)


@pytest.mark.parametrize("header", [b"{", b'{"a":', b"{" + 20 * b"\xff", b"{}", None])
def test_unreadable_safetensors(tmp_path, header):
    pytest.importorskip("safetensors.torch", reason="needs safetensors")
    path = tmp_path / "weights"
    if header is None:
        write_unknown_dtype(path)
    else:
        path.write_bytes(b"\xff" * 8 + header)
    with pytest.raises(ValueError, match="weights: '.*weights' is damaged"):
        load_weights(DenseNet(**SMALL), path)


def test_what_is_no_file(tmp_path):
    for path, words in ((tmp_path, "which is a folder"), ("", "folder"), ("a" * 5000, "long")):
        with pytest.raises(FileNotFoundError, match=f"weights: expected a file, got .*{words}"):
            load_weights(DenseNet(**SMALL), path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    """The superuser may read all, so that the system's answer is put in its place."""
    path = tmp_path / "weights.pth"
    path.touch()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="weights: '.*weights.pth' may not be read"):
        load_weights(DenseNet(**SMALL), path)


@pytest.mark.parametrize("content", [[1, 2], 3, "text", None, torch.ones(2)], ids=type)
def test_a_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    message = f"weights: expected a state dict, .* got {type(content).__name__} in '.*other.pth'"
    with pytest.raises(TypeError, match=message):
        load_weights(DenseNet(**SMALL), tmp_path / "other.pth")


def write_torch(state, path):
    torch.save(state, path)


def write_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_safetensors(state, path):
    save_file = pytest.importorskip("safetensors.torch", reason="needs safetensors").save_file
    save_file(state, path)


@pytest.mark.parametrize("write", [write_torch, write_legacy, write_safetensors])
@pytest.mark.parametrize("damage", ["cut off", "flipped"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files(model, tmp_path, write, damage):
    """Either refused as documented, or loaded, when only a value or what nobody reads is hit."""
    path, before, chance = tmp_path / "weights", contents(model), random.Random(0)
    write({name: x + 1 for name, x in before.items()}, path)
    whole = path.read_bytes()
    # The ends of a file hold its structure.
    near = [*range(40), *range(64, 1500, 60)]
    offsets = [*near, *(len(whole) - 1 - n for n in near), *chance.sample(range(len(whole)), 40)]
    refused = 0
    for offset in offsets:
        damaged = bytearray(whole[:offset] if damage == "cut off" else whole)
        if damage == "flipped":
            damaged[offset] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            load_weights(model, path)
        except (ValueError, TypeError) as error:
            refused += 1
            assert str(error).startswith(("weights: ", "weights["))
            assert_unchanged(model, before)
        else:
            assert damage == "flipped" or offset == len(whole), offset
            load_weights(model, before)
    assert refused > len(offsets) // 10


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
    before = contents(model)
    weights = change({name: x + 1 for name, x in before.items()})
    with pytest.raises(ValueError) as caught:
        load_weights(model, weights)
    for message in messages:
        assert message in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert_unchanged(model, before)


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


# ------------------------------------------------------------------------------------------------
# Tensors that cannot be copied, or not wholly


class Sub(torch.Tensor):
    """As MONAI's MetaTensor: a class of its own over ordinary memory."""


class Opaque(torch.Tensor):
    """As DTensor: only its class knows what it holds."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def fake(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


BAD_TENSORS = {
    "meta": (lambda x: x.to("meta"), "on the meta device"),
    "sparse": (lambda x: x.to_sparse(), "layout torch.sparse_coo"),
    "compressed": (lambda x: x.flatten(1).to_sparse_csr(), "layout torch.sparse_csr"),
    "nested": (lambda x: torch.nested.nested_tensor([x, x]), "a nested one"),
    "jagged": (lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged), "NestedTensor"),
    "mkldnn": (lambda x: x.to_mkldnn(), "layout torch._mkldnn"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "torch.qint8"),
    "complex": (lambda x: x.to(torch.complex64), "torch.complex64"),
    "integer": (lambda x: x.int(), "expected values of torch.float32 for .*, got torch.int32"),
    "bool": (lambda x: x > 0, "expected values of torch.float32 for .*, got torch.bool"),
    "opaque": (Opaque, "a Opaque"),
    "fake": (fake, "a FakeTensor"),
    "uninitialised": (lambda _: nn.UninitializedParameter(), "an uninitialised one"),
    "freed": (freed, "memory was freed"),
}


# An entry in the middle and the last one: whatever comes first would be copied by then.
@pytest.mark.parametrize("name", ["features.transition1.conv.weight", "classifier.weight"])
@pytest.mark.parametrize("kind", BAD_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_loaded(model, kind, name):
    change, message = BAD_TENSORS[kind]
    before = contents(model)
    weights = {key: x + 1 for key, x in before.items()}
    weights[name] = change(weights[name])
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, weights)
    assert name in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf")])
def test_counts_that_are_no_whole_numbers(model, value):
    before = contents(model)
    name = "features.norm_final.num_batches_tracked"
    with pytest.raises(ValueError, match=f"torch.int64 for {name}, got torch.float32"):
        load_weights(model, before | {name: torch.tensor(value)})
    assert_unchanged(model, before)
    load_weights(model, before | {name: torch.tensor(7.0)})
    assert model.features.norm_final.num_batches_tracked == 7


@pytest.mark.parametrize("key", [0, None, ("a",), b"a"], ids=type)
def test_keys_that_are_no_names(model, key):
    before = contents(model)
    with pytest.raises(TypeError, match=re.escape(f"expected names as keys, got {key!r}")):
        load_weights(model, {name: x + 1 for name, x in before.items()} | {key: torch.ones(1)})
    assert_unchanged(model, before)


GOOD_TENSORS = {
    "subclass": lambda x: x.as_subclass(Sub),
    "strided subclass": lambda x: x.repeat_interleave(2, 0)[::2].as_subclass(Sub),
    "parameter": lambda x: nn.Parameter(x) if x.is_floating_point() else x,
    "view": lambda x: torch.stack([x, x], -1)[..., 1],
    "expanded": lambda x: x.flatten()[:1].expand(x.numel()).view(x.shape),
    "wider": lambda x: x.double(),
    "negated": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("kind", GOOD_TENSORS)
def test_tensors_in_any_memory(model, kind):
    weights = {
        name: GOOD_TENSORS[kind](x + 1) if x.dim() else x for name, x in contents(model).items()
    }
    load_weights(model, OrderedDict(weights))
    for name, x in model.state_dict().items():
        assert type(x) is torch.Tensor
        assert torch.equal(x, weights[name].detach().as_subclass(torch.Tensor).to(x.dtype)), name


def test_a_model_that_takes_its_own_tensors_in_another_order(model):
    before, live = contents(model), model.state_dict()
    names = [f"features.denseblock1.denselayer{i}.norm2.weight" for i in (1, 2)]
    load_weights(model, live | {names[0]: live[names[1]], names[1]: live[names[0]]})
    after = model.state_dict()
    for a, b in (names, names[::-1]):
        assert torch.equal(after[a], before[b])


@pytest.mark.parametrize("kind", ["meta", "half on meta", "expanded", "inference"])
def test_models_that_cannot_be_overwritten(model, kind):
    norm, weights = model.features.norm_final, {n: x + 1 for n, x in contents(model).items()}
    if kind == "meta":
        model.to("meta")
    elif kind == "half on meta":
        norm.to("meta")
    elif kind == "expanded":
        norm.running_mean = torch.zeros(1).expand(norm.num_features)
    else:
        with torch.inference_mode():
            norm.running_mean = torch.zeros(norm.num_features)
    before = {name: x for name, x in contents(model).items() if not x.is_meta}
    advice = r"to_empty\(device=...\) first" if "meta" in kind else "norm_final.running_mean"
    with pytest.raises(ValueError, match=f"model: expected a dense tensor.*{advice}"):
        load_weights(model, weights)
    after = model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_damaged_download(model, monkeypatch):
    """An earlier download is read again without a look at its checksum."""
    models = pytest.importorskip("torchvision.models")

    def read(url, **options):
        raise OSError("cut off")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", read)
    message = "weights: DenseNet121_Weights.IMAGENET1K_V1 cannot be read: cut off"
    with pytest.raises(ValueError, match=message):
        load_weights(model, models.DenseNet121_Weights.DEFAULT)

"""Converted and own networks entered otherwise: replicas, shards, shared norms, wrong arguments."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficient_densenet import DenseBlock, DenseNet, convert, densenet121, explain, revert, runner
from test_convert import images, library, monai, timm, torchvision
from test_sync_batch_norm import on_processes

pytestmark = pytest.mark.usefixtures("one_thread")


def own():
    return DenseNet(4, (2, 3, 2), num_init_features=8, small_inputs=False, efficient=True)


NETWORKS = {
    "own": own,
    "torchvision": lambda: convert(torchvision()),
    "timm": lambda: convert(timm()),
    "MONAI": lambda: convert(monai()),
}
by_network = pytest.mark.parametrize("name", NETWORKS)


def build(name):
    torch.manual_seed(0)
    return NETWORKS[name]().double()


# Replicas


def replicate(model):
    """As torch.nn.parallel.replicate, on one device: plain tensors instead of parameters."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.view_as(parameter))
        for name, buffer in module._buffers.items():
            if buffer is None:
                replica._buffers[name] = None
            else:
                setattr(replica, name, buffer)
    return replicas[model]


@by_network
def test_replicas_run_fused_and_remember(name, specs, monkeypatch):
    model, x = build(name), images("torchvision")
    twin = copy.deepcopy(model)
    expected = twin(x)
    expected.sum().backward()
    specs.clear()
    lowered, lower = [], runner.lower
    monkeypatch.setattr(runner, "lower", lambda *args: lowered.append(args) or lower(*args))
    replicate(model)(x).sum().backward()
    assert len(specs) == len(lowered) == 3
    for ours, plain in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, plain.grad)
    for ours, plain in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, plain)
    for _ in range(2):  # replicas are made anew in every step
        replicate(model)(x)
    assert len(lowered) == 3


# Shards


def train_sharded(rank, world):
    """Differences from the same network whole, by what is sharded and when."""
    fully_shard = torch.distributed.fsdp.fully_shard
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    found = {}
    for when in ("before", "after"):
        for parts in ("blocks", "whole", "both"):
            torch.manual_seed(0)
            plain = torchvision()
            model, x = copy.deepcopy(plain), images("torchvision", dtype=torch.float32)
            if when == "after":
                convert(model)
            if parts != "whole":
                blocks = [m for m in model.features.children() if "Block" in type(m).__name__]
                try:
                    for module in blocks:
                        fully_shard(module, mesh=mesh)
                except ValueError as error:  # torch before 2.12, whoever wrote the block
                    assert "does not support containers" in str(error)
                    continue
            if parts != "blocks":
                fully_shard(model, mesh=mesh)
            if when == "before":
                convert(model, strict=True)
            y, expected = model(x), plain(x)
            y.sum().backward()
            expected.sum().backward()
            errors = [(y - expected).abs().max().item()]
            for ours, other in zip(model.parameters(), plain.parameters(), strict=True):
                grad = getattr(ours.grad, "full_tensor", lambda g=ours.grad: g)()
                errors.append(((grad - other.grad).norm() / (1 + other.grad.norm())).item())
            found[when, parts] = max(errors)
    return found


def test_fully_shard(tmp_path):
    pytest.importorskip("torch.distributed.fsdp")
    library("torchvision")
    (found,) = on_processes(1, train_sharded, tmp_path)
    assert max(found.values()) < 1e-4, found


# Shared and in place


@by_network
def test_a_norm_shared_by_two_layers(name):
    """Its statistics move twice per step, in the order of the layers."""
    model = build(name)
    plain = revert(copy.deepcopy(model))
    if name == "own":
        plain = DenseNet(4, (2, 3, 2), num_init_features=8, small_inputs=False).double()
        plain.load_state_dict(model.state_dict())
    x = images("torchvision")
    for each in (model, plain):
        layers = [getattr(layer, "layers", layer) for layer in each.features.denseblock2.children()]
        layers[1].norm2 = layers[2].norm2 = layers[0].norm2
        for _ in range(2):
            each(x).square().sum().backward()
    for (key, ours), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, msg=key)
    for (key, ours), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, msg=key)


BEHIND = {
    "ReLU": lambda block: nn.Sequential(block, nn.ReLU(inplace=True)),
    "identity": lambda block: nn.Sequential(block, nn.Identity(), nn.ReLU(inplace=True)),
    "dropout": lambda block: nn.Sequential(block, nn.Dropout(0.5), nn.Hardtanh(inplace=True)),
    "in place dropout": lambda block: nn.Sequential(block, nn.Dropout(0.5, inplace=True)),
    "nested": lambda block: nn.Sequential(
        block,
        nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU6(inplace=True), nn.Conv2d(16, 4, 1))),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("behind", BEHIND)
def test_in_place_modules_behind_a_block(behind, training):
    if training and "dropout" in behind:
        pytest.skip("masks depend on the memory format, which is channels-last behind a block")
    torch.manual_seed(0)
    plain = BEHIND[behind](torchvision().features.denseblock1).double().train(training)
    model = convert(copy.deepcopy(plain))
    results = []
    for each in (model, plain):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 2 * 8 * 36, dtype=torch.float64).view(2, 8, 6, 6)
        x.requires_grad_()
        each(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in each.parameters())])
    torch.testing.assert_close(*results)


def test_an_error_names_the_block_that_was_written_to():
    model = convert(torchvision())
    y = model.features.denseblock1(torch.randn(2, 8, 6, 6, requires_grad=True))
    with pytest.raises(RuntimeError, match="features.denseblock1"):
        F.relu(y, inplace=True).sum().backward()


# Wrong arguments


@pytest.mark.parametrize("function", [convert, explain, revert])
@pytest.mark.parametrize("wrong", [None, 3, "densenet121", torch.zeros(1)])
def test_models_of_other_types(function, wrong):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got "):
        function(wrong)


def test_our_own_networks_need_no_conversion():
    for model in (own(), own().features, DenseBlock(2, 8, 4), densenet121()):
        with pytest.raises(ValueError, match="need no conversion"):
            convert(model)


WRONG_DIMENSIONS = (ValueError, AssertionError)  # timm asserts


def first_block(name):
    return build(name).features.denseblock1


@by_network
def test_blocks_of_wrong_inputs(name):
    block = first_block(name)
    for wrong in (None, 3, "x"):
        for function in (block, block.why_not_fused, block.kernel_path):
            with pytest.raises(TypeError, match="x: expected a tensor, got "):
                function(wrong)
    before = copy.deepcopy(block.state_dict())
    wrong_channels = torch.randn(2, 7, 6, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="channels"):
        block(wrong_channels)
    assert "expected 8 channels" in block.why_not_fused(wrong_channels)
    unbatched = torch.randn(8, 6, 6, dtype=torch.float64)
    with pytest.raises(WRONG_DIMENSIONS, match="4"):
        block(unbatched)
    assert "expected 4 dimensions" in block.why_not_fused(unbatched)
    for key, value in block.state_dict().items():
        assert torch.equal(value, before[key]), key


@by_network
def test_an_unbatched_image(name):
    with pytest.raises(WRONG_DIMENSIONS, match="4D|2 spatial"):
        build(name)(torch.randn(3, 40, 40, dtype=torch.float64))


@by_network
def test_blocks_say_how_they_run(name):
    block, x = first_block(name), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert block.why_not_fused(x) is None
    assert block.kernel_path(x) == "matrix products: the features are on cpu"


def test_explain_says_what_conversion_would_save():
    model, x = torchvision(), images("torchvision", dtype=torch.float32)
    for report in explain(model, x):
        assert report.path.startswith("library: not converted; would run on matrix products")
        assert report.kept_bytes < report.plain_bytes
    assert {report.path for report in explain(model)} == {"library: not converted"}
    assert type(model.features) is nn.Sequential


# The conversion itself


STATES = {
    "meta": lambda m: m.to("meta"),
    "bfloat16": lambda m: m.bfloat16(),
    "frozen": lambda m: m.requires_grad_(False),
    "in inference": lambda m: m.eval(),
    "DataParallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
}


@pytest.mark.parametrize("state", STATES)
def test_conversion_moves_nothing(state):
    """Neither torch's random numbers nor any tensor of the model, wherever that is."""
    model = STATES[state](torchvision())
    before = {name: (t, t._version) for name, t in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    convert(model, strict=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert modes == [module.training for module in model.modules()]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and tensor._version == before[name][1], name
    assert {report.path for report in explain(model)} == {"fused"}

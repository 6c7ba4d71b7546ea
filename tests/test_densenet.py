"""The model: shape, names, and that `efficient=True` changes memory and nothing else."""

import copy
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

from efficient_densenet import DenseBlock, DenseNet, SharedStorage, runner
from reference import kept_bytes, relative_error, requires_cuda

SMALL = dict(growth_rate=4, block_config=(3, 2, 2), num_init_features=8, num_classes=5)


def pair(device="cpu", dtype=torch.float64, **changes):
    """The plain and the efficient network with the same weights."""
    settings = SMALL | changes
    plain = DenseNet(**settings).to(device, dtype)
    efficient = DenseNet(**settings, efficient=True).to(device, dtype)
    efficient.load_state_dict(plain.state_dict())
    return plain, efficient


def images(device="cpu", dtype=torch.float64, n=4, size=32, memory_format=torch.contiguous_format):
    x = torch.randn(n, 3, size, size, dtype=dtype, device=device)
    return x.contiguous(memory_format=memory_format)


def step(model, x, seed=0):
    """Output and gradients of one step of gradient descent; the model's parameters move."""
    torch.manual_seed(seed)
    model.zero_grad()
    y = model(x)
    y.logsumexp(1).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p -= 0.01 * p.grad
    return y.detach(), gradients


def assert_same_training(plain, efficient, steps=3, **image_settings):
    x = [images(**image_settings) for _ in range(steps)]
    for i in range(steps):
        (y, gradients), (y_efficient, gradients_efficient) = (
            step(model, x[i], seed=i) for model in (plain, efficient)
        )
        torch.testing.assert_close(y_efficient, y)
        for name in gradients:
            torch.testing.assert_close(gradients_efficient[name], gradients[name], msg=name)
    state = efficient.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, msg=name)


@pytest.mark.parametrize(
    "settings, parameters",
    [
        (dict(), 769_162),  # DenseNet-BC-100 k=12
        (dict(block_config=(6, 6, 6), growth_rate=36, num_init_features=72), 1_542_682),
        (
            dict(
                growth_rate=32,
                block_config=(6, 12, 24, 16),
                num_init_features=64,
                num_classes=1000,
                small_inputs=False,
            ),
            7_978_856,  # DenseNet-121
        ),
    ],
)
@pytest.mark.parametrize("efficient", [False, True])
def test_number_of_parameters(settings, parameters, efficient):
    model = DenseNet(**settings, efficient=efficient)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("efficient", [False, True])
def test_names(efficient):
    model = DenseNet(block_config=(1, 1), small_inputs=False, efficient=efficient)
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layer = ["norm1", "conv1", "norm2", "conv2"]
    expected = ["features.conv0.weight", *(f"features.norm0.{n}" for n in norms)]
    for block in (1, 2):
        for child in layer:
            names = norms if "norm" in child else ("weight",)
            expected += [f"features.denseblock{block}.denselayer1.{child}.{n}" for n in names]
        if block == 1:
            expected += [f"features.transition1.norm.{n}" for n in norms]
            expected += ["features.transition1.conv.weight"]
    expected += [*(f"features.norm_final.{n}" for n in norms)]
    expected += ["classifier.weight", "classifier.bias"]
    assert list(model.state_dict()) == expected


def test_initialisation():
    torch.manual_seed(0)
    plain = DenseNet()
    torch.manual_seed(0)
    efficient = DenseNet(efficient=True)
    for (name, a), b in zip(plain.named_parameters(), efficient.parameters(), strict=True):
        assert torch.equal(a, b), name
        if "conv" in name:
            fan_out = a.size(0) * a.size(2) * a.size(3)
            assert abs(a.std().item() / math.sqrt(2 / fan_out) - 1) < 0.1
    assert not plain.classifier.bias.any()


@pytest.mark.parametrize("training", [True, False])
def test_is_the_network_of_torchvision(device, training):
    """An independent implementation; only the last norm has another name there."""
    models = pytest.importorskip("torchvision.models")
    settings = dict(growth_rate=4, block_config=(3, 2, 2), num_init_features=8, num_classes=5)
    theirs = models.DenseNet(**settings).to(device, torch.float64)
    ours = DenseNet(**settings, small_inputs=False, efficient=True).to(device, torch.float64)
    state = {name.replace("norm5", "norm_final"): x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = images(device, size=64)
    torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


@pytest.mark.parametrize("recompute", ["bottleneck", "features"])
@pytest.mark.parametrize("size", [28, 30, 31, 33])
def test_sizes_and_recomputation(device, recompute, size):
    """Among them sizes that pooling does not divide."""
    plain, efficient = pair(device, recompute=recompute)
    assert_same_training(plain, efficient, steps=2, device=device, size=size)


def test_images_too_small_for_pooling(device):
    for model in pair(device):
        with pytest.raises(RuntimeError, match="Output size is too small"):
            model(images(device, size=2))


@pytest.mark.parametrize("drop_rate", [0, 0.3])
@pytest.mark.parametrize("small_inputs", [True, False])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_same_training(device, drop_rate, small_inputs, memory_format):
    plain, efficient = pair(device, drop_rate=drop_rate, small_inputs=small_inputs)
    for model in (plain, efficient):
        model.to(memory_format=memory_format)
    size = 32 if small_inputs else 64
    assert_same_training(plain, efficient, device=device, size=size, memory_format=memory_format)


def test_counts_batches_once(device):
    _, efficient = pair(device)
    for i in range(1, 3):
        step(efficient, images(device))
        counts = [b for name, b in efficient.named_buffers() if "num_batches" in name]
        assert counts and all(count == i for count in counts)


def test_same_evaluation(device):
    plain, efficient = pair(device)
    assert_same_training(plain, efficient, device=device)
    x = images(device)
    with torch.no_grad():
        torch.testing.assert_close(efficient.eval()(x), plain.eval()(x))
        assert all(block.settings().storage.nbytes == 0 for block in blocks(efficient.apply(clear)))
    (y, gradients), (y_efficient, gradients_efficient) = step(plain, x), step(efficient, x)
    torch.testing.assert_close(y_efficient, y)
    torch.testing.assert_close(gradients_efficient, gradients)


def input_of(block, x):
    """With the channels that a block reads."""
    channels = next(block.children()).conv1.in_channels
    return x[:, :1].expand(-1, channels, *x.shape[2:])


def blocks(model):
    return [m for m in model.modules() if isinstance(m, DenseBlock)]


def clear(module):
    if isinstance(module, DenseBlock):
        module.settings().storage.clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    """As close to float64 as the plain network under autocast."""
    exact, _ = pair(device)
    networks = [copy.deepcopy(exact).float(), DenseNet(**SMALL, efficient=True).to(device)]
    networks[1].load_state_dict(networks[0].state_dict())
    x = images(device)
    y_exact, gradients_exact = step(exact, x)

    def error(model):
        with torch.autocast(device, dtype):
            y = model(x.float())
        assert y.dtype == dtype
        y.float().logsumexp(1).sum().backward()
        name = "features.denseblock1.denselayer2.conv1.weight"
        gradient = dict(model.named_parameters())[name].grad
        return relative_error(y, y_exact), relative_error(gradient, gradients_exact[name])

    plain_errors, efficient_errors = (error(model) for model in networks)
    for plain_error, efficient_error in zip(plain_errors, efficient_errors, strict=True):
        assert efficient_error <= 2 * plain_error + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("recompute, kept_channels", [("bottleneck", 4 + 16), ("features", 4)])
def test_memory_is_linear_in_depth(device, recompute, kept_channels):
    x = images(device, torch.float32, n=8)

    def kept(layers, **settings):
        model = DenseNet(growth_rate=4, block_config=(layers,), **settings).to(device)
        return kept_bytes(lambda: model(x), model.parameters())

    efficient = [kept(n, efficient=True, recompute=recompute) for n in (8, 16, 24)]
    plain = [kept(n) for n in (8, 16, 24)]
    # Of a layer: its new features (4 channels) and, on request, its bottleneck (16). Numbers per
    # channel and packed weights are few.
    per_layer = kept_channels * x.numel() // 3 * 4
    for found in (efficient[1] - efficient[0], efficient[2] - efficient[1]):
        assert per_layer * 8 <= found <= per_layer * 8 * 1.1
    assert plain[2] - plain[1] > 1.3 * (plain[1] - plain[0])
    assert efficient[2] < plain[2] / 5


def kept_shapes(model, x):
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return shapes


def test_readers_and_stem_keep_no_activations(device):
    model = DenseNet(**SMALL, small_inputs=False, efficient=True).to(device)
    kept = kept_shapes(model, images(device, torch.float32, size=64))
    n, pooled = 4, 16  # images; pixels a side behind the stem
    assert kept.count((n, 8, 2 * pooled, 2 * pooled)) == 1  # conv0's result, and not norm0's
    assert kept.count((n, 8, pooled, pooled)) == 1  # which pixel won, a byte each
    for channels, next_channels in ((8 + 3 * 4, 10), (10 + 2 * 4, 9)):
        assert kept.count((n, channels, pooled, pooled)) == 1  # the block's features
        pooled //= 2
        assert kept.count((n, channels, pooled, pooled)) == 1  # what the transition convolves
        assert (n, next_channels, pooled, pooled) not in kept  # copied into the next block
    assert kept.count((n, 9 + 2 * 4, pooled, pooled)) == 1


def calls(model, x):
    """How often each operator of ours is called in a training step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x).sum().backward()
    names = [event.name for event in profile.events()]
    return {
        name: names.count(f"efficient_densenet::{name}")
        for name in ("dense_block_layers", "dense_block_layers_backward")
        + ("update_running_statistics",)
        + ("concat_bn_relu", "bn_relu_max_pool")
    }


def test_one_call_per_block(device):
    _, efficient = pair(device)
    assert calls(efficient, images(device)) == {
        "dense_block_layers": 3,
        "dense_block_layers_backward": 3,
        "update_running_statistics": 1,
        "concat_bn_relu": 0,
        "bn_relu_max_pool": 0,
    }


@requires_cuda
def test_peak_memory():
    def peak(efficient):
        model = DenseNet(efficient=efficient).cuda()
        x = images("cuda", torch.float32, n=32)
        model(x).sum().backward()  # gradients and libraries' workspaces stay
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(x).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(True) < peak(False) / 3


def test_compiled(device):
    """torch.compile runs the operator as it is and compiles what is around it."""
    plain, efficient = pair(device, block_config=(2, 2))
    compiled = torch.compile(efficient, backend="aot_eager")
    for i in range(2):
        x = images(device, size=16)
        y, gradients = step(plain, x, seed=i)
        y_compiled, gradients_compiled = step(compiled, x, seed=i)
        torch.testing.assert_close(y_compiled, y)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradients_compiled[f"_orig_mod.{name}"], gradient)


def test_save_on_cpu(device):
    plain, efficient = pair(device)
    x = images(device)
    y, gradients = step(plain, x)
    with torch.autograd.graph.save_on_cpu():
        y_efficient, gradients_efficient = step(efficient, x)
    torch.testing.assert_close(y_efficient, y)
    torch.testing.assert_close(gradients_efficient, gradients)


def test_gradient_accumulation(device):
    plain, efficient = pair(device)
    x = [images(device) for _ in range(2)]
    for model in (plain, efficient):
        for part in x:
            model(part).logsumexp(1).sum().backward()
    for a, b in zip(efficient.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def set_on_norms(model, **attributes):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, value in attributes.items():
                setattr(module, name, value)


VARIANTS = {
    "frozen statistics": lambda model: [
        m.eval() for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    ],
    "frozen affine": lambda model: [
        p.requires_grad_(False) for name, p in model.named_parameters() if "norm" in name
    ],
    "frozen stem and first block": lambda model: [
        p.requires_grad_(False)
        for name, p in model.named_parameters()
        if "conv0" in name or "denseblock1" in name
    ],
    "frozen convolutions": lambda model: [
        p.requires_grad_(False) for name, p in model.named_parameters() if "conv" in name
    ],
    "frozen transition": lambda model: model.features.transition1.conv.requires_grad_(False),
    "cumulative average": lambda model: set_on_norms(model, momentum=None),
    "no running statistics": lambda model: set_on_norms(
        model, track_running_stats=False, running_mean=None, running_var=None
    ),
    "untracked but present": lambda model: set_on_norms(model, track_running_stats=False),
    "other eps and momentum": lambda model: set_on_norms(model, eps=1e-2, momentum=0.7),
    "not affine": lambda model: set_on_norms(model, weight=None, bias=None),
    "one layer in evaluation": lambda model: model.features.denseblock1.denselayer2.eval(),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_norm_variants(device, variant):
    plain, efficient = pair(device)
    for model in (plain, efficient):
        VARIANTS[variant](model)
    assert_same_training(plain, efficient, device=device)
    x = images(device)
    with torch.no_grad():
        torch.testing.assert_close(efficient.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_changes_between_steps(device, variant):
    """A block remembers how it ran, as long as nothing has changed."""
    plain, efficient = pair(device)
    assert_same_training(plain, efficient, steps=1, device=device)
    for model in (plain, efficient):
        VARIANTS[variant](model)
    assert_same_training(plain, efficient, steps=2, device=device)


@pytest.mark.parametrize("hooked", [False, True])
def test_blocks_are_lowered_once(device, hooked, monkeypatch):
    """Also where a hook on a reader makes the block run alone."""
    _, efficient = pair(device)
    if hooked:
        efficient.features.transition1.register_forward_hook(lambda module, x, y: None)
    made, lower = [], runner.lower
    monkeypatch.setattr(runner, "lower", lambda *args: made.append(args) or lower(*args))
    for _ in range(3):
        step(efficient, images(device))
    assert len(made) == 3 + hooked


def test_other_weights_dtypes_and_formats_between_steps(device):
    plain, efficient = pair(device)
    assert_same_training(plain, efficient, steps=1, device=device)
    for model in (plain, efficient):
        layer = model.features.denseblock1.denselayer2
        layer.conv1.weight = nn.Parameter(2 * layer.conv1.weight.detach())
        layer.norm2.running_mean = torch.ones_like(layer.norm2.running_mean)
    assert_same_training(plain, efficient, steps=1, device=device)
    for model in (plain, efficient):
        model.to(memory_format=torch.channels_last)
    assert_same_training(plain, efficient, steps=1, device=device)
    for model in (plain, efficient):
        model.float()
    x = images(device, torch.float32)
    torch.testing.assert_close(efficient(x), plain(x))
    for model in (plain, efficient):
        model.double()
    efficient.load_state_dict(plain.state_dict())  # what float32 has rounded
    assert_same_training(plain, efficient, steps=1, device=device)


def test_copies(device):
    _, efficient = pair(device)
    efficient.features.denseblock1.denselayer1.relu2 = nn.LeakyReLU(0.1)
    # That block has a storage, the other blocks have descriptions.
    step(efficient, images(device))
    assert blocks(efficient)[0].settings().storage.nbytes > 0
    buffer = io.BytesIO()
    torch.save(efficient, buffer)
    assert buffer.tell() < 2 * sum(t.nbytes for t in efficient.state_dict().values()) + 200_000
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    copied = copy.deepcopy(efficient)
    x = images(device)
    y, gradients = step(efficient, x)
    for other in (copied, loaded):
        assert blocks(other)[0].settings().storage.nbytes == 0
        assert isinstance(blocks(other)[0].settings().storage, SharedStorage)
        y_other, other_gradients = step(other, x)
        torch.testing.assert_close(y_other, y)
        torch.testing.assert_close(other_gradients, gradients)


def test_data_parallel(device):
    """On all GPUs there are, be it one; on the CPU the wrapper calls the module."""
    if device == "cpu" and torch.cuda.device_count() > 1:
        pytest.skip("nn.DataParallel wants the module on the first of several GPUs")
    plain, efficient = pair(device)
    n = 4 * max(1, torch.cuda.device_count())
    x = images(device, n=n)
    plain, efficient = nn.DataParallel(plain), nn.DataParallel(efficient)
    y, gradients = step(plain, x)
    y_efficient, gradients_efficient = step(efficient, x)
    torch.testing.assert_close(y_efficient, y)
    torch.testing.assert_close(gradients_efficient, gradients)


DISTRIBUTED = """
import os, sys
import torch, torch.distributed as dist
from test_densenet import images, nn, pair, step

device, store = sys.argv[1:]
torch.backends.cudnn.allow_tf32 = False
dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
plain, efficient = pair(device)
x = images(device)
y, gradients = step(plain, x)
y_wrapped, wrapped = step(nn.parallel.DistributedDataParallel(efficient), x)
torch.testing.assert_close(y_wrapped, y)
torch.testing.assert_close({f"module.{name}": g for name, g in gradients.items()}, wrapped)
print("same", flush=True)
os._exit(0)  # torch's teardown of gloo can wait for the interpreter's lock for ever
"""


def test_distributed_data_parallel(device, tmp_path):
    command = [sys.executable, "-c", DISTRIBUTED, device, str(tmp_path / "store")]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "same\n", done.stderr


def test_trains(device):
    torch.manual_seed(0)
    model = DenseNet(**SMALL, efficient=True).to(device)
    x = images(device, torch.float32, n=16, size=16)
    target = torch.arange(16, device=device) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 1.5


# ------------------------------------------------------------------------------------------------
# Options


def assert_same_step(plain, efficient, x):
    """Result, gradients and statistics, in training and then in evaluation."""
    (y, gradients), (y_efficient, gradients_efficient) = step(plain, x), step(efficient, x)
    torch.testing.assert_close(y_efficient, y)
    torch.testing.assert_close(gradients_efficient, gradients)
    torch.testing.assert_close(dict(efficient.state_dict()), dict(plain.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(efficient.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("settings", [{}, dict(small_inputs=False), dict(drop_rate=0.3)], ids=str)
@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_spatial_dims_and_no_bottleneck(device, spatial_dims, bn_size, settings):
    plain, efficient = pair(device, spatial_dims=spatial_dims, bn_size=bn_size, **settings)
    size = 35 if "small_inputs" in settings else 9
    x = torch.randn(2, 3, *[size] * spatial_dims, dtype=torch.float64, device=device)
    assert_same_step(plain, efficient, x)


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_one_call_per_block_in_all_dimensions(device, spatial_dims):
    """Transitions and the last norm included: nothing is left for concat_bn_relu."""
    _, efficient = pair(device, spatial_dims=spatial_dims)
    x = torch.randn(2, 3, *[8] * spatial_dims, dtype=torch.float64, device=device)
    found = calls(efficient, x)
    assert found["dense_block_layers"] == 3 and found["concat_bn_relu"] == 0


def test_no_bottleneck():
    """The network with k=12 and L=40 of the paper's table 2."""
    settings = dict(bn_size=None, compression=1, num_init_features=16, block_config=(12, 12, 12))
    with torch.device("meta"):
        model = DenseNet(**settings)
    assert sum(p.numel() for p in model.parameters()) == 1_019_722
    names = [name for name, _ in model.features.denseblock1.denselayer1.named_children()]
    assert names == ["norm1", "relu1", "conv2"]
    block = DenseBlock(2, 8, 4, bn_size=None)
    x = torch.randn(2, 8, 5, 5)
    assert block.why_not_fused(x) == "denselayer1: no bottleneck (bn_size=None)"
    assert block.kernel_path(x) == "layer by layer: denselayer1: no bottleneck (bn_size=None)"


def test_memory_without_bottleneck_is_linear_in_depth(device):
    x = images(device, torch.float32, size=16)

    def kept(layers, efficient):
        model = DenseNet(4, (layers,), bn_size=None, efficient=efficient).to(device)
        return kept_bytes(lambda: model(x), model.parameters())

    efficient, plain = [[kept(n, e) for n in (8, 16, 24)] for e in (True, False)]
    assert efficient[2] - efficient[1] < 1.1 * (efficient[1] - efficient[0])
    assert plain[2] - plain[1] > 1.3 * (plain[1] - plain[0])


@pytest.mark.parametrize("small_inputs, size", [(True, 8), (False, 64)])
def test_in_chans(device, small_inputs, size):
    plain, efficient = pair(device, in_chans=1, small_inputs=small_inputs)
    assert efficient.features.conv0.in_channels == 1
    assert_same_step(plain, efficient, images(device, size=size)[:, :1])


MAPS = {  # channels and sizes
    False: [(8, 32), (20, 16), (18, 8), (17, 4)],  # images of 64
    True: [(20, 16), (18, 8), (17, 4)],  # images of 16
}


@pytest.mark.parametrize("settings", [{}, dict(bn_size=None), dict(drop_rate=0.3)], ids=str)
@pytest.mark.parametrize("small_inputs", [True, False])
def test_forward_intermediates(device, small_inputs, settings):
    """The same maps, and gradients through all of them, and the network's own last one."""
    found = []
    for model in pair(device, small_inputs=small_inputs, **settings):
        torch.manual_seed(1)
        x = images(device, n=2, size=16 if small_inputs else 64)
        torch.manual_seed(2)
        last, maps = model.forward_intermediates(x)
        assert maps[-1] is last
        assert [tuple(m.shape) for m in maps] == [(2, c, s, s) for c, s in MAPS[small_inputs]]
        torch.stack([m.square().mean() for m in maps]).sum().backward()
        gradients = {n: p.grad for n, p in model.features.named_parameters()}
        found.append((maps, gradients, dict(model.state_dict())))
        model.eval()
        last, _ = model.forward_intermediates(x)
        torch.testing.assert_close(model.forward_features(x), last)
        pooled = last.mean((2, 3))
        torch.testing.assert_close(model(x), model.classifier(pooled))
    torch.testing.assert_close(found[1], found[0])


def test_reset_classifier(device):
    plain, model = pair(device)
    model.eval().reset_classifier(7)
    assert not model.classifier.training and not model.classifier.bias.any()
    x = images(device, size=8)
    assert model(x).shape == (4, 7) and model(x).dtype == torch.float64
    model.reset_classifier(0)
    assert not list(model.classifier.parameters())
    torch.testing.assert_close(model(x), model.forward_features(x).mean((2, 3)))
    assert model(x).shape == (4, model.num_features)
    model.reset_classifier(5)
    model.load_state_dict(plain.state_dict())
    assert list(DenseNet(**SMALL | dict(num_classes=0)).state_dict()) == [
        name for name in plain.state_dict() if "classifier" not in name
    ]


@pytest.mark.parametrize(
    "num_classes, error, message",
    [
        (-1, ValueError, "num_classes: expected 0 or more, got -1"),
        (2.0, TypeError, "num_classes: expected an integer, got 2.0"),
    ],
)
def test_wrong_number_of_classes(num_classes, error, message):
    with pytest.raises(error, match=message):
        DenseNet(num_classes=num_classes)
    model = DenseNet(**SMALL)
    classifier = model.classifier
    with pytest.raises(error, match=message):
        model.reset_classifier(num_classes)
    assert model.classifier is classifier


@pytest.mark.parametrize("efficient", [True, False])
@pytest.mark.parametrize("method", ["forward", "forward_features", "forward_intermediates"])
def test_wrong_images(efficient, method):
    model = DenseNet(**SMALL, efficient=efficient)
    message = r"x: expected \[N, C, \*spatial\] with 2 spatial dimensions, got shape \[3, 8, 8\]"
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(torch.ones(3, 8, 8))
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        getattr(model, method)([1])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(growth_rate=1.5), "growth_rate: expected a positive integer, got 1.5"),
        (dict(bn_size="4"), "bn_size: expected a positive integer, got '4'"),
        (dict(in_chans=True), "in_chans: expected a positive integer, got True"),
        (dict(block_config=3), "block_config: expected at least one positive integer, got 3"),
        (dict(block_config=(2, "3")), "block_config: expected at least one positive integer"),
        (dict(compression=None), "compression: expected a number, got None"),
        (dict(drop_rate="0.1"), "drop_rate: expected a number, got '0.1'"),
    ],
)
def test_arguments_of_wrong_types(wrong, message):
    with pytest.raises(TypeError, match=message):
        DenseNet(**wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(compression=0), r"compression: expected a number in \(0, 1\], got 0"),
        (dict(compression=1e-3), "compression: expected to keep .* 216 channels of transition1"),
        (dict(bn_size=0), "bn_size: expected a positive integer, got 0"),
        (dict(in_chans=0), "in_chans: expected a positive integer, got 0"),
        (dict(spatial_dims=4), r"spatial_dims: expected one of \(1, 2, 3\), got 4"),
        (dict(compression=1.5), r"compression: expected a number in \(0, 1\], got 1.5"),
        (dict(drop_rate=1), r"drop_rate: expected a number in \[0, 1\), got 1"),
        (dict(growth_rate=0), "growth_rate: expected a positive integer, got 0"),
        (dict(block_config=()), r"block_config: expected at least one positive integer, got \(\)"),
        (dict(block_config=(3, 0)), "block_config: expected at least one positive integer"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        DenseNet(**wrong)

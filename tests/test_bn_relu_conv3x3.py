"""The kernels of 3x3 convolutions: each against float64, edges, and where a block uses them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from block_reference import block_errors, make_block_problem, run
from efficient_densenet import DenseBlock, DenseNet, dense_block
from reference import assert_error_ratio, relative_error
from tensor_cores import (
    BN_EPS,
    EPS,
    by_dtype,
    kernel_path,
    kernels_of,
    requires_tensor_cores,
    train,
)

OPS = torch.ops.efficient_densenet
KERNELS = "bn_relu_conv3x3_kernel", "bn_relu_conv3x3_grad_input_kernel"
KERNELS += ("bn_relu_conv3x3_grad_weight_kernel",)


@dataclasses.dataclass
class Problem:
    """One layer's norm2 and conv2, and what comes back to the k new features."""

    images: tuple[int, int, int]  # N, H, W
    z: Tensor  # [M, B]
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    conv2: Tensor  # [k, 3, 3, B]
    y: Tensor  # [M, k], a window of a wider matrix: as if it were the result
    y_mean: Tensor
    grad_features: Tensor  # [M, k], a window, too
    correction: Tensor  # S1, S2

    def normalised(self) -> Tensor:
        """relu's argument in float64."""
        xhat = (self.z.double() - self.mean) / (self.var + BN_EPS).sqrt()
        weight = 1 if self.weight is None else self.weight.double()
        return xhat * weight + (0 if self.bias is None else self.bias.double())

    def norm(self):
        return self.mean, self.var, self.weight, self.bias, BN_EPS

    def as_images(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(0, self.images).movedim(3, 1)


def as_rows(images: Tensor) -> Tensor:
    return images.movedim(1, 3).flatten(0, 2)


def make_problem(
    images, channels, outputs, dtype, *, padding=0, affine=True, mean=0.5, std=2.0, seed=0
) -> Problem:
    """Random operands without kinks; `padding` columns follow those of y and G."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def window(values, dtype):
        buffer = torch.full((len(values), outputs + padding), torch.nan, dtype=dtype, device="cuda")
        buffer[:, :outputs] = values.cuda().to(dtype)
        return buffer[:, :outputs]

    rows = images[0] * images[1] * images[2]
    means, stds = mean + 0.3 * std * randn(channels), std * (1 + 0.2 * randn(channels).abs())
    y = 0.5 + randn(rows, outputs)
    problem = Problem(
        images,
        (means + stds * randn(rows, channels)).cuda().to(dtype),
        means.cuda(),
        stds.square().cuda(),
        (1 + 0.3 * randn(channels)).float().cuda() if affine else None,
        (0.3 * randn(channels)).float().cuda() if affine else None,
        (randn(outputs, 3, 3, channels) / (9 * channels) ** 0.5).to(dtype).cuda(),
        window(y, dtype),
        y.mean(0).cuda(),
        window(randn(rows, outputs), torch.float32),
        (randn(2, outputs) * rows**0.5).cuda(),
    )
    near = problem.normalised().abs() < 1e-3
    problem.z[near] = (problem.z.double() + 0.5 * stds.cuda())[near].to(dtype)
    assert (problem.normalised().abs() > 1e-5).all()
    return problem


def forward(p: Problem, moments=True):
    """y and its moments, in memory that held NaN."""
    rows, outputs = p.y.shape
    buffer = torch.full((rows, p.y.stride(0)), torch.nan, dtype=p.z.dtype, device="cuda")
    y = buffer[:, :outputs]
    stats = torch.full((2, outputs), torch.nan, dtype=torch.float64, device="cuda")
    OPS.bn_relu_conv3x3(p.z, *p.norm(), p.conv2, *p.images[1:], y, stats if moments else None)
    assert buffer[:, outputs:].isnan().all()  # others' columns
    return {"y": y, "mean": stats[0], "var": stats[1]} if moments else {"y": y}


def backward(p: Problem, batch_statistics=True, grad_conv2=True):
    rows, channels = p.z.shape
    grad_a = torch.full((rows, channels), torch.nan, dtype=p.z.dtype, device="cuda")
    affine, coefficients = torch.full((7, channels), torch.nan, device="cuda").split((2, 5))
    conv2 = torch.full(p.conv2.shape, torch.nan, dtype=p.z.dtype, device="cuda")
    OPS.bn_relu_conv3x3_backward(
        p.grad_features, p.y, p.y_mean, p.correction, p.z, *p.norm(), p.conv2, *p.images[1:],
        grad_a, affine, coefficients, batch_statistics, conv2 if grad_conv2 else None,
    )  # fmt: skip
    mean, scale, _, offset, slope = coefficients.double()
    grad_z = scale * grad_a.double() - offset - (p.z.double() - mean) * slope
    found = {"grad_a": grad_a, "grad_z": grad_z.to(p.z.dtype)}
    found |= {"grad_weight": affine[0], "grad_bias": affine[1]}
    return found | ({"grad_conv2": conv2} if grad_conv2 else {})


def reference(p: Problem, dtype, batch_statistics=True) -> dict[str, Tensor]:
    """All of it with torch's operators: convolutions in `dtype`, the rest in float64."""
    argument, rows = p.normalised(), len(p.z)
    a = argument.clamp_min(0).to(dtype)
    conv2 = p.conv2.to(dtype).movedim(3, 1)
    y = as_rows(F.conv2d(p.as_images(a), conv2, padding=1)).double()
    s1, s2 = p.correction
    g = p.grad_features.double() - (s1 + (p.y.double() - p.y_mean) * s2) / rows
    grad_a, grad_conv2, _ = torch.ops.aten.convolution_backward(
        p.as_images(g.to(dtype)), p.as_images(a), conv2, None, (1, 1), (1, 1), (1, 1), False,
        (0, 0), 1, (True, True, False),
    )  # fmt: skip
    dz = as_rows(grad_a).double() * (argument > 0)
    inverse_std = 1 / (p.var + BN_EPS).sqrt()
    xhat = (p.z.double() - p.mean) * inverse_std
    scale = inverse_std * (1 if p.weight is None else p.weight.double())
    grad_bias, grad_weight = dz.sum(0), (dz * xhat).sum(0)
    returned = float(batch_statistics) * (grad_bias + xhat * grad_weight) / rows
    return {
        "y": y,
        "mean": y.mean(0),
        "var": y.var(0, correction=0),
        "grad_a": dz,
        "grad_z": (scale * (dz - returned)).to(dtype).double(),
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
        "grad_conv2": grad_conv2.movedim(1, 3).double(),
    }


def kernel_errors(p: Problem, **options) -> dict[str, tuple[float, float]]:
    ours = forward(p) | backward(p, **options)
    exact, torchs = (reference(p, t, **options) for t in (torch.float64, p.z.dtype))
    return {
        name: (relative_error(value, exact[name]), relative_error(torchs[name], exact[name]))
        for name, value in ours.items()
        # Of one pixel, the variance is 0.
        if not (name == "var" and len(p.z) == 1)
    }


def assert_kernels_match(p: Problem, **options) -> None:
    """The error rule; float32 in TF32, whose eps is that of its operands."""
    for name, (ours, torchs) in kernel_errors(p, **options).items():
        limit = 2 * torchs + 4 * EPS[p.z.dtype]
        assert ours <= limit, f"{name}: error {ours:.3g}, plain torch {torchs:.3g}"


SHAPES = [  # (images, height, width), B, k
    ((1, 1, 1), 16, 4),
    ((3, 1, 1), 48, 12),
    ((5, 2, 2), 24, 7),
    ((4, 3, 3), 48, 12),
    ((2, 1, 9), 40, 16),
    ((2, 9, 1), 33, 17),
    ((3, 7, 7), 128, 32),
    ((2, 13, 5), 100, 25),
    ((2, 8, 11), 192, 48),
    ((1, 17, 31), 160, 40),
    ((2, 6, 10), 256, 64),
    ((1, 40, 33), 65, 33),
    ((2, 5, 121), 64, 16),
    ((9, 32, 32), 48, 12),
]


@requires_tensor_cores
@pytest.mark.parametrize("padding", [0, 3, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, (*s[0], *s[1:]))))
@by_dtype
def test_kernels(dtype, shape, padding, tf32):
    assert_kernels_match(make_problem(*shape, dtype, padding=padding))


@requires_tensor_cores
@pytest.mark.parametrize("shape", [*SHAPES, ((3, 56, 56), 128, 32)], ids=str)
@by_dtype
def test_little_shared_memory(dtype, shape, tf32, little_shared_memory):
    assert_kernels_match(make_problem(*shape, dtype))


@requires_tensor_cores
@pytest.mark.parametrize("seed", range(40))
@by_dtype
def test_random_shapes(dtype, seed, tf32):
    generator = torch.Generator().manual_seed(seed)
    limits = ((1, 5), (1, 25), (1, 25), (1, 257), (1, 65), (0, 9))
    n, h, w, channels, outputs, padding = (
        int(torch.randint(*limit, (), generator=generator)) for limit in limits
    )
    p = make_problem((n, h, w), channels, outputs, dtype, padding=padding, seed=seed)
    assert_kernels_match(p, batch_statistics=seed % 3 != 0)


@requires_tensor_cores
@pytest.mark.parametrize("images", [(9, 56, 56), (40, 32, 32), (15, 112, 112)], ids=str)
@by_dtype
def test_many_rows(dtype, images, tf32):
    """More tiles of rows than blocks, at each number of rows per warp."""
    assert_kernels_match(make_problem(images, 48, 12, dtype))
    assert_kernels_match(make_problem(images, 128, 32, dtype, padding=8))


@requires_tensor_cores
@by_dtype
def test_error_ratio(dtype, tf32):
    """Over seeds, as exact as torch's own convolutions."""
    assert_error_ratio(
        [kernel_errors(make_problem((4, 20, 20), 64, 32, dtype, seed=seed)) for seed in range(20)]
    )


@requires_tensor_cores
@by_dtype
def test_no_affine_and_wanted_gradients(dtype, tf32):
    p = make_problem((3, 10, 10), 48, 12, dtype, affine=False)
    assert_kernels_match(p)
    everything = backward(p)
    without = backward(p, grad_conv2=False)
    assert all(torch.equal(without[name], everything[name]) for name in without)
    assert torch.equal(forward(p, moments=False)["y"], forward(p)["y"])


@requires_tensor_cores
@by_dtype
def test_moments_of_a_large_mean(dtype, tf32):
    """The variance of y is its own, not the rest of two large numbers."""
    p = make_problem((5, 30, 30), 64, 12, dtype)
    p.conv2.copy_(p.conv2.abs() * 50 / EPS[dtype] ** -0.5)
    p.bias.fill_(30.0)
    found = forward(p)
    y = found["y"].double()
    assert relative_error(found["mean"], y.mean(0)) < 1e-6
    assert relative_error(found["var"], y.var(0, correction=0)) < 1e-4


@requires_tensor_cores
@pytest.mark.parametrize("shape", [((5, 32, 32), 48, 12), ((3, 14, 14), 128, 32)], ids=str)
@by_dtype
def test_same_bits(dtype, shape, tf32):
    p = make_problem(*shape, dtype)
    first = forward(p) | backward(p)
    for _ in range(3):
        again = forward(p) | backward(p)
        assert all(torch.equal(again[name], first[name]) for name in first)


@requires_tensor_cores
@by_dtype
def test_nan_reaches_its_neighbours_only(dtype, tf32):
    """Not the pixels that are near in memory, on the next line or in the next image."""
    p = make_problem((2, 4, 5), 48, 12, dtype)
    p.z[19, 3] = torch.nan  # the last pixel of the first image
    y = forward(p, moments=False)["y"].isnan().any(1)
    assert y.nonzero().flatten().tolist() == [13, 14, 18, 19]


@requires_tensor_cores
def test_offsets_beyond_32_bits():
    """M times the row strides passes 2^31; operands are the last images of large memory."""
    rows, stride, images = (2**31 // 2048 // 400 + 3) * 400, 2048, (2, 20, 20)
    p = make_problem(images, 40, 12, torch.bfloat16, padding=stride - 12)
    expected = forward(p, moments=False)["y"]
    count = images[0] * 400
    z = torch.zeros(rows, 40, dtype=torch.bfloat16, device="cuda")
    z[-count:] = p.z
    y = torch.empty(rows, stride, dtype=torch.bfloat16, device="cuda")
    OPS.bn_relu_conv3x3(z, *p.norm(), p.conv2, 20, 20, y[:, :12], None)
    assert torch.equal(y[-count:, :12], expected)
    zeros = torch.zeros(2, 12, dtype=torch.float64, device="cuda")
    p.correction.zero_()
    expected = backward(p, batch_statistics=False)
    y.zero_()
    g = torch.zeros(rows, stride, device="cuda")
    g[-count:, :12] = p.grad_features
    grad_a = torch.empty_like(z)
    affine, coefficients = torch.empty(7, 40, device="cuda").split((2, 5))
    conv2 = torch.empty_like(p.conv2)
    OPS.bn_relu_conv3x3_backward(
        g[:, :12], y[:, :12], p.y_mean, zeros, z, *p.norm(), p.conv2, 20, 20, grad_a, affine,
        coefficients, False, conv2,
    )  # fmt: skip
    assert torch.equal(grad_a[-count:], expected["grad_a"])
    for value, name in ((affine[0], "grad_weight"), (conv2, "grad_conv2")):
        assert relative_error(value, expected[name]) < 1e-2


@requires_tensor_cores
def test_arguments_of_the_operators():
    p = make_problem((2, 4, 4), 48, 12, torch.bfloat16)
    y = torch.empty(32, 12, dtype=torch.bfloat16, device="cuda")
    wrong = {
        "there are no float64": dict(z=p.z.double()),
        "mean": dict(mean=p.mean.float()),
        "conv2": dict(conv2=p.conv2[..., 1:]),
        "the 3x3 convolution has 72 outputs": dict(conv2=p.conv2.repeat(6, 1, 1, 1)),
        "height, width": dict(height=5),
        "y: expected the sizes": dict(y=y[1:]),
        "moments": dict(moments=torch.empty(2, 11, dtype=torch.float64, device="cuda")),
        "more shared memory than there is|height, width": dict(height=1, width=100_000),
    }
    right = dict(z=p.z, mean=p.mean, var=p.var, weight=p.weight, bias=p.bias, eps=BN_EPS)
    right |= dict(conv2=p.conv2, height=4, width=4, y=y, moments=None)
    for text, change in wrong.items():
        with pytest.raises(RuntimeError, match=text):
            OPS.bn_relu_conv3x3(**(right | change))


@requires_tensor_cores
def test_opcheck():
    p = make_problem((2, 4, 4), 48, 12, torch.bfloat16)
    tests = ("test_schema", "test_faketensor")
    y, moments = torch.empty_like(p.y), torch.empty_like(p.correction)
    call = p.z, *p.norm(), p.conv2, 4, 4, y, moments
    torch.library.opcheck(OPS.bn_relu_conv3x3, call, test_utils=tests)
    call = p.grad_features, p.y, p.y_mean, p.correction, p.z, *p.norm(), p.conv2, 4, 4
    call += torch.empty_like(p.z), *torch.empty(7, 48, device="cuda").split((2, 5)), True
    call += (torch.empty_like(p.conv2),)
    torch.library.opcheck(OPS.bn_relu_conv3x3_backward, call, test_utils=tests)


# Blocks


@requires_tensor_cores
@pytest.mark.parametrize("recompute", ["bottleneck", "features"])
@by_dtype
def test_a_block_runs_on_the_kernels(dtype, recompute, tf32):
    block = DenseBlock(3, 16, 12, recompute=recompute).cuda().to(dtype)
    x = torch.randn(4, 16, 9, 9, device="cuda", dtype=dtype)
    assert block.kernel_path(x) == "tensor cores"
    assert kernels_of(lambda: train(block, x), KERNELS) == set(KERNELS)
    for layer in block.children():
        layer.conv2.weight.requires_grad_(False)
    assert kernels_of(lambda: train(block, x), KERNELS) == set(KERNELS[:2])


@requires_tensor_cores
def test_a_block_that_does_not():
    """And why: `kernel_path` says what runs."""
    x2, x3 = torch.randn(4, 16, 9, 9), torch.randn(2, 16, 5, 5, 5)
    cases = [
        ("dropout follows", DenseBlock(2, 16, 12, drop_rate=0.1), x2),
        ("the 3x3 convolution has 65 outputs", DenseBlock(2, 16, 65, bn_size=2), x2),
        ("convolutions of size (3, 3, 3) of 3", DenseBlock(2, 16, 12, spatial_dims=3), x3),
    ]
    for why, block, x in cases:
        block, x = block.cuda().bfloat16(), x.cuda().bfloat16()
        assert block.kernel_path(x).startswith(f"tensor cores but for conv2: {why}")
        assert kernels_of(lambda block=block, x=x: train(block, x), KERNELS) == set()


@requires_tensor_cores
@pytest.mark.parametrize("size", [(1, 2), (2, 2), (3, 3), (7, 5), (33, 18)], ids=str)
@pytest.mark.parametrize("recompute", ["bottleneck", "features"])
@by_dtype
def test_sizes_of_images(dtype, recompute, size, tf32):
    problem = make_block_problem((3, *size), dtype, "cuda", channels=13, growth_rate=12)
    found = block_errors(problem, recompute=recompute)
    for name, (ours, torchs) in found.items():
        assert ours <= 2 * torchs + 4 * EPS[dtype], f"{name}: {ours:.3g}, plain torch {torchs:.3g}"


@requires_tensor_cores
def test_some_weights_frozen(tf32):
    """Each gradient of a weight comes back to its own layer."""
    torch.manual_seed(0)
    block = DenseBlock(4, 16, 12).cuda()
    x = torch.randn(4, 16, 9, 9, device="cuda")
    train(block, x)
    expected = [layer.conv2.weight.grad for layer in block.children()]
    block.zero_grad()
    block.denselayer2.conv2.weight.requires_grad_(False)
    train(block, x)
    for i, layer in enumerate(block.children()):
        grad = layer.conv2.weight.grad
        assert grad is None if i == 1 else torch.equal(grad, expected[i])


@requires_tensor_cores
def test_same_result_with_and_without(tf32, monkeypatch):
    """The paths compute the same thing, to TF32's rounding."""
    problem = make_block_problem((4, 12, 12), device="cuda", channels=32, growth_rate=16)
    on_kernels = run(dense_block, problem)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    general = run(dense_block, problem)
    for name, value in general.items():
        assert relative_error(on_kernels[name], value) < 2e-2, name


@requires_tensor_cores
def test_a_step_in_a_graph():
    """Replayed is as launched."""
    torch.manual_seed(0)
    model = DenseNet(growth_rate=12, block_config=(3, 3, 3), efficient=True).cuda().bfloat16()
    x = torch.randn(4, 3, 32, 32, device="cuda", dtype=torch.bfloat16)

    def step():
        model.zero_grad()
        model(x).float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-2  # the stem's gradient is cuDNN's


def test_why_not():
    assert "cpu" in kernel_path("cpu", torch.float32, (2, 40, 4, 4), 12, 48)[2]


@requires_tensor_cores
def test_why_not_on_tensor_cores():
    def why(sizes=(2, 40, 4, 4), **others):
        path = kernel_path("cuda", torch.float16, sizes, 12, 48, **others)
        assert path[:2] == ("tensor cores", "")
        return path[2]

    assert why() == ""
    assert why(drops=True) == "dropout follows the convolutions"
    assert why(kernel=(5, 5)) == "convolutions of size (5, 5) of 2 spatial dimensions"
    assert why((2, 40, 4), kernel=(3,)) == "convolutions of size (3,) of 1 spatial dimensions"


@requires_tensor_cores
@pytest.mark.parametrize("spread, weight", [(1, 1), (175, 0.01), (0.01, 1)], ids=str)
@by_dtype
def test_evaluation_folds_norm2(dtype, spread, weight, tf32):
    """Into conv1's kernel, where nothing is kept; as exact as plain modules, also where the product
    of norm2's scale and a weight is a number that float16 does not have.
    """
    torch.manual_seed(0)
    block = DenseBlock(5, 16, 12).cuda()
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    with torch.no_grad():
        for layer in block.children():
            layer.conv1.weight *= spread  # z, and its statistics
            layer.norm2.running_mean *= spread
            layer.norm2.running_var *= spread**2
            layer.norm2.weight *= weight
            layer.norm2.bias *= weight
    plain = DenseBlock(5, 16, 12, efficient=False).cuda()
    plain.load_state_dict(block.state_dict())
    block.to(dtype).eval(), plain.to(dtype).eval()
    plain.load_state_dict(block.state_dict())
    x = torch.randn(4, 16, 19, 13, device="cuda", dtype=dtype)
    with torch.no_grad():
        folded, theirs = block(x), plain(x)
        assert kernels_of(lambda: block(x), ["WriteFolded"])
    assert not kernels_of(lambda: block(x.requires_grad_()), ["WriteFolded"])
    exact = plain.double()(x.double())
    limit = 2 * relative_error(theirs, exact) + 4 * EPS[dtype]
    assert relative_error(folded, exact) <= limit
    assert relative_error(block(x), exact) <= limit


@requires_tensor_cores
def test_training_without_gradients_folds_nothing():
    """norm2 then normalises by the batch."""
    block = DenseBlock(2, 16, 12).cuda().bfloat16()
    x = torch.randn(4, 16, 9, 9, device="cuda", dtype=torch.bfloat16)
    expected = block(x)
    with torch.no_grad():
        assert torch.equal(block(x), expected)
        for layer in block.children():
            layer.norm2.eval()  # but not norm1
        assert not kernels_of(lambda: block(x), ["WriteFolded"])

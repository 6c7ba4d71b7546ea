"""The tensor-core kernels: each against float64, their edges, and where a block runs on them."""

import dataclasses

import pytest
import torch
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
KERNELS = "bn_relu_conv1x1_kernel", "bn_relu_conv1x1_grad_input_kernel"
KERNELS += ("bn_relu_conv1x1_grad_weight_kernel",)


@dataclasses.dataclass
class Problem:
    """One layer's norm1 and conv1, and what comes back through norm2; numbers per channel are
    float.
    """

    x: Tensor  # [M, C], a window of a wider matrix
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    conv1: Tensor  # [N, C]
    grad_a2: Tensor  # of relu(norm2(z))
    z: Tensor
    coefficients: Tensor  # mean, scale, bias, offset, slope of norm2: how it becomes that of z
    grad_features: Tensor  # what other readers have sent back
    correction: Tensor

    def y(self) -> Tensor:
        """relu's argument in float64."""
        xhat = (self.x.double() - self.mean) / (self.var + BN_EPS).sqrt()
        weight = 1 if self.weight is None else self.weight.double()
        return xhat * weight + (0 if self.bias is None else self.bias.double())

    def grad_z(self, dtype, corrects=True) -> Tensor:
        """Computed in `dtype`, but for 16-bit ones in float32."""
        working = torch.promote_types(dtype, torch.float32)
        mean, scale, bias, offset, slope = self.coefficients.to(working)
        centred = self.z.to(working) - mean
        dz = self.grad_a2.to(working) * (centred * scale + bias > 0)
        return (scale * dz - offset - corrects * centred * slope).to(dtype)

    def norm(self):
        return self.mean, self.var, self.weight, self.bias, BN_EPS


def make_problem(
    rows, channels, outputs, dtype, *, padding=0, affine=True, mean=0.5, std=2.0, seed=0
) -> Problem:
    """Random operands without kinks; `padding` columns follow those of x and G."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    means, stds = mean + 0.3 * std * randn(channels), std * (1 + 0.2 * randn(channels).abs())
    wide = (means + stds * randn(rows, channels)).cuda()
    buffer = torch.full((rows, channels + padding), torch.nan, dtype=dtype, device="cuda")
    buffer[:, :channels] = wide.to(dtype)
    gradients = torch.full((rows, channels + padding), torch.nan, device="cuda")
    gradients[:, :channels] = randn(rows, channels).cuda()
    problem = Problem(
        buffer[:, :channels],
        means.cuda(),
        stds.square().cuda(),
        (1 + 0.3 * randn(channels)).float().cuda() if affine else None,
        (0.3 * randn(channels)).float().cuda() if affine else None,
        (randn(outputs, channels) / channels**0.5).to(dtype).cuda(),
        randn(rows, outputs).to(dtype).cuda(),
        randn(rows, outputs).to(dtype).cuda(),
        (torch.tensor([[0.2], [1], [0], [0], [0]]) + 0.3 * randn(5, outputs)).float().cuda(),
        gradients[:, :channels],
        randn(2, channels).cuda(),
    )
    # Where rounding could decide the ReLU: another value, one standard deviation away.
    near = problem.y().abs() < 1e-3
    problem.x[near] = (problem.x.double() + 0.5 * stds.cuda())[near].to(dtype)
    assert (problem.y().abs() > 1e-5).all()
    mean, scale, bias, *_ = problem.coefficients.double()
    scale.clamp_(min=0.2)
    problem.coefficients[1] = scale.float()
    near = ((problem.z.double() - mean) * scale + bias).abs() < 1e-2
    problem.z[near] = (problem.z.double() + 0.5 / scale)[near].to(dtype)
    return problem


def forward(p: Problem, moments=True):
    """z and its moments, in memory that held NaN."""
    z = torch.full((len(p.x), len(p.conv1)), torch.nan, dtype=p.x.dtype, device="cuda")
    stats = torch.full((2, len(p.conv1)), torch.nan, dtype=torch.float64, device="cuda")
    OPS.bn_relu_conv1x1(p.x, *p.norm(), p.conv1, z, stats if moments else None)
    return {"z": z, "mean": stats[0], "var": stats[1]} if moments else {"z": z}


def backward(p: Problem, batch_statistics=True, grad_conv1=True, corrects=True):
    channels = p.x.size(1)
    buffer = torch.full((len(p.x), p.grad_features.stride(0)), torch.nan, device="cuda")
    grad_features, correction = buffer[:, :channels], p.correction.clone()
    grad_features.copy_(p.grad_features)
    affine = torch.full((2, channels), torch.nan, device="cuda")
    conv1 = torch.full(p.conv1.shape, torch.nan, device="cuda") if grad_conv1 else None
    grad_z = torch.full(p.z.shape, torch.nan, dtype=p.z.dtype, device="cuda")
    OPS.bn_relu_conv1x1_backward(
        p.grad_a2, p.z, p.coefficients, corrects, p.x, *p.norm(), p.conv1, grad_z, grad_features,
        affine, correction, batch_statistics, conv1,
    )  # fmt: skip
    # What lies behind the columns belongs to others.
    assert buffer[:, channels:].isnan().all()
    found = {"G": grad_features, "grad_weight": affine[0], "grad_bias": affine[1]}
    found |= {"S1": correction[0], "S2": correction[1], "grad_z": grad_z}
    return found | ({"grad_conv1": conv1} if grad_conv1 else {})


def reference(p: Problem, dtype, batch_statistics=True, corrects=True) -> dict[str, Tensor]:
    """All of it with torch's operators: products in `dtype`, the rest in float64."""
    y = p.y()
    a = y.clamp_min(0).to(dtype)
    z = a @ p.conv1.to(dtype).T
    grad_z = p.grad_z(dtype, corrects)
    grad_a = (grad_z @ p.conv1.to(dtype)).double()
    dz = grad_a * (y > 0)
    inverse_std = 1 / (p.var + BN_EPS).sqrt()
    scale = inverse_std * (1 if p.weight is None else p.weight.double())
    grad_bias = dz.sum(0)
    grad_weight = (dz * (p.x.double() - p.mean) * inverse_std).sum(0)
    used = float(batch_statistics)
    before, correction = p.grad_features.double(), p.correction
    z64 = z.double()
    return {
        "z": z64,
        "mean": z64.mean(0),
        "var": z64.var(0, correction=0),
        "G": before + scale * dz,
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
        "S1": correction[0] + used * scale * grad_bias,
        "S2": correction[1] + used * scale * inverse_std * grad_weight,
        "grad_conv1": (grad_z.T @ a).double(),
        "grad_z": grad_z.double(),
    }


def kernel_errors(p: Problem, **options) -> dict[str, tuple[float, float]]:
    ours = forward(p) | backward(p, **options)
    exact, torchs = (reference(p, t, **options) for t in (torch.float64, p.x.dtype))
    return {
        name: (relative_error(value, exact[name]), relative_error(torchs[name], exact[name]))
        for name, value in ours.items()
    }


def assert_kernels_match(p: Problem, **options) -> None:
    """The error rule; float32 in TF32, whose eps is that of its operands."""
    for name, (ours, torchs) in kernel_errors(p, **options).items():
        limit = 2 * torchs + 4 * EPS[p.x.dtype]
        assert ours <= limit, f"{name}: error {ours:.3g}, plain torch {torchs:.3g}"


SHAPES = [  # rows, channels, outputs
    (1, 1, 1),
    (16, 24, 48),
    (17, 33, 7),
    (64, 32, 64),
    (100, 36, 48),
    (333, 100, 50),
    (1000, 224, 128),
    (515, 72, 96),
    (260, 129, 97),
    (130, 260, 160),
    (77, 65, 192),
    (200, 40, 256),
    (50, 1024, 130),
    (9000, 48, 48),
]


@requires_tensor_cores
@pytest.mark.parametrize("padding", [0, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@by_dtype
def test_kernels(dtype, shape, padding, tf32):
    assert_kernels_match(make_problem(*shape, dtype, padding=padding))


@requires_tensor_cores
@pytest.mark.parametrize(
    "shape", [*SHAPES, (40_000, 2000, 128), (20_000, 2500, 256), (300, 5000, 64)], ids=str
)
@by_dtype
def test_little_shared_memory(dtype, shape, tf32, little_shared_memory):
    assert_kernels_match(make_problem(*shape, dtype))


@requires_tensor_cores
@pytest.mark.parametrize("seed", range(40))
@by_dtype
def test_random_shapes(dtype, seed, tf32):
    generator = torch.Generator().manual_seed(seed)
    limits = ((1, 1500), (1, 400), (1, 257), (0, 9))
    rows, channels, outputs, padding = (
        int(torch.randint(*limit, (), generator=generator)) for limit in limits
    )
    p = make_problem(rows, channels, outputs, dtype, padding=padding, seed=seed)
    assert_kernels_match(p, batch_statistics=seed % 3 != 0, corrects=seed % 4 != 0)


@requires_tensor_cores
@pytest.mark.parametrize("rows", [40_000, 140_000])  # more tiles of rows than blocks
@by_dtype
def test_many_rows(dtype, rows, tf32):
    p = make_problem(rows + 13, 72, 48, dtype)
    assert_kernels_match(p)


@requires_tensor_cores
@by_dtype
def test_error_ratio(dtype, tf32):
    """Over seeds, as exact as torch's own products."""
    assert_error_ratio(
        [kernel_errors(make_problem(2048, 128, 64, dtype, seed=seed)) for seed in range(20)]
    )


@requires_tensor_cores
@by_dtype
def test_no_affine_and_wanted_gradients(dtype, tf32):
    p = make_problem(300, 70, 60, dtype, affine=False)
    assert_kernels_match(p)
    everything = backward(p)
    without = backward(p, grad_conv1=False)
    assert all(torch.equal(without[name], everything[name]) for name in without)
    assert torch.equal(forward(p, moments=False)["z"], forward(p)["z"])


def as_tf32(x: Tensor) -> Tensor:
    """Float64 numbers rounded to the 10 bits of TF32's fraction, halves away from 0."""
    unit = 2.0 ** (torch.frexp(x).exponent.double() - 11)
    return torch.sign(x) * torch.floor(x.abs() / unit + 0.5) * unit


@requires_tensor_cores
def test_tf32_rounds_operands_to_nearest():
    """So z and the gradients are exact products of rounded operands, up to float32's sums."""
    p = make_problem(500, 100, 64, torch.float32)
    ours = forward(p) | backward(p)
    a, w, dz = map(as_tf32, (p.y().clamp_min(0), p.conv1.double(), ours["grad_z"].double()))
    # A result of float32 next to a tie is rounded to the other side now and then.
    assert relative_error(ours["z"], a @ w.T) < 2e-5  # rounded downwards it would be 4e-4
    assert relative_error(ours["grad_conv1"], dz.T @ a) < 2e-5
    inverse_std = 1 / (p.var + BN_EPS).sqrt()
    expected = p.grad_features + inverse_std * p.weight * (dz @ w) * (p.y() > 0)
    assert relative_error(ours["G"], expected) < 1e-6


@requires_tensor_cores
@by_dtype
def test_moments_of_a_large_mean(dtype, tf32):
    """The variance of z is its own, not the rest of two large numbers."""
    p = make_problem(5000, 64, 48, dtype)
    p.conv1.copy_(p.conv1.abs() * 50 / EPS[dtype] ** -0.5)
    p.bias.fill_(30.0)
    found = forward(p)
    z = found["z"].double()
    assert (z.mean(0) > 10 * z.std(0)).all()
    assert relative_error(found["mean"], z.mean(0)) < 1e-6
    assert relative_error(found["var"], z.var(0, correction=0)) < 1e-4


@requires_tensor_cores
@pytest.mark.parametrize("shape", [(5000, 100, 48), (700, 300, 200)], ids=str)
@by_dtype
def test_same_bits(dtype, shape, tf32):
    p = make_problem(*shape, dtype)
    first = forward(p) | backward(p)
    for _ in range(3):
        again = forward(p) | backward(p)
        assert all(torch.equal(again[name], first[name]) for name in first)


@requires_tensor_cores
@by_dtype
def test_nan_stays_in_its_row(dtype, tf32):
    p = make_problem(100, 40, 48, dtype)
    p.x[37, 5] = torch.nan
    z = forward(p, moments=False)["z"]
    assert z[37].isnan().all()
    assert z[:37].isfinite().all() and z[38:].isfinite().all()


@requires_tensor_cores
def test_offsets_beyond_32_bits():
    """M times the row stride of x and G passes 2^31; operands are the last rows of large memory."""
    rows, stride, channels = 2**31 // 2048 + 1000, 2048, 24
    buffer = torch.empty(rows, stride, dtype=torch.bfloat16, device="cuda")
    gradients = torch.empty(rows, stride, device="cuda")
    p = make_problem(1000, channels, 48, torch.bfloat16, padding=stride - channels)
    expected_z = forward(p, moments=False)["z"]
    buffer.zero_()
    buffer[-1000:, :channels] = p.x
    gradients[-1000:, :channels] = p.grad_features
    grad_a2 = torch.zeros(rows, 48, dtype=torch.bfloat16, device="cuda")
    grad_a2[-1000:] = p.grad_a2
    p.coefficients[3] = 0  # so that rows of zeros send back zeros
    z = torch.empty(rows, 48, dtype=torch.bfloat16, device="cuda")
    x, norm = buffer[:, :channels], p.norm()
    OPS.bn_relu_conv1x1(x, *norm, p.conv1, z, None)
    assert torch.equal(z[-1000:], expected_z)
    z[-1000:] = p.z
    affine, correction = torch.empty(2, channels, device="cuda"), p.correction.clone()
    conv1 = torch.empty(48, channels, device="cuda")
    G = gradients[:, :channels]
    grad = grad_a2, z, p.coefficients, False
    OPS.bn_relu_conv1x1_backward(
        *grad, x, *norm, p.conv1, grad_a2, G, affine, correction, True, conv1
    )
    expected = backward(p, grad_conv1=False, corrects=False)
    assert torch.equal(G[-1000:], expected["G"])
    assert torch.equal(grad_a2[-1000:], expected["grad_z"])  # in place
    exact = reference(p, torch.float64, corrects=False)
    assert relative_error(conv1, exact["grad_conv1"]) < 1e-2
    assert relative_error(affine[1], exact["grad_bias"]) < 1e-2


@requires_tensor_cores
def test_arguments_of_the_operators():
    p = make_problem(20, 24, 48, torch.bfloat16)
    z = torch.empty(20, 48, dtype=torch.bfloat16, device="cuda")
    wrong = {
        "there are no float64": dict(x=p.x.double()),
        "mean": dict(mean=p.mean.float()),
        "weight": dict(weight=p.weight[1:]),
        "conv1": dict(conv1=p.conv1[:, 1:]),
        "the bottleneck has 288": dict(conv1=p.conv1.repeat(6, 1)),
        "z": dict(z=z[1:]),
        "moments": dict(moments=torch.empty(2, 47, dtype=torch.float64, device="cuda")),
    }
    right = dict(x=p.x, mean=p.mean, var=p.var, weight=p.weight, bias=p.bias, eps=BN_EPS)
    right |= dict(conv1=p.conv1, z=z, moments=None)
    for text, change in wrong.items():
        with pytest.raises(RuntimeError, match=text):
            OPS.bn_relu_conv1x1(**(right | change))


@requires_tensor_cores
def test_opcheck():
    p = make_problem(40, 24, 48, torch.bfloat16)
    z = torch.empty(40, 48, dtype=torch.bfloat16, device="cuda")
    moments = torch.empty(2, 48, dtype=torch.float64, device="cuda")
    tests = ("test_schema", "test_faketensor")
    call = p.x, *p.norm(), p.conv1, z, moments
    torch.library.opcheck(OPS.bn_relu_conv1x1, call, test_utils=tests)
    affine, conv1 = torch.empty(2, 24, device="cuda"), torch.empty(48, 24, device="cuda")
    call = p.grad_a2, p.z, p.coefficients, True, p.x, *p.norm(), p.conv1, z, p.grad_features
    call += affine, p.correction, True, conv1
    torch.library.opcheck(OPS.bn_relu_conv1x1_backward, call, test_utils=tests)


# Blocks


@requires_tensor_cores
@pytest.mark.parametrize("recompute", ["bottleneck", "features"])
@by_dtype
def test_a_block_runs_on_tensor_cores(dtype, recompute, tf32):
    block = DenseBlock(3, 16, 12, recompute=recompute).cuda().to(dtype)
    x = torch.randn(4, 16, 9, 9, device="cuda", dtype=dtype)
    assert block.kernel_path(x) == "tensor cores"
    assert kernels_of(lambda: train(block, x), KERNELS) == set(KERNELS)
    for layer in block.children():
        layer.conv1.weight.requires_grad_(False)
    assert kernels_of(lambda: train(block, x), KERNELS) == set(KERNELS[:2])


@requires_tensor_cores
def test_a_block_that_does_not():
    """And why: `kernel_path` says what runs."""
    x = torch.randn(4, 16, 9, 9, device="cuda")
    cases = {
        "matrix products: TF32 is off": (DenseBlock(2, 16, 12), torch.float32),
        "matrix products: there are no float64": (DenseBlock(2, 16, 12), torch.float64),
        "matrix products: the bottleneck has 260": (DenseBlock(2, 16, 65), torch.bfloat16),
        "matrix products: the block has 20016": (DenseBlock(1, 20000, 16), torch.bfloat16),
        "layer by layer: denselayer1": (DenseBlock(2, 16, 12), torch.bfloat16),
    }
    for expected, (block, dtype) in cases.items():
        block = block.cuda().to(dtype)
        if "layer1" in expected:
            block.denselayer1.conv1.register_forward_hook(lambda *args: None)
        x = torch.randn(4, block.denselayer1.conv1.in_channels, 9, 9, device="cuda", dtype=dtype)
        assert block.kernel_path(x).startswith(expected)
        assert kernels_of(lambda block=block, x=x: train(block, x), KERNELS) == set()


@requires_tensor_cores
def test_autocast_runs_on_tensor_cores():
    block = DenseBlock(2, 16, 12).cuda()
    x = torch.randn(4, 16, 9, 9, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert block.kernel_path(x) == "tensor cores"
        assert kernels_of(lambda: train(block, x), KERNELS) == set(KERNELS)
    assert block.kernel_path(x).startswith("matrix products: TF32 is off")


@requires_tensor_cores
@pytest.mark.parametrize("growth_rate", [1, 3, 12, 32, 40, 64])
@pytest.mark.parametrize("recompute", ["bottleneck", "features"])
@by_dtype
def test_growth_rates(dtype, recompute, growth_rate, tf32):
    problem = make_block_problem(
        (2, 9, 7), dtype, "cuda", channels=2 * growth_rate + 1, growth_rate=growth_rate
    )
    found = block_errors(problem, recompute=recompute)
    for name, (ours, torchs) in found.items():
        assert ours <= 2 * torchs + 4 * EPS[dtype], f"{name}: {ours:.3g}, plain torch {torchs:.3g}"


@requires_tensor_cores
def test_same_result_with_and_without(tf32):
    """TF32 and exact float32 agree to TF32's rounding: the paths compute the same thing."""
    problem = make_block_problem((4, 12, 12), device="cuda", channels=32, growth_rate=16)
    on_tensor_cores = run(dense_block, problem)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    general = run(dense_block, problem)
    for name, value in general.items():
        assert relative_error(on_tensor_cores[name], value) < 2e-2, name
    assert relative_error(on_tensor_cores["y"], general["y"]) > 1e-6  # another path


@requires_tensor_cores
def test_evaluation_in_a_graph():
    """Replayed is as launched."""
    torch.manual_seed(0)
    model = DenseNet(growth_rate=12, block_config=(3, 3, 3), efficient=True).cuda().bfloat16()
    x = torch.randn(4, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        graph.replay()
    assert torch.equal(y, expected)


def test_why_not():
    path = kernel_path("cpu", torch.float32, (2, 100, 4, 4), 12, 48)
    assert path == ("matrix products", *["the features are on cpu"] * 2)
    path = kernel_path("cpu", torch.float32, (2, 100, 4, 4), 12, 48, products_match=False)
    assert path[0] == "convolutions"
    assert "meta" in kernel_path("meta", torch.float16, (2, 100, 4, 4), 12, 48)[1]
    assert (
        DenseBlock(2, 16, 12)
        .kernel_path(torch.randn(2, 16, 4, 4))
        .startswith("matrix products: the features are on cpu")
    )
    block = DenseBlock(2, 16, 12, efficient=False)
    assert block.kernel_path(torch.randn(2, 16, 4, 4)) == "plain modules: efficient=False"

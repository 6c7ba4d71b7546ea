"""Batch norm, ReLU and max pooling as one operator: values, winners, gradients, statistics."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from block_reference import cast_norm, plain_batch_norm
from efficient_densenet import BatchNorm, bn_relu_max_pool
from reference import (
    DEVICES,
    DTYPES,
    FORMATS,
    assert_error_ratio,
    assert_error_rule,
    compare,
    in_format,
    kept_bytes,
    relative_error,
    requires_cuda,
)

# Channels: whole vectors, parts of one. Images: borders of 1 to 3 pixels, odd and even, tails.
SPATIAL = [
    (1,),
    (7,),
    (1, 1),
    (1, 2),
    (2, 2),
    (3, 1),
    (3, 3),
    (9, 14),
    (8, 5),
    (3, 2, 4),
    (5, 5, 3),
]
SIXTEEN_BITS = [torch.float16, torch.bfloat16]


def max_pool(x: Tensor) -> Tensor:
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
    return pool(x, 3, stride=2, padding=1)


def plain_bn_relu_max_pool(x: Tensor, norm: BatchNorm) -> Tensor:
    return max_pool(F.relu(plain_batch_norm(x, norm)))


def make_norm(channels, device, dtype, training=True, affine=True, **fields) -> BatchNorm:
    def randn():
        return torch.randn(channels, dtype=torch.float64).to(device, dtype)

    weight, bias = (1 + 0.5 * randn(), 0.3 * randn()) if affine else (None, None)
    return BatchNorm(0.3 * randn(), 1 + randn().square(), weight, bias, training, **fields)


def make_problem(shape, dtype, device, parameter_dtype=None, memory_format="contiguous", **options):
    x = in_format(
        (0.5 + 2 * torch.randn(shape, dtype=torch.float64)).to(device, dtype), memory_format
    )
    norm = make_norm(shape[1], device, parameter_dtype or dtype, **options)
    return x, norm, torch.randn_like(max_pool(x.double())).to(dtype)


def run(operator, x: Tensor, norm: BatchNorm, grad_y: Tensor) -> dict[str, Tensor]:
    """Result, gradients and new running statistics of one call, by name; arguments stay."""
    leaves = {"x": x, "weight": norm.weight, "bias": norm.bias}
    leaves = {n: t.detach().requires_grad_() for n, t in leaves.items() if t is not None}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    moved = {n: getattr(norm, n).clone() for n in statistics if getattr(norm, n) is not None}
    x, *parameters = leaves.values()
    norm = norm._replace(**moved, **dict(zip(list(leaves)[1:], parameters, strict=True)))
    y = operator(x, norm)
    gradients = torch.autograd.grad(y, list(leaves.values()), grad_y)
    result = {"y": y.detach(), **moved}
    return result | {f"grad_{n}": g for n, g in zip(leaves, gradients, strict=True)}


def is_clear(x: Tensor, norm: BatchNorm, dtype: torch.dtype) -> Tensor:
    """Where rounding decides neither which pixel of a window wins nor whether its ReLU is open."""
    norm = cast_norm(norm, torch.float64)._replace(num_batches_tracked=None)
    if norm.training:
        norm = norm._replace(running_mean=None, running_var=None)
    z = plain_batch_norm(x.double(), norm)
    z = F.pad(F.relu(z), [1, 1] * (x.dim() - 2), value=-1)
    for d in range(2, x.dim()):
        z = z.unfold(d, 3, 2)
    first, second = z.flatten(x.dim()).topk(2, -1).values.unbind(-1)
    margin = 1e-3 + 8 * torch.finfo(dtype).eps * first
    return (first > margin) & (first - second > margin)


def errors(x: Tensor, norm: BatchNorm, grad_y: Tensor) -> dict[str, tuple[float, float]]:
    """Per tensor: our error and plain torch's, against float64 from the same rounded inputs."""
    if x.dtype != torch.float64:
        grad_y = grad_y * is_clear(x, norm, x.dtype)
    wide = x.double(), cast_norm(norm, torch.float64), grad_y.double()
    exact, torchs = run(plain_bn_relu_max_pool, *wide), run(plain_bn_relu_max_pool, x, norm, grad_y)
    return compare(run(bn_relu_max_pool, x, norm, grad_y), torchs, exact)


def assert_matches(problem) -> None:
    assert_error_rule(errors(*problem), problem[0].dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS[:3])
@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch(device, dtype, spatial, memory_format, training):
    for channels in (16, 5):
        shape = (11, channels, *spatial)
        assert_matches(make_problem(shape, dtype, device, None, memory_format, training=training))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_16_bit_features_with_float32_parameters(device, dtype, affine):
    assert_matches(make_problem((4, 24, 11, 12), dtype, device, torch.float32, affine=affine))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 40),
    batch=st.integers(4, 6),
    spatial=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    memory_format=st.sampled_from(FORMATS[:3]),
    dtype=st.sampled_from(DTYPES),
    training=st.booleans(),
    affine=st.booleans(),
)
@pytest.mark.parametrize("device_name", DEVICES)
def test_random_shapes(
    device_name, channels, batch, spatial, memory_format, dtype, training, affine
):
    torch.manual_seed(batch)
    options = dict(memory_format=memory_format, training=training, affine=affine)
    problem = make_problem((batch, channels, *spatial), dtype, device_name, **options)
    found = errors(*problem)
    if training and batch * torch.Size(spatial).numel() < 12:
        # A handful of values may have hardly any variance, and then float32 has no digits left.
        found = {name: found[name] for name in ("y", "running_mean")}
    assert_error_rule(found, dtype)


@pytest.mark.parametrize("mean", [0.5, 100.0])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
def test_error_ratio(device, dtype, memory_format, mean):
    found = []
    for seed in range(24):
        torch.manual_seed(seed)
        problem = make_problem((6, 16, 13, 10), dtype, device, torch.float32, memory_format)
        problem[0].add_(mean)
        found.append(errors(*problem))
        assert_error_rule(found[-1], dtype)
    assert_error_ratio(found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS[:3])
@pytest.mark.parametrize("spatial", [(5,), (3, 4), (2, 3, 2)], ids=str)
def test_gradcheck(device, spatial, memory_format, training):
    for channels in (2, 3):
        x, norm, _ = make_problem((4, channels, *spatial), torch.float64, device, training=training)
        x = in_format(x, memory_format).detach().requires_grad_()
        weight, bias = norm.weight.requires_grad_(), norm.bias.requires_grad_()

        def function(x, weight, bias, norm=norm):
            # Training updates the running statistics, which repeated calls must not see.
            moved = dict(
                running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone()
            )
            return bn_relu_max_pool(x, norm._replace(weight=weight, bias=bias, **moved))

        assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=False)


def integers(shape, dtype, device, memory_format="contiguous"):
    """Few values, so many are equal, and a norm that changes none: arithmetic is exact."""
    x = torch.randint(-2, 3, shape, device=device).to(dtype)
    ones = torch.ones(shape[1], device=device, dtype=torch.promote_types(dtype, torch.float32))
    return in_format(x, memory_format), BatchNorm(torch.zeros_like(ones), ones, eps=1e-30)


@pytest.mark.parametrize("memory_format", FORMATS[:3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_values_the_first_wins(device, dtype, memory_format):
    """And where the maximum is the ReLU's 0, nobody gets its gradient."""
    for channels, spatial in itertools.product((8, 3), SPATIAL):
        x, norm = integers((3, channels, *spatial), dtype, device, memory_format)
        grad_y = torch.randint(-8, 9, max_pool(x.double()).shape, device=device).to(dtype)
        ours = run(bn_relu_max_pool, x, norm, grad_y)
        plain = run(plain_bn_relu_max_pool, x, norm, grad_y)
        for name in ("y", "grad_x"):
            assert torch.equal(ours[name], plain[name]), (name, channels, spatial)


def test_values_that_are_equal_once_they_are_rounded(device):
    x = torch.tensor([1.0, 1.0078125, 1.0], device=device, dtype=torch.bfloat16).view(1, 1, 3)
    half = torch.full((1,), 0.5, device=device)
    norm = BatchNorm(torch.zeros_like(half), torch.ones_like(half), half, 128 * half, eps=1e-30)
    grad_y = torch.ones(1, 1, 2, device=device, dtype=torch.bfloat16)
    ours = run(bn_relu_max_pool, x, norm, grad_y)
    assert ours["y"].tolist() == [[[64.5, 64.5]]]
    assert ours["grad_x"].tolist() == [[[0.5, 0.5, 0]]]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_nan_passes(device, memory_format):
    x, norm = integers((2, 4, 6, 7), torch.float32, device, memory_format)
    x[1, 2, 2, 3] = x[1, 2, 3, 3] = x[0, 1, 5, 6] = float("nan")
    ours, plain = bn_relu_max_pool(x, norm), plain_bn_relu_max_pool(x, norm)
    assert 0 < ours.isnan().sum() < 10
    assert torch.equal(ours.isnan(), plain.isnan())
    assert torch.equal(ours.nan_to_num(), plain.nan_to_num())


@pytest.mark.parametrize(
    "shape", [(2, 6, 4, 4), (2, 1, 4, 4), (2, 6, 1, 1), (1, 6, 3, 1), (2, 4, 2, 3, 3), (2, 4, 5)]
)
@pytest.mark.parametrize("memory_format", FORMATS[:2])
def test_result_has_the_format_of_x(shape, memory_format):
    x = in_format(torch.randn(shape), memory_format)
    y = bn_relu_max_pool(x, make_norm(shape[1], "cpu", torch.float32))
    if x.dim() > 3 and memory_format == "channels_last":
        assert in_format(y, "channels_last").stride() == y.stride() or y.size(1) == 1
    else:
        assert y.is_contiguous()


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, None])
def test_running_statistics(device, momentum):
    count = torch.tensor(4, device=device)
    x, norm, grad_y = make_problem(
        (6, 5, 7, 4), torch.float32, device, momentum=momentum, num_batches_tracked=count
    )
    assert_matches((x, norm, grad_y))
    result = run(bn_relu_max_pool, x, norm, grad_y)
    assert result["num_batches_tracked"] == 5 and count == 4
    without = norm._replace(running_mean=None, running_var=None, num_batches_tracked=None)
    assert torch.equal(run(bn_relu_max_pool, x, without, grad_y)["y"], result["y"])
    frozen = norm._replace(training=False)
    result = run(bn_relu_max_pool, x, frozen, grad_y)
    assert torch.equal(result["running_mean"], norm.running_mean)
    assert result["num_batches_tracked"] == 4


def test_an_error_changes_nothing(device):
    count = torch.tensor(0, device=device)
    norm = make_norm(3, device, torch.float32, num_batches_tracked=count)
    before = [norm.running_mean.clone(), norm.running_var.clone()]
    x = torch.randn(2, 3, 5, 5, device=device)
    for wrong, error, text in (
        ((x[:1, :, :1, :1], norm), ValueError, "Expected more than 1 value per channel"),
        ((x[0, 0], norm), ValueError, "x: expected .* with 1 to 3 spatial dimensions"),
        ((x[:, :, :0], norm), ValueError, "x: expected channels and pixels"),
        ((x[:, :2], norm), ValueError, r"norm.running_mean: expected shape \[2\]"),
        ((x.double(), norm), TypeError, "norm.running_mean: expected torch.float64"),
        ((x.long(), norm), TypeError, "x: expected float64, float32"),
        ((x, norm._replace(eps=0.0)), ValueError, "norm.eps: expected a number > 0"),
        ((x, tuple(norm)), TypeError, "norm: expected a BatchNorm, got tuple"),
        ((x, norm._replace(running_var=None, training=False)), ValueError, "norm.running_var"),
        (([x], norm), TypeError, "x: expected a tensor, got list"),
    ):
        with pytest.raises(error, match=text):
            bn_relu_max_pool(*wrong)
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])
    assert count == 0


@pytest.mark.parametrize("training", [True, False])
def test_batch_of_size_zero(device, training):
    count = torch.tensor(0, device=device)
    options = dict(training=training, num_batches_tracked=count)
    x, norm, grad_y = make_problem((0, 3, 4, 5), torch.float32, device, **options)
    ours, plain = (
        run(operator, x, norm, grad_y) for operator in (bn_relu_max_pool, plain_bn_relu_max_pool)
    )
    assert ours.keys() == plain.keys()
    for name in ours:
        assert torch.equal(ours[name], plain[name]), name


@pytest.mark.parametrize("memory_format", FORMATS[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(device, memory_format, dtype):
    problem = make_problem((9, 24, 61, 30), dtype, device, None, memory_format)
    first = run(bn_relu_max_pool, *problem)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(bn_relu_max_pool, *problem)
            for name in first:
                assert torch.equal(first[name], again[name]), name
    finally:
        torch.set_num_threads(threads)


def test_only_wanted_gradients(device):
    x, norm, grad_y = make_problem((4, 6, 5, 5), torch.float64, device)
    expected = run(plain_bn_relu_max_pool, x, norm, grad_y)
    bias = norm.bias.clone().requires_grad_()
    bn_relu_max_pool(x, norm._replace(bias=bias)).backward(grad_y)
    torch.testing.assert_close(bias.grad, expected["grad_bias"])
    x.requires_grad_()
    bn_relu_max_pool(x, norm).backward(grad_y)
    torch.testing.assert_close(x.grad, expected["grad_x"])
    assert not bn_relu_max_pool(x.detach(), norm).requires_grad


def test_what_is_kept(device):
    x, norm, _ = make_problem((4, 16, 20, 20), torch.bfloat16, device, torch.float32)
    x.requires_grad_()
    y = bn_relu_max_pool(x, norm)
    kept = kept_bytes(lambda: bn_relu_max_pool(x, norm), [x, norm.weight, norm.bias])
    assert kept == y.numel() + 2 * 8 * 16  # winners, mean and var
    assert kept_bytes(lambda: bn_relu_max_pool(x.detach(), norm), []) == 0


def test_retain_graph(device):
    x, norm, grad_y = make_problem((4, 6, 5, 5), torch.float64, device)
    y = bn_relu_max_pool(x.requires_grad_(), norm)
    first = torch.autograd.grad(y, x, grad_y, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x, grad_y)[0])


def test_is_differentiable_once(device):
    x, norm, _ = make_problem((4, 6, 5, 5), torch.float64, device)
    y = bn_relu_max_pool(x.requires_grad_(), norm)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; use plain modules"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="torch.func's transforms"):
        torch.func.vmap(lambda x: bn_relu_max_pool(x, norm))(x.detach()[None])


def test_without_gradient_mode(device):
    x, norm, grad_y = make_problem((4, 6, 5, 5), torch.float32, device)
    expected = run(plain_bn_relu_max_pool, x, norm, grad_y)
    with torch.inference_mode():
        y = bn_relu_max_pool(x, norm)
    torch.testing.assert_close(y, expected["y"])
    torch.testing.assert_close(norm.running_var, expected["running_var"])


@pytest.mark.parametrize("memory_format", FORMATS[:2])
def test_gradient_of_any_strides(device, memory_format):
    x, norm, grad_y = make_problem((4, 16, 7, 5), torch.float64, device, None, memory_format)
    for grad in (in_format(grad_y, "strided"), in_format(grad_y, "channels_last"), grad_y[:1, :1]):
        assert_matches((x, norm, grad.expand_as(grad_y)))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_autocast(device, dtype):
    x, norm, grad_y = make_problem((6, 8, 9, 9), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, norm.weight, norm.bias)]
    exact = run(plain_bn_relu_max_pool, x.double(), cast_norm(norm, torch.float64), grad_y.double())
    with torch.autocast(device, dtype):
        y = bn_relu_max_pool(x, norm)
    assert y.dtype == dtype
    assert relative_error(y, exact["y"]) < 2 * torch.finfo(dtype).eps
    y.float().square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_offsets_beyond_32_bits(device):
    """Strides that reach past 2^31 elements; only a few pages of the memory are touched."""
    memory = torch.empty(3 * 2**30, dtype=torch.bfloat16, device=device)
    x = memory.as_strided((3, 2, 5), (2**30 - 7, 2**29 + 3, 3))
    x.copy_(torch.randn(3, 2, 5))
    ones = torch.ones(2, device=device)
    norm = BatchNorm(None, None, ones, ones, training=True)
    torch.testing.assert_close(bn_relu_max_pool(x, norm), plain_bn_relu_max_pool(x.clone(), norm))


@requires_cuda
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_more_elements_than_32_bits_count(memory_format):
    x = torch.randn(1, 8, 4096, 4096, device="cuda", dtype=torch.bfloat16)
    x = x.repeat(17, 1, 1, 1).to(memory_format=memory_format)  # 2.3e9 elements
    assert x.numel() > 2**31
    x.requires_grad_()
    y = bn_relu_max_pool(x, BatchNorm(None, None, training=True))
    assert torch.equal(y[0], y[16])
    y.backward(y.detach())
    assert torch.equal(x.grad[0], x.grad[16]) and x.grad[16].any()


@requires_cuda
def test_side_stream():
    problem = make_problem((8, 16, 32, 32), torch.float32, "cuda")
    expected = run(bn_relu_max_pool, *problem)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = run(bn_relu_max_pool, *problem)
    torch.cuda.current_stream().wait_stream(stream)
    for name in expected:
        assert torch.equal(expected[name], result[name]), name


def samples(device, dtype):
    x, norm, grad_y = make_problem((3, 4, 5, 6), dtype, device)
    winners = torch.zeros_like(grad_y, dtype=torch.uint8)
    mean, var = norm.running_mean.double(), norm.running_var.double()
    return {
        "bn_relu_max_pool": (x, mean, var, norm.weight, None, 1e-5, grad_y, winners),
        "bn_relu_max_pool_backward": (
            grad_y, winners, x, mean, var, None, norm.bias, 1e-5, True, torch.empty_like(x),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["bn_relu_max_pool", "bn_relu_max_pool_backward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opcheck(device, name, dtype):
    operator = getattr(torch.ops.efficient_densenet, name).default
    torch.library.opcheck(operator, samples(device, dtype)[name])

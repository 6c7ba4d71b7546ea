"""The operator: values, gradients, statistics, layouts, dtypes, numerics settings."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from efficient_densenet import SharedStorage, concat_bn_relu, recompute_in_backward
from reference import (
    DEVICES,
    DTYPES,
    FORMATS,
    assert_error_ratio,
    assert_error_rule,
    assert_matches,
    errors,
    in_format,
    make_problem,
    plain_concat_bn_relu,
    relative_error,
    requires_cuda,
    run,
)

SHAPES = [(33,), (7, 9), (3, 8, 8), (4, 7, 5), (2, 3, 4, 5)]  # batch and spatial sizes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch(device, dtype, shape, memory_format, training):
    problem = make_problem([24, 12, 12], shape, dtype, device, training, memory_format)
    assert_matches(problem, storage=SharedStorage())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_features_with_float32_parameters(device, dtype, affine):
    problem = make_problem(
        [8, 3], (4, 6, 6), dtype, device, parameter_dtype=torch.float32, affine=affine
    )
    assert_matches(problem)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    channels=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    batch=st.integers(2, 5),
    spatial=st.lists(st.integers(1, 9), max_size=3),
    memory_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    training=st.booleans(),
    affine=st.booleans(),
)
@pytest.mark.parametrize("device_name", DEVICES)
def test_random_shapes(
    device_name, channels, batch, spatial, memory_format, dtype, training, affine
):
    problem = make_problem(
        channels, (batch, *spatial), dtype, device_name, training, memory_format, affine=affine
    )
    found = errors(concat_bn_relu, problem)
    if batch * torch.Size(spatial).numel() < 8:
        # A handful of values may have hardly any variance, and then float32 has no digits left.
        found = {name: found[name] for name in ("y", "running_mean")} if training else found
    assert_error_rule(found, dtype)


@pytest.mark.parametrize("mean", [0.5, 1000.0], ids=["mean=std/4", "mean=1000std"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_ratio(device, dtype, memory_format, mean):
    if mean == 1000.0 and dtype != torch.float32:
        mean = 100.0  # 16 bits have no digits left for a standard deviation of a thousandth
    found = [
        errors(
            concat_bn_relu,
            make_problem(
                [16, 8],
                (6, 10, 10),
                dtype,
                device,
                memory_format=memory_format,
                parameter_dtype=torch.float32,
                mean=mean,
                std=1.0 if mean > 1 else 2.0,
                seed=seed,
            ),
        )
        for seed in range(24)
    ]
    for one in found:
        assert_error_rule(one, dtype)
    assert_error_ratio(found)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_variance_survives_a_large_mean(device, memory_format):
    # float32 has steps of 1e-3 at 1e4, so the exact variance is that of the rounded values.
    x = in_format((1e4 + 1e-2 * torch.randn(16, 6, 32, 32)).to(device), memory_format)
    running_mean, running_var = torch.zeros(6, device=device), torch.zeros(6, device=device)
    concat_bn_relu([x], running_mean, running_var, training=True, momentum=1.0)
    exact = x.double().transpose(0, 1).reshape(6, -1)
    assert relative_error(running_var, exact.var(1)) < 1e-4
    assert relative_error(running_mean, exact.mean(1)) < 1e-7


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("spatial", [(), (5,), (3, 4), (2, 3, 2)], ids=str)
def test_gradcheck(device, spatial, memory_format, training):
    features = [
        in_format(torch.randn(4, c, *spatial, dtype=torch.float64, device=device), memory_format, i)
        .detach()
        .requires_grad_()
        for i, c in enumerate([2, 1, 3])
    ]
    weight, bias = (
        torch.randn(6, dtype=torch.float64, device=device).requires_grad_() for _ in range(2)
    )
    running_mean = torch.randn(6, dtype=torch.float64, device=device)
    running_var = torch.rand(6, dtype=torch.float64, device=device) + 0.5

    def function(weight, bias, *features):
        # Training updates the running statistics, which gradcheck's repeated calls must not see.
        running = [running_mean.clone(), running_var.clone()]
        return concat_bn_relu(features, *running, weight, bias, training)

    assert torch.autograd.gradcheck(function, (weight, bias, *features), fast_mode=False)


def test_many_features(device):
    channels = [1 + i % 3 for i in range(150)]  # more than travel in one launch
    assert_matches(make_problem(channels, (3, 4, 4), torch.float32, device))


def test_feature_without_channels(device):
    problem = make_problem([3, 0, 2, 0], (3, 4, 4), torch.float32, device)
    assert_matches(problem)


@pytest.mark.parametrize("training", [True, False])
def test_batch_of_size_zero(device, training):
    problem = make_problem([3, 2], (0, 4, 4), torch.float32, device, training)
    ours, plain = run(concat_bn_relu, problem), run(plain_concat_bn_relu, problem)
    assert ours.keys() == plain.keys()
    for name in ours:
        assert torch.equal(ours[name], plain[name]), name


@pytest.mark.parametrize(
    "shape", [(2, 6, 4, 4), (2, 1, 4, 4), (2, 6, 1, 1), (1, 6, 3, 1), (2, 4, 2, 3, 3)]
)
@pytest.mark.parametrize("first", FORMATS[:3])
@pytest.mark.parametrize("second", FORMATS[:3])
def test_result_has_the_strides_of_cat(shape, first, second):
    features = [in_format(torch.randn(shape), first), in_format(torch.randn(shape), second)]
    channels = 2 * shape[1]
    y = concat_bn_relu(features, torch.zeros(channels), torch.ones(channels))
    assert y.stride() == torch.cat(features, 1).stride()


def test_every_element_is_written(device):
    for memory_format in FORMATS:
        storage = SharedStorage()
        problem = make_problem([5, 3], (3, 5, 7), torch.float32, device, True, memory_format)
        buffer = storage.allocate([10**4], [1], like=problem.features[0])
        buffer.fill_(float("nan"))
        result = run(concat_bn_relu, problem, storage=storage)
        assert all(torch.isfinite(value).all() for value in result.values())


def test_nan_passes(device):
    problem = make_problem([3], (4, 2, 2), torch.float32, device, training=False)
    problem.features[0][1, 1, 0, 0] = float("nan")
    y = run(concat_bn_relu, problem)["y"]
    assert y[1, 1, 0, 0].isnan() and y.isnan().sum() == 1


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(device, memory_format, dtype):
    problem = make_problem([24, 12, 5], (9, 30, 30), dtype, device, True, memory_format)
    first = run(concat_bn_relu, problem)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(concat_bn_relu, problem)
            for name in first:
                assert torch.equal(first[name], again[name]), name
    finally:
        torch.set_num_threads(threads)


def test_running_statistics(device):
    problem = make_problem([4, 3], (6, 5), torch.float32, device)
    for momentum in (0.0, 0.3, 1.0):
        problem.momentum = momentum
        assert_matches(problem)
    problem.running_mean = problem.running_var = None
    result = run(concat_bn_relu, problem)
    assert "running_mean" not in result
    assert_matches(problem)


def test_running_statistics_of_other_strides_are_updated(device):
    problem = make_problem([4, 3], (6, 5), torch.float32, device)
    expected = run(concat_bn_relu, problem)["running_var"]
    strided = torch.stack([problem.running_var] * 2, 1)[:, 0]
    concat_bn_relu(problem.features, problem.running_mean, strided, training=True)
    assert torch.equal(strided, expected)


def test_running_statistics_that_move_before_the_backward_pass(device):
    """The gradient is that of the statistics which were used."""
    problem = make_problem([3, 4], (5, 2, 3), torch.float64, device, training=False)
    expected = run(concat_bn_relu, problem)["grad_features[0]"]
    x = [feature.clone().requires_grad_() for feature in problem.features]
    norm = problem.running_mean, problem.running_var, problem.weight, problem.bias
    y = concat_bn_relu(x, *norm, training=False)
    concat_bn_relu([2 * feature.detach() for feature in x], *norm, training=True)
    y.backward(problem.grad_y)
    torch.testing.assert_close(x[0].grad, expected)


def test_running_statistics_are_updated_once(device):
    problem = make_problem([4, 3], (6, 5, 5), torch.float32, device)
    running = [torch.zeros(7, device=device), torch.ones(7, device=device)]
    expected = [x.clone() for x in running]
    F.batch_norm(torch.cat(problem.features, 1), *expected, training=True)
    conv = nn.Conv2d(7, 2, 1, device=device)
    features = [x.requires_grad_() for x in problem.features]
    y = concat_bn_relu(features, *running, training=True, storage=SharedStorage())
    with recompute_in_backward(y):
        z = conv(y)
    after_forward = [x.clone() for x in running]
    z.sum().backward()
    for ours, plain, before in zip(running, expected, after_forward, strict=True):
        torch.testing.assert_close(ours, plain)
        assert torch.equal(ours, before)


def test_only_wanted_gradients(device):
    problem = make_problem([3, 2, 4], (4, 3, 3), torch.float64, device)
    expected = run(plain_concat_bn_relu, problem)
    features = [x.clone() for x in problem.features]
    features[1].requires_grad_()
    weight = problem.weight.clone()
    bias = problem.bias.clone().requires_grad_()
    y = concat_bn_relu(features, None, None, weight, bias, training=True)
    y.backward(problem.grad_y)
    torch.testing.assert_close(features[1].grad, expected["grad_features[1]"])
    torch.testing.assert_close(bias.grad, expected["grad_bias"])
    assert features[0].grad is None and features[2].grad is None and weight.grad is None


def test_frozen_inputs_give_a_result_without_gradient(device):
    problem = make_problem([3, 2], (4, 3, 3), torch.float32, device)
    y = concat_bn_relu(problem.features, None, None, training=True)
    assert not y.requires_grad


@pytest.mark.parametrize("storage", [None, SharedStorage()], ids=["private", "shared"])
def test_retain_graph(device, storage):
    problem = make_problem([3, 2], (4, 3, 3), torch.float64, device)
    features = [x.requires_grad_() for x in problem.features]
    conv = nn.Conv2d(5, 4, 1, dtype=torch.float64, device=device)
    y = concat_bn_relu(features, None, None, training=True, storage=storage)
    with recompute_in_backward(y):
        z = conv(y)
    inputs = [*features, conv.weight]
    first = torch.autograd.grad(z.square().sum(), inputs, retain_graph=True)
    if storage is not None:
        storage.allocate([10**4], [1], like=features[0]).fill_(float("nan"))
    second = torch.autograd.grad(z.square().sum(), inputs, retain_graph=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_second_derivative_raises(device):
    problem = make_problem([3, 2], (4, 3, 3), torch.float64, device)
    features = [x.requires_grad_() for x in problem.features]
    y = concat_bn_relu(features, None, None, training=True)
    (gradient,) = torch.autograd.grad(y.square().sum(), features[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; use plain modules"):
        gradient.sum().backward()


def test_without_gradient_mode(device):
    problem = make_problem([3, 2], (4, 3, 3), torch.float32, device)
    expected = run(plain_concat_bn_relu, problem)
    for mode in (torch.no_grad, torch.inference_mode):
        storage = SharedStorage()
        running = [problem.running_mean.clone(), problem.running_var.clone()]
        with mode():
            y = concat_bn_relu(
                [x.requires_grad_() for x in problem.features],
                *running,
                problem.weight,
                problem.bias,
                training=True,
                storage=storage,
            )
            with recompute_in_backward(y):
                assert not y.requires_grad
        torch.testing.assert_close(y, expected["y"])
        torch.testing.assert_close(running[1], expected["running_var"])
        assert storage.nbytes == 0


def test_expanded_gradient(device):
    problem = make_problem([3, 2], (4, 3, 3), torch.float64, device)
    problem.grad_y = torch.tensor(2.0, dtype=torch.float64, device=device).expand(4, 5, 3, 3)
    assert_matches(problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    problem = make_problem([4, 3], (6, 5, 5), torch.float32, device)
    conv = nn.Conv2d(7, 2, 1, device=device)
    features = [x.requires_grad_() for x in problem.features]
    weight, bias = problem.weight.requires_grad_(), problem.bias.requires_grad_()
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autocast(device, dtype), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = concat_bn_relu(
            features, problem.running_mean, problem.running_var, weight, bias, training=True
        )
        with recompute_in_backward(y):
            z = conv(y)
    assert y.dtype == z.dtype == dtype
    z.float().square().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (*features, weight, bias))
    exact = run(plain_concat_bn_relu, make_problem([4, 3], (6, 5, 5), torch.float64, device))["y"]
    assert relative_error(y, exact) < 2 * torch.finfo(dtype).eps

    # Kept for backward: the features as they came, per-channel numbers, the convolution's own.
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    features_bytes = sum(x.numel() * 4 for x in features)
    per_channel_bytes = (2 * 8 + 2 * 4) * 7  # mean, var, weight, bias
    conv_bytes = conv.weight.numel() * (4 + dtype.itemsize) + 2 * (4 + dtype.itemsize)
    assert sum(kept.values()) <= features_bytes + per_channel_bytes + conv_bytes


def test_autocast_leaves_float64_alone(device):
    x = torch.randn(4, 3, device=device, dtype=torch.float64)
    ones = torch.ones(3, device=device, dtype=torch.float64)
    with torch.autocast(device, torch.bfloat16):
        assert concat_bn_relu([x], ones, ones).dtype == torch.float64


def test_offsets_beyond_32_bits(device):
    """Strides that reach past 2^31 elements; only a few pages of the memory are touched."""
    memory = torch.empty(3 * 2**30, dtype=torch.bfloat16, device=device)
    x = memory.as_strided((3, 2, 5), (2**30 - 7, 2**29 + 3, 3))
    values = torch.randn(3, 2, 5)
    x.copy_(values)
    ones = torch.ones(2, device=device)
    y = concat_bn_relu([x], ones, ones, training=True)
    assert_y = plain_concat_bn_relu([x.clone()], ones, ones, training=True)
    torch.testing.assert_close(y, assert_y)


@requires_cuda
def test_more_elements_than_32_bits_count():
    x = torch.randn(1, 3, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    x = x.repeat(11, 1, 1, 1)  # 2.2e9 elements
    assert x.numel() > 2**31
    mean, var = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    x.requires_grad_()
    y = concat_bn_relu([x], mean, var, training=True, momentum=1.0)
    last = slice(8000, 8010)
    exact = F.relu(x[10, :, last].double() - mean[:, None, None])
    exact /= (var.double()[:, None, None] + 1e-5).sqrt()
    assert relative_error(y[10, :, last], exact) < torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(var, x[0].float().var((1, 2)), rtol=1e-3, atol=0)
    y.backward(y.detach())
    assert torch.isfinite(x.grad[10, :, last]).all() and x.grad[10, :, last].any()


@requires_cuda
def test_side_stream():
    problem = make_problem([16, 8], (8, 32, 32), torch.float32, "cuda")
    expected = run(concat_bn_relu, problem)
    stream, storage = torch.cuda.Stream(), SharedStorage()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            result = run(concat_bn_relu, problem, storage=storage)
    torch.cuda.current_stream().wait_stream(stream)
    for name in expected:
        assert torch.equal(expected[name], result[name]), name


SAMPLES = {
    "concat_bn_stats": lambda p: (p.features,),
    "concat_bn_relu": lambda p: (
        p.features,
        p.running_mean.double(),
        p.running_var.double(),
        p.weight,
        None,
        1e-5,
        torch.empty_like(p.grad_y),
    ),
    "concat_bn_relu_backward": lambda p: (
        p.grad_y,
        p.features,
        p.running_mean.double(),
        p.running_var.double(),
        p.weight,
        p.bias,
        1e-5,
        True,
        [1],
        [torch.empty_like(p.features[1])],
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opcheck(device, name, dtype):
    problem = make_problem([4, 3], (6, 5, 5), dtype, device)
    torch.library.opcheck(
        getattr(torch.ops.efficient_densenet, name).default, SAMPLES[name](problem)
    )

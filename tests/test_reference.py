"""The comparison helpers find planted errors."""

import pytest
import torch

from reference import (
    assert_error_ratio,
    assert_error_rule,
    assert_matches,
    in_format,
    make_problem,
    plain_concat_bn_relu,
    relative_error,
)


def test_plain_torch_matches_itself():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert_matches(make_problem([3, 4], [5, 6], dtype, "cpu"), plain_concat_bn_relu)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", ["y", "grad", "running"])
def test_planted_error_is_found(dtype, where):
    epsilon = max(30 * torch.finfo(dtype).eps, 1e-8)

    def off(features, running_mean, running_var, weight, bias, **kwargs):
        y = plain_concat_bn_relu(features, running_mean, running_var, weight, bias, **kwargs)
        if where == "y":
            return y * (1 + epsilon)
        if where == "grad":
            y.register_hook(lambda grad: grad * (1 + epsilon))
        if where == "running":
            running_var.data.mul_(1 + epsilon)  # .data: unseen by the version counter
        return y

    with pytest.raises(AssertionError, match="error"):
        assert_matches(make_problem([3, 4], [5, 6], dtype, "cpu"), off)


def test_not_finite_never_passes():
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    with pytest.raises(AssertionError):
        assert_error_rule({"y": (float("inf"), 1.0)}, torch.float32)


def test_ratio_finds_small_but_systematic_errors():
    with pytest.raises(AssertionError, match="geometric mean"):
        assert_error_ratio([{"y": (1.2e-6, 1e-6)}] * 20)
    assert_error_ratio([{"y": (1.5e-6, 1e-6)}, {"y": (1e-6, 1.5e-6)}] * 10)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 6), (3, 4, 2, 5, 6)])
def test_formats_keep_values_and_differ_in_strides(shape, memory_format):
    x = torch.randn(shape)
    formatted = in_format(x, memory_format)
    assert torch.equal(x, formatted)
    if memory_format == "strided":
        assert formatted.stride(-1) == 2 and not formatted.is_contiguous()
    if memory_format == "channels_last":
        assert formatted.stride(1) == 1

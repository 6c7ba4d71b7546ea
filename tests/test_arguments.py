"""Every wrong argument: a clear error that names it, and nothing changed."""

import pytest
import torch

from efficient_densenet import concat_bn_relu
from reference import requires_cuda


def arguments(device="cpu", **changes):
    base = dict(
        features=[torch.randn(4, 3, 5, device=device), torch.randn(4, 2, 5, device=device)],
        running_mean=torch.zeros(5, device=device),
        running_var=torch.ones(5, device=device),
        weight=torch.ones(5, device=device),
        bias=torch.zeros(5, device=device),
        training=True,
    )
    return base | changes


def f(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


WRONG = {
    "not a list": (
        dict(features=f(4, 3)),
        TypeError,
        "features: expected a list or tuple of tensors, got Tensor",
    ),
    "empty list": (
        dict(features=[]),
        ValueError,
        "features: expected at least one tensor, got an empty list",
    ),
    "not a tensor": (
        dict(features=[f(4, 5), 3]),
        TypeError,
        r"features\[1\]: expected a tensor, got int",
    ),
    "one dimension": (
        dict(features=[f(5)]),
        ValueError,
        r"features\[0\]: expected \[N, C, \*spatial\] with 0 to 3 spatial dimensions, got .*\[5\]",
    ),
    "six dimensions": (
        dict(features=[f(2, 5, 1, 1, 1, 1)]),
        ValueError,
        r"features\[0\]: expected .* got shape \[2, 5, 1, 1, 1, 1\]",
    ),
    "batch sizes": (
        dict(features=[f(4, 3, 5), f(3, 2, 5)]),
        ValueError,
        r"features\[1\]: expected batch and spatial sizes .*\[4, 3, 5\], got shape \[3, 2, 5\]",
    ),
    "spatial sizes": (
        dict(features=[f(4, 3, 5), f(4, 2, 6)]),
        ValueError,
        r"features\[1\]: expected batch and spatial sizes .* got shape \[4, 2, 6\]",
    ),
    "dimensions": (
        dict(features=[f(4, 3, 5), f(4, 2, 5, 1)]),
        ValueError,
        r"features\[1\]: expected batch and spatial sizes",
    ),
    "mixed dtypes": (
        dict(features=[f(4, 3, 5), f(4, 2, 5).half()]),
        TypeError,
        r"features\[1\]: expected torch.float32 of features\[0\], got torch.float16",
    ),
    "integers": (
        dict(features=[torch.ones(4, 5, dtype=torch.int64)]),
        TypeError,
        r"features\[0\]: expected float64, float32, float16 or bfloat16, got torch.int64",
    ),
    "mixed devices": (
        dict(features=[f(4, 3, 5), f(4, 2, 5, device="meta")]),
        ValueError,
        r"features\[1\]: expected device cpu of features\[0\], got meta",
    ),
    "weight length": (
        dict(weight=f(4)),
        ValueError,
        r"weight: expected shape \[5\], the channels of all features, got shape \[4\]",
    ),
    "bias shape": (
        dict(bias=f(5, 1)),
        ValueError,
        r"bias: expected shape \[5\], .* got shape \[5, 1\]",
    ),
    "running_mean length": (
        dict(running_mean=f(6)),
        ValueError,
        r"running_mean: expected shape \[5\]",
    ),
    "running_var dtype": (
        dict(running_var=f(5).double()),
        TypeError,
        "running_var: expected torch.float32 for torch.float32 features, got torch.float64",
    ),
    "weight device": (
        dict(weight=f(5, device="meta")),
        ValueError,
        "weight: expected device cpu of the features, got meta",
    ),
    "weight type": (dict(weight=1.0), TypeError, "weight: expected a tensor or None, got float"),
    "one value": (
        dict(features=[f(1, 3, 1), f(1, 2, 1)]),
        ValueError,
        r"more than 1 value per channel when training, got input size torch.Size\(\[1, 5, 1\]\)",
    ),
    "no running_mean": (
        dict(training=False, running_mean=None),
        ValueError,
        "running_mean: expected a tensor when training=False, got None",
    ),
    "no running_var": (
        dict(training=False, running_var=None),
        ValueError,
        "running_var: expected a tensor when training=False, got None",
    ),
    "eps zero": (dict(eps=0.0), ValueError, "eps: expected a number > 0, got 0.0"),
    "eps negative": (dict(eps=-1), ValueError, "eps: expected a number > 0, got -1"),
    "eps nan": (dict(eps=float("nan")), ValueError, "eps: expected a number > 0, got nan"),
    "momentum type": (dict(momentum=None), TypeError, "momentum: expected a number, got NoneType"),
    "training type": (dict(training="yes"), TypeError, "training: expected a bool, got str"),
    "storage type": (
        dict(storage=[]),
        TypeError,
        "storage: expected a SharedStorage or None, got list",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name):
    changes, error, message = WRONG[name]
    given = arguments(**changes)
    tensors = {
        k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor) and not v.is_meta
    }
    with pytest.raises(error, match=message):
        concat_bn_relu(**given)
    for key, before in tensors.items():
        assert torch.equal(given[key], before), key


def test_one_value_per_channel_in_the_words_of_torch():
    size = (1, 5, 1, 1)
    with pytest.raises(ValueError) as ours:
        concat_bn_relu([f(*size)], None, None, training=True)
    with pytest.raises(ValueError) as plain:
        torch.nn.functional.batch_norm(f(*size), None, None, training=True)
    assert str(ours.value) == str(plain.value)


def test_parameters_of_16_bit_features():
    features = [f(4, 5).bfloat16()]
    for dtype in (torch.bfloat16, torch.float32):
        concat_bn_relu(features, torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype))
    with pytest.raises(TypeError, match="running_mean: expected torch.bfloat16 or torch.float32"):
        concat_bn_relu(features, torch.zeros(5).half(), torch.ones(5))


@requires_cuda
def test_mixed_cpu_and_cuda():
    with pytest.raises(ValueError, match=r"features\[1\]: expected device cpu .* got cuda:0"):
        concat_bn_relu(**arguments(features=[f(4, 3, 5), f(4, 2, 5, device="cuda")]))
    with pytest.raises(ValueError, match="weight: expected device cuda:0 of the features, got cpu"):
        concat_bn_relu(**arguments("cuda", weight=f(5)))

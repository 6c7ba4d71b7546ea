"""Every wrong argument: a clear error that names it, and nothing changed."""

import pytest
import torch

from efficient_densenet import BatchNorm, DenseLayer, bn_relu_max_pool, concat_bn_relu, dense_block
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
    "eps None": (dict(eps=None), TypeError, "eps: expected a number, got NoneType"),
    "eps bool": (dict(eps=True), TypeError, "eps: expected a number, got True"),
    "eps string": (dict(eps="1e-5"), TypeError, "eps: expected a number, got '1e-5'"),
    "eps -inf": (dict(eps=-float("inf")), ValueError, "eps: expected a number > 0, got -inf"),
    "eps negative in evaluation": (
        dict(eps=-1e-5, training=False),
        ValueError,
        "eps: expected a number > 0, got -1e-05",
    ),
    "momentum bool": (dict(momentum=False), TypeError, "momentum: expected a number, got False"),
    "training number": (dict(training=1), TypeError, "training: expected a bool, got int"),
    "training None": (dict(training=None), TypeError, "training: expected a bool, got NoneType"),
    "one running statistic": (
        dict(running_var=None),
        ValueError,
        "running_var: running_mean and running_var must either both be None or neither be None",
    ),
    "expanded running_mean": (
        dict(running_mean=torch.zeros(1).expand(5)),
        ValueError,
        "running_mean: expected memory of its own for each channel",
    ),
    "expanded running_var": (
        dict(running_var=torch.ones(1).expand(5)),
        ValueError,
        "running_var: expected memory of its own for each channel",
    ),
    "running_mean of two dimensions": (
        dict(running_mean=torch.zeros(1, 5)),
        ValueError,
        r"running_mean: expected shape \[5\], .* got shape \[1, 5\]",
    ),
    "running_mean that requires grad": (
        dict(running_mean=torch.zeros(5, requires_grad=True)),
        RuntimeError,
        "running_mean: expected a tensor that does not require grad",
    ),
    "process_group type": (
        dict(process_group="gloo"),
        TypeError,
        "process_group: expected a ProcessGroup or None, got str",
    ),
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


def test_parameters_of_16_bit_features_are_not_mixed():
    """Torch refuses that on the CPU; ours read one by the type of the other."""
    features = [f(4, 5).half()]
    for fields in (dict(running_mean=torch.zeros(5).half()), dict(weight=torch.ones(5).half())):
        norm = dict(running_mean=torch.zeros(5), running_var=torch.ones(5), bias=torch.zeros(5))
        norm |= fields
        before = {name: tensor.clone() for name, tensor in norm.items()}
        with pytest.raises(TypeError, match=r"expected torch.float\d\d of (running_mean|weight)"):
            concat_bn_relu(features, **norm, training=True)
        assert all(torch.equal(norm[name], before[name]) for name in norm)


def test_expanded_statistics_serve_evaluation():
    mean, var = torch.zeros(1).expand(5), torch.ones(1).expand(5)
    y = concat_bn_relu([f(4, 5)], mean, var)
    assert y.shape == (4, 5)


NORM = BatchNorm(torch.zeros(4), torch.ones(4), torch.ones(4), torch.zeros(4), True)
WRONG_NORMS = {
    "training": (dict(training="no"), TypeError, "training: expected a bool, got str"),
    "eps": (dict(eps=None), TypeError, "eps: expected a number, got NoneType"),
    "eps bool": (dict(eps=True), TypeError, "eps: expected a number, got True"),
    "momentum": (dict(momentum="0.1"), TypeError, "momentum: expected a number, got '0.1'"),
    "momentum bool": (dict(momentum=True), TypeError, "momentum: expected a number, got True"),
    "count type": (
        dict(num_batches_tracked=3),
        TypeError,
        "num_batches_tracked: expected a tensor, got int",
    ),
    "count dtype": (
        dict(num_batches_tracked=torch.tensor(3.0)),
        TypeError,
        "num_batches_tracked: expected one int64 number, got torch.float32",
    ),
    "count shape": (
        dict(num_batches_tracked=torch.zeros(4, dtype=torch.int64)),
        TypeError,
        r"num_batches_tracked: expected one int64 number, got .* shape \[4\]",
    ),
    "count device": (
        dict(num_batches_tracked=torch.tensor(3, device="meta")),
        ValueError,
        "num_batches_tracked: expected device cpu of the features, got meta",
    ),
    "weight": (dict(weight=3), TypeError, "weight: expected a tensor or None, got int"),
    "mean": (
        dict(running_mean=None),
        ValueError,
        "running_mean: running_mean and running_var",
    ),
    "var": (
        dict(running_var=None, training=False),
        ValueError,
        "running_var: expected a tensor when training=False, got None",
    ),
    "expanded": (
        dict(running_mean=torch.zeros(1).expand(4)),
        ValueError,
        "running_mean: expected memory of its own",
    ),
}


def layer(norm1=NORM, norm2=NORM, conv1=None, conv2=None):
    conv1 = f(4, 4, 1, 1) if conv1 is None else conv1
    return DenseLayer(norm1, conv1, norm2, f(2, 4, 3, 3) if conv2 is None else conv2)


def wide(**fields):
    six = BatchNorm(*(torch.ones(6) for _ in range(4)), True)
    return layer(six, conv1=f(4, 6, 1, 1), **fields)


NORM_PLACES = {
    "norm.": lambda norm: bn_relu_max_pool(f(2, 4, 5, 5), norm),
    r"layers\[0\].norm1.": lambda norm: dense_block(f(2, 4, 5, 5), [layer(norm1=norm)]),
    r"layers\[1\].norm2.": lambda norm: dense_block(f(2, 4, 5, 5), [layer(), wide(norm2=norm)]),
}


@pytest.mark.parametrize("place", NORM_PLACES)
@pytest.mark.parametrize("name", WRONG_NORMS)
def test_wrong_norm(name, place):
    changes, error, message = WRONG_NORMS[name]
    with pytest.raises(error, match=place + message):
        NORM_PLACES[place](NORM._replace(**changes))
    assert not NORM.running_mean.any() and (NORM.running_var == 1).all()


WRONG_BLOCKS = {
    "conv1 of one dimension": (layer(conv1=f(4)), r"layers\[0\].conv1: expected the weight of"),
    "conv1 of no dimension": (
        layer(conv1=torch.ones(())),
        r"layers\[0\].conv1: expected the weight of",
    ),
    "conv1 of six": (layer(conv1=f(4, 4, *[1] * 4)), r"layers\[0\].conv1: expected the weight"),
    "conv2 of two dimensions": (layer(conv2=f(2, 4)), r"layers\[0\].conv2: expected the weight of"),
    "conv2 of three": (layer(conv2=f(2, 4, 3)), r"layers\[0\].conv2: expected 2 spatial"),
    "conv1 and x of three": (
        layer(conv1=f(4, 4, 1), conv2=f(2, 4, 3)),
        r"x: expected \[N, C, \*spatial\] with 1 spatial dimensions",
    ),
    "even conv2": (layer(conv2=f(2, 4, 2, 3)), r"layers\[0\].conv2: expected .* odd kernel sizes"),
    "conv2 without outputs": (layer(conv2=f(0, 4, 3, 3)), r"layers\[0\].conv2: expected"),
    "conv1's outputs": (layer(conv1=f(3, 4, 1, 1)), r"layers\[0\].conv1: expected as many"),
    "conv1's inputs": (layer(conv1=f(4, 3, 1, 1)), "x: expected 3 channels"),
    "conv1's size": (
        layer(conv1=f(4, 4, 3, 3)),
        r"layers\[0\].conv1: expected shape \[4, 4, 1, 1\]",
    ),
}


@pytest.mark.parametrize("name", WRONG_BLOCKS)
def test_wrong_weights_of_a_block_are_named(name):
    wrong, message = WRONG_BLOCKS[name]
    with pytest.raises(ValueError, match=message):
        dense_block(f(2, 4, 5, 5), [wrong])


def test_the_second_layer_is_named():
    with pytest.raises(ValueError, match=r"layers\[1\].conv2: expected shape \[2, 4, 3, 3\]"):
        dense_block(f(2, 4, 5, 5), [layer(), wide(conv2=f(3, 4, 3, 3))])
    with pytest.raises(TypeError, match=r"layers\[1\].conv1: expected a tensor, got float"):
        dense_block(f(2, 4, 5, 5), [layer(), layer(conv1=1.0)])


@pytest.mark.parametrize(
    "shape", [(), (4,), (4, 5), (4, 5, 5), (2, 4, 5, 5, 5), (1, 2, 4, 5, 5, 5)]
)
def test_the_number_of_dimensions_comes_first(shape):
    """An image without a batch has wrong channels as well."""
    with pytest.raises(ValueError, match=r"x: expected \[N, C, \*spatial\] with"):
        dense_block(torch.randn(shape), [layer()])


@requires_cuda
def test_mixed_cpu_and_cuda():
    with pytest.raises(ValueError, match=r"features\[1\]: expected device cpu .* got cuda:0"):
        concat_bn_relu(**arguments(features=[f(4, 3, 5), f(4, 2, 5, device="cuda")]))
    with pytest.raises(ValueError, match="weight: expected device cuda:0 of the features, got cpu"):
        concat_bn_relu(**arguments("cuda", weight=f(5)))

"""At the edges, the operators accept, refuse and compute what torch's own functions do.

Each case runs ours and the plain composition on the same arguments, forward and backward. Either
both give the same values, gradients and buffers, or both raise errors of one type and ours has
changed nothing.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from block_reference import plain_batch_norm
from efficient_densenet import BatchNorm, SharedStorage, bn_relu_max_pool, concat_bn_relu

NAN, INF = math.nan, math.inf


def plain_concat(features, norm):
    return F.relu(plain_batch_norm(torch.cat(features, 1), norm))


def our_concat(features, norm):
    return concat_bn_relu(features, *norm[:7], storage=SharedStorage())


def plain_pool(features, norm):
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[features[0].dim() - 3]
    return pool(F.relu(plain_batch_norm(features[0], norm)), 3, 2, 1)


def our_pool(features, norm):
    return bn_relu_max_pool(features[0], norm)


OPERATORS = {"concat": (our_concat, plain_concat), "pool": (our_pool, plain_pool)}


def outcome(operator, features, norm):
    """Everything that can be seen of a call and its backward pass, or the type of the error."""

    def leaf(tensor):
        return tensor.detach().clone().requires_grad_()

    features = [leaf(x) for x in features]
    parameters = [t if t is None else leaf(t) for t in (norm.weight, norm.bias)]
    names = ("running_mean", "running_var", "num_batches_tracked")
    buffers = {n: getattr(norm, n) for n in names}
    buffers = {n: t if t is None else t.clone() for n, t in buffers.items()}
    norm = norm._replace(weight=parameters[0], bias=parameters[1], **buffers)
    try:
        y = operator(features, norm)
        y.sum().backward()
    except Exception as error:
        for name, buffer in buffers.items():
            if buffer is not None and operator in (our_concat, our_pool):
                assert_equal(buffer, getattr(norm, name))
        return type(error)
    gradients = [t if t is None else t.grad for t in (*features, *parameters)]
    return [y.detach(), *gradients, *buffers.values()]


def assert_equal(found, expected):
    if expected is None or found is None:
        assert found is expected
        return
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.device == expected.device
    if not found.is_meta:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def assert_same_outcome(name, features, norm):
    ours, plain = (outcome(operator, features, norm) for operator in OPERATORS[name])
    if isinstance(plain, type) or isinstance(ours, type):
        assert ours is plain
        return
    for found, expected in zip(ours, plain, strict=True):
        assert_equal(found, expected)


def make_norm(channels, training, affine=True, device="cpu", **fields):
    mean = 0.1 * torch.randn(channels, device=device)
    var = torch.rand(channels, device=device) + 0.5
    weight, bias = (torch.rand(channels, device=device) + 0.1 if affine else None for _ in "ab")
    if affine == "weight":
        bias = None
    return BatchNorm(mean, var, weight, bias, training)._replace(**fields)


SHAPES = {
    "concat": [
        [(2, 3, 4, 4)],
        [(0, 3, 4, 4)],
        [(0, 3)],
        [(2, 3, 0, 4)],
        [(1, 3, 0)],
        [(2, 0, 4, 4)],
        [(0, 0, 4, 4)],
        [(2, 0)],
        [(1, 0, 1, 1)],
        [(1, 0, 2)],
        [(1, 3, 1, 1)],
        [(1, 3)],
        [(2, 3)],
        [(1, 3, 2)],
        [(1, 3, 1, 1, 1)],
        [(2, 0, 4, 4), (2, 3, 4, 4)],
        [(2, 0), (2, 3)],
        [(2, 3, 4, 4), (2, 0, 4, 4), (2, 2, 4, 4)],
        [(2, 0, 4, 4), (2, 0, 4, 4)],
        [(0, 0, 4), (0, 3, 4)],
        [(2, 0, 0), (2, 3, 0)],
        [(1, 0, 1), (1, 3, 1)],
    ],
    "pool": [
        [(2, 3, 4, 4)],
        [(0, 3, 4, 4)],
        [(0, 3, 4)],
        [(2, 0, 4, 4)],
        [(0, 0, 4, 4)],
        [(2, 3, 0, 4)],
        [(0, 3, 0, 4)],
        [(1, 0, 1, 1)],
        [(1, 3, 1, 1)],
        [(1, 3, 1)],
        [(2, 3, 1, 1)],
        [(1, 3, 2)],
        [(2, 3, 1, 2, 1)],
    ],
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "shapes"), [(name, s) for name in SHAPES for s in SHAPES[name]], ids=str
)
def test_shapes(name, shapes, training, affine):
    features = [torch.randn(shape) for shape in shapes]
    channels = sum(shape[1] for shape in shapes)
    norm = make_norm(channels, training, affine, num_batches_tracked=torch.tensor(3))
    if name == "concat":
        norm = norm._replace(num_batches_tracked=None)
    assert_same_outcome(name, features, norm)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["x", "weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("name", OPERATORS)
def test_values_that_are_not_finite(name, place, value, training):
    features = [torch.randn(4, 3, 4, 4)]
    norm = make_norm(3, training)
    target = features[0] if place == "x" else getattr(norm, place)
    target[1] = value
    if place == "x":
        target[1] = 1.0
        target[1, 1, 2, 2] = value
    ours, plain = (outcome(operator, features, norm) for operator in OPERATORS[name])
    for found, expected in zip(ours[:6], plain[:6], strict=True):
        # Of infinities, the order of operations decides which are left and which become NaN.
        known = expected.isfinite()
        assert torch.equal(found.isfinite(), known)
        torch.testing.assert_close(found[known], expected[known], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0, 1, 0.3, 2.0, -1.0, NAN, INF, -INF])
@pytest.mark.parametrize("name", OPERATORS)
def test_momentum(name, momentum, training):
    assert_same_outcome(name, [torch.randn(4, 3, 4, 4)], make_norm(3, training, momentum=momentum))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1, 1e-3, INF, -1e-5])
@pytest.mark.parametrize("name", OPERATORS)
def test_eps(name, eps, training):
    norm = make_norm(3, training, eps=eps)
    if eps == 0 and outcome(OPERATORS[name][1], [torch.randn(2, 3, 4, 4)], norm) is ValueError:
        assert outcome(OPERATORS[name][0], [torch.randn(2, 3, 4, 4)], norm) is ValueError or (
            not training  # which older releases of torch refuse
        )
        return
    assert_same_outcome(name, [torch.randn(4, 3, 4, 4)], make_norm(3, training, eps=eps))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("name", OPERATORS)
def test_one_running_statistic(name, missing, training):
    features, norm = [torch.randn(4, 3, 4, 4)], make_norm(3, training, **{missing: None})
    ours, plain = (outcome(operator, features, norm) for operator in OPERATORS[name])
    assert ours is ValueError and plain is (ValueError if training else RuntimeError)


DTYPES = {"d": torch.float64, "f": torch.float32, "h": torch.float16, "b": torch.bfloat16}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_dtypes_of_the_norm(name, x, training):
    """Ours accepts what torch accepts on the CPU, and else raises TypeError."""
    features = [torch.randn(4, 3, 4, 4).to(DTYPES[x])]
    for dtypes in ("ffff", "dddd", "hhhh", "bbbb", "fhff", "hfff", "ffhh", "hhff", "ff--", "hh--",
                   "dd-d", "df--", "bfff", "--f-", "--hf", "ffhf", "fff-", "hhh-"):  # fmt: skip
        if "-" in dtypes[:2] and not training:
            continue
        fields = ("running_mean", "running_var", "weight", "bias")
        norm = make_norm(3, training)
        norm = norm._replace(
            **{
                f: None if d == "-" else getattr(norm, f).to(DTYPES[d])
                for f, d in zip(fields, dtypes, strict=True)
            }
        )
        ours, plain = (outcome(operator, features, norm) for operator in OPERATORS[name])
        if isinstance(plain, type):
            assert ours is TypeError, dtypes
        else:
            assert not isinstance(ours, type), dtypes
            assert [t if t is None else t.dtype for t in ours] == [
                t if t is None else t.dtype for t in plain
            ], dtypes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("name", OPERATORS)
def test_meta(name, batch, training):
    features = [torch.randn(batch, 3, 4, 4, device="meta")]
    count = torch.tensor(0, device="meta") if name == "pool" else None
    norm = make_norm(3, training, device="meta", num_batches_tracked=count)
    assert_same_outcome(name, features, norm)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_devices_are_not_mixed(name, autocast):
    fields = ["running_mean", "running_var", "weight", "bias"]
    for field in [*fields, "num_batches_tracked"] if name == "pool" else fields:
        norm = make_norm(3, True, num_batches_tracked=torch.tensor(0))
        norm = norm._replace(**{field: getattr(norm, field).to("meta")})
        before = [t.clone() for t in norm[:4]]
        with torch.autocast("cpu", enabled=autocast), pytest.raises(ValueError, match=field):
            OPERATORS[name][0]([torch.randn(4, 3, 4, 4)], norm)
        for old, new in zip(before, norm[:4], strict=True):
            assert new.is_meta or torch.equal(old, new)
        norm = make_norm(3, True)
        with pytest.raises(ValueError, match="expected device meta"):
            OPERATORS[name][0]([torch.randn(4, 3, 4, 4, device="meta")], norm)


@pytest.mark.parametrize("value", [-INF, INF, NAN])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_frozen_norm_keeps_infinities_where_they_are(name, dtype, value):
    """Without statistics of the batch, one element has no way to the gradients of the others."""
    x = torch.randn(4, 3, 4, 4).to(dtype)
    x[0, 1, 2, 2] = value
    norm = make_norm(3, False)
    norm = BatchNorm(*(t.to(dtype) for t in norm[:4]))
    ours, plain = (outcome(operator, [x], norm) for operator in OPERATORS[name])
    for found, expected in zip(ours[:4], plain[:4], strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())

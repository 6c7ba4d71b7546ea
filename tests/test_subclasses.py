"""Subclasses of Tensor, as MONAI's and fastai's loaders give: as with plain torch functions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from block_reference import plain_batch_norm
from efficient_densenet import (
    BatchNorm,
    DenseBlock,
    DenseLayer,
    DenseNet,
    SharedStorage,
    bn_relu_max_pool,
    concat_bn_relu,
    convert,
    dense_block,
    recompute_in_backward,
)

torchvision = pytest.importorskip("torchvision")
MetaTensor = pytest.importorskip("monai.data").MetaTensor


class Sub(torch.Tensor):
    pass


class Named(torch.Tensor):
    """Counts the functions that it sees, and overrides a method, as MONAI's does."""

    seen: list = []

    def new_empty(self, size):
        raise AssertionError("called by code that knows plain tensors only")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def as_meta_tensor(x):
    affine = torch.eye(4).double() * 2
    return MetaTensor(x, affine, {"name": "a"}, applied_operations=[{"class": "Flip"}])


MAKE = {
    "Sub": lambda x: x.as_subclass(Sub),
    "Named": lambda x: x.as_subclass(Named),
    "MetaTensor": as_meta_tensor,
    "Parameter": nn.Parameter,
}


def described(x):
    meta = {k: str(v) for k, v in x.meta.items()} if isinstance(x, MetaTensor) else None
    return type(x), meta, getattr(x, "applied_operations", None)


def plain_concat(features, norm, conv):
    return conv(F.relu(plain_batch_norm(torch.cat(features, 1), norm)))


def our_concat(storage):
    def operator(features, norm, conv):
        y = concat_bn_relu(features, *norm[:7], storage=storage)
        with recompute_in_backward(y):
            return conv(y)

    return operator


def plain_pool(features, norm, conv):
    norm = BatchNorm(*(t[:3] for t in norm[:4]), *norm[4:])
    return F.max_pool2d(F.relu(plain_batch_norm(features[0], norm)), 3, 2, 1)


def our_pool(features, norm, conv):
    return bn_relu_max_pool(features[0], BatchNorm(*(t[:3] for t in norm[:4]), *norm[4:]))


OPERATORS = {
    "concat": (our_concat(None), plain_concat),
    "concat in shared memory": (our_concat(SharedStorage()), plain_concat),
    "pool": (our_pool, plain_pool),
}


def run(operator, make, parts, needs_grad, training, inplace):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 2, 1)
    tensors = [torch.randn(2, 3, 6, 6), torch.randn(2, 2, 6, 6)]
    features = [make(t) if part in parts else t for part, t in enumerate(tensors)]
    features = [t.requires_grad_(needs_grad) for t in features]
    buffers = [torch.zeros(5), torch.ones(5)]
    weight, bias = torch.rand(5).requires_grad_(), torch.rand(5).requires_grad_()
    norm = BatchNorm(*buffers, weight, bias, training)
    if "weight" in parts:
        norm = norm._replace(weight=make(weight))
    y = operator(features, norm, conv)
    z = F.relu(y, inplace=True) if inplace else y * 1
    leaves = [weight, bias, *(t for t in features[:1] if needs_grad)]
    gradients = []
    if torch.is_grad_enabled():
        gradients = torch.autograd.grad(z.square().sum(), leaves, allow_unused=True)
    return z, gradients, buffers


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("parts", [(0, 1), (0,), (1,), ("weight",)], ids=str)
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("name", OPERATORS)
def test_as_plain_functions(name, make, parts, training, needs_grad, inplace):
    if make in ("MetaTensor", "Parameter") and "weight" in parts:
        pytest.skip("is not made of a tensor with a graph")
    if make == "Parameter" and not needs_grad:
        needs_grad = True
    ours, plain = (
        run(operator, MAKE[make], parts, needs_grad, training, inplace)
        for operator in OPERATORS[name]
    )
    assert described(ours[0]) == described(plain[0])
    torch.testing.assert_close(torch.Tensor(ours[0].detach()), torch.Tensor(plain[0].detach()))
    for found, expected in zip(ours[1], plain[1], strict=True):
        assert type(found) is type(expected)
        torch.testing.assert_close(found, expected)
    for found, expected in zip(ours[2], plain[2], strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        ours, plain = (
            run(operator, MAKE[make], parts, needs_grad, training, inplace)[0]
            for operator in OPERATORS[name]
        )
    assert described(ours) == described(plain)


def test_the_operator_is_what_a_subclass_sees():
    """And not what the operator is made of."""
    x = torch.randn(2, 3, 6, 6).as_subclass(Named)
    ones = torch.ones(3)
    Named.seen.clear()
    concat_bn_relu([x], ones, ones)
    bn_relu_max_pool(x, BatchNorm(ones, ones))
    assert Named.seen == [concat_bn_relu, bn_relu_max_pool]


def test_shared_storage_serves_subclasses():
    storage = SharedStorage()
    x = torch.randn(2, 3, 6, 6, requires_grad=True).as_subclass(Sub)
    y = concat_bn_relu([x], None, None, training=True, storage=storage)
    assert storage.nbytes == y.numel() * 4


def test_wrong_arguments_are_named():
    x = torch.randn(2, 3, 6, 6).as_subclass(Sub)
    with pytest.raises(ValueError, match=r"running_mean: expected shape \[3\]"):
        concat_bn_relu([x], torch.zeros(2), torch.ones(3))
    with pytest.raises(TypeError, match=r"features\[1\]: expected a tensor, got int"):
        concat_bn_relu([x, 3], torch.zeros(3), torch.ones(3))
    with pytest.raises(TypeError, match="features: expected a list or tuple"):
        concat_bn_relu(x, torch.zeros(3), torch.ones(3))
    with pytest.raises(TypeError, match="norm: expected a BatchNorm"):
        bn_relu_max_pool(x, None)


# ------------------------------------------------------------------------------------------------
# Blocks and networks


def make_models():
    torch.manual_seed(0)
    block = DenseBlock(2, 8, 4)
    yield "block", block, (2, 8, 6, 6)
    yield "dropping block", DenseBlock(2, 8, 4, drop_rate=0.4), (2, 8, 6, 6)
    yield "network", DenseNet(4, (2, 2), num_init_features=8, efficient=True), (2, 3, 16, 16)
    yield "relu behind", nn.Sequential(DenseBlock(2, 8, 4), nn.ReLU()), (2, 8, 6, 6)


MODELS = {name: (model, shape) for name, model, shape in make_models()}


def step_of(model, x, needs_grad):
    torch.manual_seed(1)
    x = x.detach().requires_grad_(needs_grad)
    y = model(x)
    y.square().sum().backward()
    return y, [p.grad for p in model.parameters()], x.grad, list(model.buffers())


def without_fusion(model):
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(module, "efficient"):
            module.efficient = False
    return plain


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", ["Sub", "Named", "MetaTensor"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, make, training, needs_grad):
    model, shape = MODELS[name]
    model = copy.deepcopy(model).train(training)
    x = MAKE[make](torch.randn(shape))
    ours, plain = (step_of(m, x, needs_grad) for m in (model, without_fusion(model)))
    assert described(ours[0]) == described(plain[0])
    leaves = (torch.utils._pytree.tree_leaves(step[1:]) for step in (ours, plain))
    for found, expected in zip(*leaves, strict=True):
        if expected is None:
            assert found is None
            continue
        assert type(found) is type(expected)
        torch.testing.assert_close(
            torch.Tensor(found), torch.Tensor(expected), rtol=1e-3, atol=1e-3
        )
    with torch.no_grad():
        ours, plain = model(x), without_fusion(model)(x)
    assert described(ours) == described(plain)


@pytest.mark.parametrize("make", ["Sub", "MetaTensor"])
def test_converted_with_a_relu_in_place(make):
    """torchvision applies one to what the features return."""
    torch.manual_seed(0)
    plain = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)
    model = convert(copy.deepcopy(plain))
    x = MAKE[make](torch.randn(2, 3, 64, 64))
    ours, expected = (step_of(m, x, True) for m in (model, plain))
    assert described(ours[0]) == described(expected[0])
    torch.testing.assert_close(
        torch.Tensor(ours[0]), torch.Tensor(expected[0]), rtol=1e-3, atol=1e-3
    )


def test_a_subclass_sees_the_block_as_one_function():
    block, shape = MODELS["block"]
    x = torch.randn(shape).as_subclass(Named)
    layers = [
        DenseLayer(BatchNorm(None, None, training=True), torch.randn(4, 8 + 2 * i, 1, 1),
                   BatchNorm(None, None, training=True), torch.randn(2, 4, 3, 3))
        for i in range(2)
    ]  # fmt: skip
    Named.seen.clear()
    assert type(dense_block(x, layers)) is Named
    assert Named.seen == [dense_block]


@pytest.mark.parametrize("field", ["conv1", "conv2", "norm1.weight"])
def test_a_weight_of_a_subclass(field):
    weights = [torch.randn(4, 8, 1, 1), torch.randn(2, 4, 3, 3), torch.rand(8)]
    x = torch.randn(2, 8, 5, 5)

    def run_with(weights):
        norm1 = BatchNorm(None, None, weights[2], training=True)
        norm2 = BatchNorm(None, None, training=True)
        return dense_block(x, [DenseLayer(norm1, weights[0], norm2, weights[1])])

    expected = run_with(weights)
    place = ["conv1", "conv2", "norm1.weight"].index(field)
    weights[place] = weights[place].as_subclass(Sub).requires_grad_()
    found = run_with(weights)
    assert type(found) is Sub
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
    found.sum().backward()
    assert weights[place].grad.shape == weights[place].shape

"""Differentiable once, backwards: whatever asks for more gets an error, never another number."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import functional, grad

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
)
from efficient_densenet.block_spec import Pool
from efficient_densenet.dense_block import describe, run_dense_block

TWICE = "cannot be differentiated twice; use plain modules"


def concatenated(x, weight, bias, training=True):
    running = (None, None) if training else (torch.zeros(5), torch.ones(5))
    running = [t if t is None else t.to(x) for t in running]
    features = [x, x[:, :2] * 2]
    return concat_bn_relu(features, *running, weight, bias, training, storage=SharedStorage())


def pooled(x, weight, bias, training=True):
    x = torch.cat([x, x[:, :2] * 2], 1)
    running = (None, None) if training else (torch.zeros(5).to(x), torch.ones(5).to(x))
    return bn_relu_max_pool(x, BatchNorm(*running, weight, bias, training))


def block(x, weight, bias, training=True, **options):
    """A dense block of one layer, with the given weight and bias in its first norm."""
    x = torch.cat([x, x[:, :2] * 2], 1)
    running = [(None, None) if training else (torch.zeros(n).to(x), torch.ones(n).to(x))
               for n in (5, 4)]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    conv1, conv2 = (
        torch.randn(size, generator=generator).to(x) for size in ((4, 5, 1, 1), (2, 4, 3, 3))
    )
    norm1, norm2 = (
        BatchNorm(*running[0], weight, bias, training), BatchNorm(*running[1], training=training)
    )  # fmt: skip
    layers, reader = [DenseLayer(norm1, conv1, norm2, conv2)], None
    if not options:
        return dense_block(x, layers)
    if options.get("reads"):
        reader = BatchNorm(None, None, training=True)
    return run_dense_block(*describe(x, layers, reader=reader, pool=Pool.IMAGES), x)


def block_and_reader(x, weight, bias, training=True):
    return block(x, weight, bias, training, reads=True)


OPERATORS = pytest.mark.parametrize("operator", [concatenated, pooled, block, block_and_reader])


def inputs(device="cpu"):
    x = torch.randn(4, 3, 4, 5, dtype=torch.float64, device=device)
    return [x, *(torch.rand(5, dtype=torch.float64, device=device) for _ in range(2))]


def scalar(operator, *arguments, **options):
    return operator(*arguments, **options).pow(3).sum()


def hutchinson(f, tensors):
    tensors = [t.requires_grad_() for t in tensors]
    first = grad(f(*tensors), tensors, create_graph=True)
    return grad(first, tensors, [torch.ones_like(g) for g in first], allow_unused=True)


def mixed(wanted, by):
    """d / d(inputs[by]) of the gradient with respect to inputs[wanted] alone."""

    def derivative(f, tensors):
        tensors = [t.requires_grad_() for t in tensors]
        (first,) = grad(f(*tensors), [tensors[wanted]], create_graph=True)
        return grad(first.sum(), [tensors[by]], allow_unused=True)

    return derivative


def penalty(f, tensors):
    tensors = [t.requires_grad_() for t in tensors]
    first = grad(f(*tensors), tensors, create_graph=True)
    sum(g.square().sum() for g in first).backward()


def in_terms_of_the_incoming_gradient(f, tensors):
    tensors = [t.requires_grad_() for t in tensors]
    v = torch.ones((), dtype=torch.float64, requires_grad=True)
    first = grad(f(*tensors), tensors[:1], v, create_graph=True)
    grad(first[0].sum(), [v])


ones = torch.ones_like
SECOND = {
    "hvp": lambda f, t: functional.hvp(f, tuple(t), tuple(map(ones, t))),
    "vhp": lambda f, t: functional.vhp(f, tuple(t), tuple(map(ones, t))),
    "hvp of one": lambda f, t: functional.hvp(lambda x: f(x, *t[1:]), t[0], ones(t[0])),
    "vhp of weight": lambda f, t: functional.vhp(lambda w: f(t[0], w, t[2]), t[1], ones(t[1])),
    "hessian": lambda f, t: functional.hessian(f, tuple(t)),
    "hessian of bias": lambda f, t: functional.hessian(lambda b: f(t[0], t[1], b), t[2]),
    "jvp": lambda f, t: functional.jvp(f, tuple(t), tuple(map(ones, t))),
    "jvp of one": lambda f, t: functional.jvp(lambda x: f(x, *t[1:]), t[0], ones(t[0])),
    "hutchinson": hutchinson,
    "mixed x weight": mixed(0, 1),
    "mixed weight x": mixed(1, 0),
    "mixed bias bias": mixed(2, 2),
    "penalty": penalty,
    "incoming": in_terms_of_the_incoming_gradient,
}


@OPERATORS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_are_refused(device, operator, training, name):
    with pytest.raises(RuntimeError, match=TWICE):
        SECOND[name](lambda *t: scalar(operator, *t, training=training), inputs(device))


@OPERATORS
def test_first_derivatives_with_a_graph(device, operator):
    x, weight, bias = (t.requires_grad_() for t in inputs(device))
    expected = grad(scalar(operator, x, weight, bias), [x, weight, bias])
    found = grad(scalar(operator, x, weight, bias), [x, weight, bias], create_graph=True)
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours, plain)
    # What does not depend on the operator can be differentiated.
    (first,) = grad(
        (x**3).sum() + 0 * scalar(operator, x.detach(), weight, bias), x, None, True, True
    )
    assert torch.equal(grad(first.sum(), x)[0], 6 * x)


@OPERATORS
def test_the_graph_of_a_gradient_does_not_keep_the_inputs_alive(operator):
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        x, weight, bias = (t.requires_grad_() for t in inputs())
        alive = weakref.ref(x)
        gradients = grad(scalar(operator, x, weight, bias), [x, weight, bias], create_graph=True)
        del x, weight, bias, gradients
        assert alive() is None
    finally:
        gc.enable()


@OPERATORS
def test_batched_gradients_are_refused(device, operator):
    x, weight, bias = (t.requires_grad_() for t in inputs(device))
    y = operator(x, weight, bias)
    with pytest.raises(RuntimeError, match="gradients cannot be batched .*is_grads_batched"):
        grad(y, [x], torch.stack([torch.ones_like(y)] * 2), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="gradients cannot be batched"):
        functional.jacobian(lambda x: operator(x, weight, bias), x.detach(), vectorize=True)


@pytest.mark.parametrize("operator", [concatenated, pooled])
def test_jacobian_row_by_row(operator):
    x, weight, bias = inputs()
    x = x[:2, :, :2, :2]

    def plain(x):
        y = F.relu(F.batch_norm(torch.cat([x, x[:, :2] * 2], 1), None, None, weight, bias, True))
        return y if operator is concatenated else F.max_pool2d(y, 3, 2, 1)

    ours = functional.jacobian(lambda x: operator(x, weight, bias), x)
    torch.testing.assert_close(ours, functional.jacobian(plain, x))


@OPERATORS
def test_transforms_and_tangents_are_refused(operator):
    x, weight, bias = inputs()
    with pytest.raises(RuntimeError, match="torch.func's transforms"):
        torch.func.grad(lambda x: scalar(operator, x, weight, bias))(x)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="forward-mode differentiation"),
    ):
        operator(torch.autograd.forward_ad.make_dual(x, x), weight, bias)


def test_functional_operators_refuse_too(device):
    x, weight, bias = (t.requires_grad_() for t in inputs(device))
    weight, bias = weight[:3], bias[:3]
    operator = torch.ops.efficient_densenet.functional_bn_relu_max_pool
    y = operator(x, weight, bias, None, None, 1e-5, True)[0]
    (first,) = grad(y.square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        grad(first.sum(), [x])


def torchvision_network():
    TorchvisionDenseNet = pytest.importorskip("torchvision.models").DenseNet

    return convert(TorchvisionDenseNet(4, (2, 2), 8, num_classes=3), strict=True)


MODELS = {
    "block": (lambda: DenseBlock(2, 3, 4), (2, 3, 4, 4)),
    "network": (
        lambda: DenseNet(4, (2, 2), num_init_features=8, efficient=True), (2, 3, 8, 8)
    ),
    "converted": (torchvision_network, (2, 3, 40, 40)),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["hvp", "vhp", "jvp", "hutchinson"])
@pytest.mark.parametrize("model", MODELS)
def test_models_refuse_second_derivatives(device, model, name, training):
    make, shape = MODELS[model]
    model = make().to(device).double().train(training)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=TWICE):
        SECOND[name](lambda x: model(x).pow(3).sum(), [x])


@pytest.mark.parametrize("model", MODELS)
def test_models_refuse_second_derivatives_by_parameters(device, model):
    """Of each parameter's gradient, by each parameter alone."""
    make, shape = MODELS[model]
    model = make().to(device).double()
    parameters = list(model.parameters())
    y = model(torch.randn(shape, dtype=torch.float64, device=device))
    gradients = grad(y.pow(3).sum(), parameters, create_graph=True)
    for first in range(0, len(parameters) - 2, 3):
        for second in range(0, len(parameters) - 2, 4):
            with pytest.raises(RuntimeError, match=TWICE):
                grad(gradients[first].sum(), parameters[second], retain_graph=True)

"""The stem under compilers: one functional operator in one graph, with the eager one's results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficient_densenet import BatchNorm, bn_relu_max_pool
from reference import FORMATS
from test_bn_relu_max_pool import SIXTEEN_BITS, make_norm, make_problem, run


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS[:3])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled(backend, memory_format, training):
    """One node in one graph: the same results, of the same strides, as the eager operator."""
    torch._dynamo.reset()
    count = torch.tensor(2)
    options = dict(memory_format=memory_format, training=training, num_batches_tracked=count)
    nodes = []

    def backend_that_looks(graph, examples):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend(backend)(graph, examples)

    compiled = torch.compile(bn_relu_max_pool, backend=backend_that_looks, fullgraph=True)
    for batch in (4, 0):
        x, norm, grad_y = make_problem((batch, 6, 9, 7), torch.float32, "cpu", **options)
        ours, eager = (run(f, x, norm, grad_y) for f in (compiled, bn_relu_max_pool))
        assert ours.keys() == eager.keys()
        for name in eager:
            torch.testing.assert_close(ours[name], eager[name])
            assert ours[name].stride() == eager[name].stride(), name
    assert sum("functional_bn_relu_max_pool" in node for node in nodes) == 2
    assert sum("update_running_statistics" in node for node in nodes) == 2 * training


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_compiled_autocast(dtype):
    torch._dynamo.reset()
    x, norm, grad_y = make_problem((4, 6, 9, 7), torch.float32, "cpu")

    def step(x, norm):
        with torch.autocast("cpu", dtype):
            return bn_relu_max_pool(x, norm).float()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours, eager = (run(f, x, norm, grad_y) for f in (compiled, step))
    for name in eager:
        torch.testing.assert_close(ours[name], eager[name])


def test_compiled_one_value_per_channel():
    torch._dynamo.reset()
    norm = make_norm(3, "cpu", torch.float32)
    before = norm.running_mean.clone()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        torch.compile(bn_relu_max_pool, backend="aot_eager")(torch.randn(1, 3, 1, 1), norm)
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS[:3])
@pytest.mark.parametrize("batch", [3, 0])
def test_opcheck_of_functional_operators(device, batch, memory_format, affine, training):
    if batch == 0 and memory_format == "strided":
        pytest.skip("opcheck cannot copy such an input")
    ops = torch.ops.efficient_densenet
    x, norm, grad_y = make_problem(
        (batch, 4, 5, 6), torch.float32, device, None, memory_format, affine=affine
    )
    parameters = [t if t is None else t.requires_grad_() for t in (norm.weight, norm.bias)]
    running = (None, None) if training else (norm.running_mean, norm.running_var)
    inputs = (x.detach().requires_grad_(), *parameters, *running, 1e-5, True)
    torch.library.opcheck(ops.functional_bn_relu_max_pool.default, inputs)
    with torch.no_grad():
        _, mean, var, winners = ops.functional_bn_relu_max_pool(*inputs)
        inputs = (grad_y, winners, x, *parameters, mean, var, 1e-5, training)
        # Its gradient is an error, which opcheck's tests of autograd would meet.
        torch.library.opcheck(
            ops.functional_bn_relu_max_pool_backward.default,
            tuple(t.detach() if isinstance(t, Tensor) else t for t in inputs),
        )


def test_meta(device):
    """As eager, without memory: shapes, strides and dtypes."""
    x, norm, grad_y = make_problem((4, 6, 9, 7), torch.float32, device, None, "channels_last")
    expected = run(bn_relu_max_pool, x, norm, grad_y)
    on_meta = BatchNorm(*(t.to("meta") for t in norm[:4]), *norm[4:])
    found = run(bn_relu_max_pool, x.to("meta"), on_meta, grad_y.to("meta"))
    for name in expected:
        assert found[name].is_meta and found[name].dtype == expected[name].dtype
        assert found[name].shape == expected[name].shape
        assert found[name].stride() == expected[name].stride()

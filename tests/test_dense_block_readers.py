"""The dense block with what runs inside: its last reader, and the convolution in front."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from block_reference import (
    FEW,
    MODIFIED,
    SHAPES,
    TINY,
    assert_block_matches,
    assert_same,
    block_errors,
    by_dtype,
    cast_norm,
    kept_by,
    make_block_problem,
    make_reader,
    plain_batch_norm,
    plain_dense_block,
    run,
)
from efficient_densenet import dense_block_formulas
from efficient_densenet.block_spec import Pool
from efficient_densenet.dense_block import describe, run_dense_block
from reference import (
    FORMATS,
    assert_error_rule,
    compare,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# The last reader


def plain_reader(x, layers, norm, pool):
    y = F.relu(plain_batch_norm(plain_dense_block(x, layers), norm))
    spatial = range(2, x.dim())
    if pool == Pool.WINDOWS:  # F.avg_pool3d has no 16-bit types on the CPU
        for d in spatial:
            y = y.unfold(d, 2, 2)
        return y.flatten(x.dim()).mean(-1)
    return y.mean(list(spatial), keepdim=True) if pool == Pool.IMAGES else y


def fused_reader(x, layers, norm, pool):
    return run_dense_block(*describe(x, layers, reader=norm, pool=pool), x)


def read(operator, problem, norm, pool):
    """Result, gradients and new statistics of a block with its last reader, by name."""
    p, generator = problem.fresh(), torch.Generator().manual_seed(1)
    statistics = {n: getattr(norm, n).clone() for n in ("running_mean", "running_var")}
    leaves = {n: getattr(norm, n).detach().requires_grad_() for n in ("weight", "bias")}
    y = operator(p.x, p.layers, norm._replace(**statistics, **leaves), pool)
    grad_y = torch.randn(y.shape, generator=generator).to(y)
    inputs = {**p.inputs(), **leaves}
    gradients = torch.autograd.grad(y, list(inputs.values()), grad_y)
    named = {f"grad {name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {"y": y.detach(), **named, **statistics, **p.statistics()}


def assert_reader_matches(problem, pool, training=True, factor=2):
    norm = make_reader(problem, training)
    ours, torchs = (read(f, problem, norm, pool) for f in (fused_reader, plain_reader))
    wide = problem.to(torch.float64), cast_norm(norm, torch.float64)
    found = compare(ours, torchs, read(plain_reader, *wide, pool))
    assert_error_rule(found, problem.x.dtype, factor)
    assert_same(read(fused_reader, problem, norm, pool), ours)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [Pool.NONE, Pool.WINDOWS, Pool.IMAGES])
@pytest.mark.parametrize(
    "shape", [(4, 15), (3, 4, 6), (3, 5, 7), (2, 3, 4, 5), (40, 1, 1), (1, 33, 70)], ids=str
)
@by_dtype()
def test_reader(device, dtype, shape, pool, training):
    if pool == Pool.WINDOWS and min(shape[1:]) < 2:
        pytest.skip("nothing to pool")
    problem = make_block_problem(shape, dtype, device, num_layers=1, channels=9)
    assert_reader_matches(problem, pool, training)


@pytest.mark.parametrize("shape", [(3, 300, 41), (1, 31, 33, 32)], ids=str)
@by_dtype(torch.float64, torch.float32, torch.bfloat16)
def test_averages_of_large_images(device, dtype, shape, all_threads):
    """Up to three times torch's error in float32, why: docs/design.md, "The head"."""
    problem = make_block_problem(shape, dtype, device, num_layers=1, channels=125)
    assert_reader_matches(problem, Pool.IMAGES, factor=3 if dtype == torch.float32 else 2)


# The convolution in front


def entered(x, layers, drop_rate=0.0, recompute="bottleneck", entry=None):
    return run_dense_block(*describe(x, layers, drop_rate, recompute, projection=entry), x)


PRODUCTS = pytest.mark.parametrize("products", [True, False], ids=["products", "convolutions"])


@pytest.fixture
def as_products(products, monkeypatch):
    """Where torch's settings ask for it, a convolution in front is not a matrix product."""
    if not products:
        settings = lambda *args: (False, False)  # noqa: E731
        monkeypatch.setattr(dense_block_formulas, "precision_settings", settings)


@PRODUCTS
@pytest.mark.parametrize("norms", ["training", "mixed"])
@pytest.mark.parametrize("memory_format", FORMATS[:3])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 1, 1), (1, 7, 1)], ids=str)
@by_dtype()
def test_entry(device, dtype, shape, memory_format, norms, as_products):
    settings = dict(norms=norms, memory_format=memory_format, entry_channels=5)
    problem = make_block_problem(shape, dtype, device, **settings)
    assert_block_matches(problem, entered)
    assert_same(run(entered, problem), run(entered, problem))


@PRODUCTS
@pytest.mark.parametrize("shape", TINY, ids=str)
def test_gradcheck_of_an_entry(device, shape, as_products):
    problem = make_block_problem(shape, torch.float64, device, entry_channels=3, **FEW)

    def function(x, entry):
        return entered(x, problem.fresh().layers, entry=entry)

    inputs = problem.x, problem.entry
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12, fast_mode=False)


FROZEN_BEFORE = ["x", "entry", "x entry", "layers", "x layers", "entry layers"]


@PRODUCTS
@pytest.mark.parametrize("frozen", FROZEN_BEFORE)
def test_frozen_entry(device, frozen, as_products):
    settings = dict(dtype=torch.float64, device=device, entry_channels=5)
    names = frozen.split()
    problem = make_block_problem(**settings, frozen=lambda name: name.partition("[")[0] in names)
    assert_block_matches(problem, entered)
    saved = kept_by(entered, make_block_problem(**settings)) - kept_by(entered, problem)
    assert saved == (problem.x.nbytes if frozen == "x entry" else 0)


def test_a_gradient_of_the_layers_alone(device):
    p = make_block_problem(device=device, entry_channels=5).fresh()
    y, weight = entered(p.x, p.layers, entry=p.entry), p.layers[0].conv1
    (alone,) = torch.autograd.grad(y.sum(), weight, retain_graph=True)
    y.sum().backward()
    assert torch.equal(alone, weight.grad)


@pytest.mark.parametrize("backward_inside", [False, True])
@by_dtype(torch.float16, torch.bfloat16)
def test_autocast_of_an_entry(device, dtype, backward_inside):
    settings = dict(norm_dtype=torch.float32, entry_channels=5)
    problem = make_block_problem(dtype=dtype, device=device, **settings).to(torch.float32)
    autocast = partial(torch.autocast, device, dtype)
    backward_in = autocast if backward_inside else nullcontext
    found = block_errors(problem, entered, forward_in=autocast, backward_in=backward_in)
    assert_error_rule(found, dtype)


def test_an_entry_of_an_empty_batch(device):
    p = make_block_problem(device=device, entry_channels=5).fresh()
    y = entered(p.x[:0], p.layers, entry=p.entry)
    assert y.shape == (0, 16, 4, 6)
    y.sum().backward()
    assert p.x.grad.shape == p.x.shape and not p.entry.grad.any()


@pytest.mark.parametrize("changed", ["x", "entry"])
def test_an_entry_changed_before_backward(device, changed):
    settings = dict(entry_channels=5, memory_format="channels_last")
    p = make_block_problem(device=device, **settings).fresh()
    y = entered(p.x, p.layers, entry=p.entry)
    p.inputs()[changed].detach().mul_(2)
    with pytest.raises(RuntimeError, match=MODIFIED):
        y.sum().backward()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(entry=lambda t: t[:, :4]), r"projection: expected shape \[7, 5, 1, 1\], got .*4"),
        (dict(entry=lambda t: t.repeat(1, 1, 3, 3)), "projection: expected shape"),
        (dict(entry=torch.Tensor.double), "projection: expected torch.float32"),
        (dict(entry=lambda t: t.to("meta")), "projection: expected device"),
        (dict(drop_rate=0.2), "projection: expected None with dropout, got drop_rate 0.2"),
    ],
)
def test_wrong_entries(device, options, message):
    p = make_block_problem(device=device, entry_channels=5).fresh()
    change = options.get("entry", lambda t: t)
    with pytest.raises((ValueError, TypeError), match=message):
        entered(p.x, p.layers, options.get("drop_rate", 0), entry=change(p.entry))

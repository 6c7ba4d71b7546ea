"""The dense block: values, gradients, statistics, the settings of the user, and arguments."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from block_reference import (
    BOTH,
    FEW,
    MODES,
    RECOMPUTE,
    SHAPES,
    TINY,
    assert_block_matches,
    assert_same,
    block_errors,
    by_dtype,
    make_block_problem,
    map_tensors,
    plain_dense_block,
    run,
)
from efficient_densenet import dense_block
from reference import (
    DTYPES,
    FORMATS,
    assert_error_ratio,
    assert_error_rule,
    relative_error,
    requires_cuda,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# Values, gradients and statistics


@BOTH
@pytest.mark.parametrize("norms", MODES)
@pytest.mark.parametrize("memory_format", FORMATS[:3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@by_dtype()
def test_matches_plain_torch(device, dtype, shape, memory_format, norms, recompute):
    problem = make_block_problem(shape, dtype, device, norms=norms, memory_format=memory_format)
    assert_block_matches(problem, recompute=recompute)


@BOTH
@pytest.mark.parametrize("drop_rate", [0, 0.3])
@pytest.mark.parametrize("norms", MODES)
@pytest.mark.parametrize("shape", TINY, ids=str)
def test_gradcheck(device, shape, norms, drop_rate, recompute):
    settings = dict(norms=norms, drop_rate=drop_rate, **FEW)
    problem = make_block_problem(shape, torch.float64, device, **settings)
    names = list(problem.inputs())

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        p = problem.fresh()  # gradcheck's repeated calls must not see each other's statistics
        layers = map_tensors(p.layers, lambda name, t: given.get(name, t))
        torch.manual_seed(p.seed)
        return dense_block(given["x"], layers, drop_rate, recompute)

    inputs = tuple(problem.inputs().values())
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12, fast_mode=False)


SIZES = {
    "k=1": dict(growth_rate=1),
    "k=5, C0=24, B=9": dict(growth_rate=5, channels=24, bottleneck=9),
    "k=12, C0=24, two layers": dict(growth_rate=12, channels=24, num_layers=2),
    "hardly any channels": FEW,
    "one layer": dict(num_layers=1),
    "nine layers": dict(num_layers=9),
    "batch of one": dict(shape=(1, 7, 5)),
    "1x1 images": dict(shape=(40, 1, 1)),
    "images of one column": dict(shape=(3, 9, 1)),
    "1x1 kernel": dict(kernel_size=1),
    "5x5 kernel": dict(kernel_size=5, channels=9),
    "B=40 wider than all": dict(bottleneck=40, growth_rate=2),
}


@BOTH
@pytest.mark.parametrize("memory_format", FORMATS[:2])
@pytest.mark.parametrize("sizes", SIZES)
@by_dtype()
def test_sizes(device, dtype, sizes, memory_format, recompute):
    settings = dict(dtype=dtype, device=device, memory_format=memory_format)
    assert_block_matches(make_block_problem(**settings, **SIZES[sizes]), recompute=recompute)


MANY = (3, 150, 101)  # with 200 channels of 4 bytes: more than the scratch of a chunk


@pytest.mark.parametrize("norms", ["training", "mixed"])
@by_dtype(torch.float32, torch.bfloat16)
def test_many_rows(device, dtype, norms, all_threads):
    problem = make_block_problem(
        MANY, dtype, device, num_layers=2, channels=800 // dtype.itemsize, norms=norms
    )
    for recompute in RECOMPUTE:
        assert_block_matches(problem, recompute=recompute)


@by_dtype(torch.float32, torch.bfloat16)
def test_rounding_does_not_add_up(device, dtype, all_threads):
    """What batch norms send back has a sum of 0 over the rows, but for rounding.

    Rounding errors of M rows that are random add up to sqrt(M) times one of them. Taking the same
    small number from numbers that are rounded already makes the same error in every row.
    """

    def excess(block, problem):
        grad_x, own = run(block, problem)["grad x"].double(), problem.grad_y[:, :7].double()
        return relative_error((grad_x - own).sum((0, 2, 3)), torch.zeros(7, device=device))

    settings = dict(num_layers=2, growth_rate=4)
    problems = [make_block_problem(MANY, dtype, device, seed=i, **settings) for i in range(5)]
    ours, torchs = (
        sum(math.log(excess(block, problem)) for problem in problems) / len(problems)
        for block in (dense_block, plain_dense_block)
    )
    assert math.exp(ours - torchs) < 1.4


def test_bfloat16_images_smaller_than_the_kernel(device):
    """Here torch's convolution of channels-last tensors leaves the weight's gradient unwritten."""
    assert_block_matches(make_block_problem((2, 2, 5, 4), torch.bfloat16, device))


@BOTH
def test_empty_batch(device, recompute):
    problem = make_block_problem((2, 4, 4), torch.float32, device)
    ours, plain = problem.fresh(), problem.fresh()
    y = dense_block(ours.x[:0], ours.layers, recompute=recompute)
    assert y.shape == plain_dense_block(plain.x[:0], plain.layers).shape
    y.sum().backward()
    for layer, expected in zip(ours.layers, plain.layers, strict=True):
        assert not layer.conv1.grad.any() and not layer.norm2.weight.grad.any()
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            found = getattr(layer.norm1, name)
            assert torch.equal(found, getattr(expected.norm1, name)), name


class Recorded(TorchDispatchMode):
    """The calls of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "efficient_densenet":
            clone = partial(tree_map_only, torch.Tensor, lambda x: x.detach().clone())
            self.calls.append((func, clone(args)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norms", ["training", "mixed"])
@BOTH
def test_opcheck(device, norms, recompute):
    p = make_block_problem((3, 4, 6), torch.float32, device, norms=norms).fresh()
    with Recorded() as recorded:
        dense_block(p.x, p.layers, 0.2, recompute).sum().backward()
    names = [func.__name__ for func, _ in recorded.calls]
    expected = ["dense_block_layers", "update_running_statistics", "dense_block_layers_backward"]
    assert [name.removesuffix(".default") for name in names] == expected
    for func, args in recorded.calls:
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


VARIANTS = {
    "cumulative average": lambda layer, norm: dict(momentum=None),
    "cumulative average, not counted": lambda layer, norm: dict(momentum=None, counted=False),
    "not counted": lambda layer, norm: dict(counted=False),
    "momentum 0 and 1": lambda layer, norm: dict(momentum=float(norm == 1)),
    "no running statistics": lambda layer, norm: dict(statistics=False),
    "not affine": lambda layer, norm: dict(affine=False),
    "first norm not affine": lambda layer, norm: dict(affine=(layer, norm) != (0, 1)),
    "not affine, evaluation": lambda layer, norm: dict(affine=False, training=False),
    "other eps and momentum": lambda layer, norm: dict(
        eps=10.0 ** -(layer + norm), momentum=0.2 * (layer + norm)
    ),
    "first norms frozen": lambda layer, norm: dict(training=norm == 2),
    "second norms frozen": lambda layer, norm: dict(training=norm == 1),
    "last layer frozen": lambda layer, norm: dict(training=layer < 2),
    "everything mixed": lambda layer, norm: dict(
        training=layer != norm,
        affine=norm == 2 or layer == 2,
        statistics=layer == norm or norm == 1,
        momentum=[0.3, None][norm - 1],
        eps=[1e-5, 1e-3, 1e-1][layer],
    ),
}


@BOTH
@pytest.mark.parametrize("variant", VARIANTS)
@by_dtype()
def test_batch_norm_variants(device, dtype, variant, recompute):
    problem = make_block_problem(dtype=dtype, device=device, norms=VARIANTS[variant])
    found = block_errors(problem, recompute=recompute)
    if variant == "not affine" and dtype.itemsize == 2:  # kinks: no bias to avoid them with
        assert all(ours < 0.3 for ours, _ in found.values())
        found = {name: e for name, e in found.items() if "grad" not in name}
    assert_error_rule(found, dtype)


@BOTH
@pytest.mark.parametrize("norms", MODES)
@by_dtype(torch.float16, torch.bfloat16)
def test_float32_norms(device, dtype, norms, recompute):
    problem = make_block_problem(
        dtype=dtype, device=device, norms=norms, norm_dtype=torch.float32, drop_rate=0.1
    )
    assert_block_matches(problem, recompute=recompute)


@pytest.mark.parametrize(
    "dtype, mean, std",
    [(torch.float32, 1000.0, 1.0), *((dtype, 0.5, 2.0) for dtype in DTYPES[1:])],
    ids=str,
)
def test_error_ratio(device, dtype, mean, std):
    found = {recompute: [] for recompute in RECOMPUTE}
    settings = dict(channels=12, growth_rate=4, norm_dtype=torch.float32, mean=mean, std=std)
    # With fewer rows, torch's own matrix product is less exact than its 1x1 convolution (float32,
    # CPU: 1.7 times the error for 144 rows, 1.1 times for 600).
    for seed in range(40):
        problem = make_block_problem((4, 10, 10), dtype, device, seed=seed, **settings)
        for recompute in RECOMPUTE:
            errors = block_errors(problem, recompute=recompute)
            assert_error_rule(errors, dtype)
            found[recompute] += by_layer(errors)
    for one in found.values():
        assert_error_ratio(one)


def by_layer(errors):
    """One dict per layer with the same names: a layer has too few numbers for a steady mean."""
    common = {name: errors[name] for name in ("y", "grad x")}
    return [
        common | {name.replace(at, ""): e for name, e in errors.items() if at in name}
        for at in ("layers[0].", "layers[1].", "layers[2].")
    ]


@pytest.mark.parametrize("weights_format", FORMATS[:2])
@pytest.mark.parametrize("memory_format", FORMATS[:3])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4, 6), (1, 3, 4, 5)], ids=str)
@by_dtype()
def test_dropout_has_the_masks_of_plain_torch(device, dtype, shape, memory_format, weights_format):
    settings = dict(memory_format=memory_format, num_layers=2, drop_rate=0.4, seed=3)
    if len(shape) > 2:  # modules have no other format for 1-d weights
        settings["weights_format"] = weights_format
    problem = make_block_problem(shape, dtype, device, **settings)
    plain = run(plain_dense_block, problem)["y"]
    after = torch.rand(3, device=device)
    for recompute in RECOMPUTE:
        ours = run(dense_block, problem, recompute=recompute)["y"]
        assert torch.equal(ours == 0, plain == 0)
        assert torch.equal(torch.rand(3, device=device), after)
        assert_block_matches(problem, recompute=recompute)


def test_statistics_are_updated_once(device):
    """By the forward pass alone; the rest of the grid compares their values."""
    p = make_block_problem(device=device).fresh()
    y = dense_block(p.x, p.layers, recompute="features")
    after_forward = {name: t.clone() for name, t in p.statistics().items()}
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert_same(p.statistics(), after_forward)
    counts = [t for name, t in after_forward.items() if "num_batches" in name]
    assert len(counts) == 6 and all(count == 3 for count in counts)  # 2 before


# What wants a gradient

FROZEN = {
    "input": lambda name: name == "x",
    "everything but the input": lambda name: name != "x",
    "everything": lambda name: True,
    "convolutions": lambda name: "conv" in name,
    "norms": lambda name: "norm" in name,
    "weights of norms": lambda name: name.endswith("norm1.weight"),
    "biases of norms": lambda name: name.endswith("bias"),
    "input and first layers": lambda name: name == "x" or "layers[2]" not in name,
    "everything but the first convolution": lambda name: name != "layers[0].conv1",
    "everything but the last convolution": lambda name: name != "layers[2].conv2",
    "everything but a norm": lambda name: name != "layers[1].norm1.weight",
}


@BOTH
@pytest.mark.parametrize("norms", MODES)
@pytest.mark.parametrize("frozen", FROZEN)
@by_dtype(torch.float64, torch.float32)
def test_frozen(device, dtype, frozen, norms, recompute):
    problem = make_block_problem(dtype=dtype, device=device, norms=norms, frozen=FROZEN[frozen])
    assert_block_matches(problem, recompute=recompute)
    p = problem.fresh()
    y = dense_block(p.x, p.layers, recompute=recompute)
    assert y.requires_grad == (frozen != "everything")
    if y.requires_grad:
        y.backward(p.grad_y)
    found = {"x": p.x}
    map_tensors(p.layers, found.setdefault)
    assert {name for name, t in found.items() if t.grad is not None} == p.inputs().keys()


@BOTH
def test_no_weight_gradient_that_nobody_asked_for(recompute):
    def products(frozen):
        problem = make_block_problem(frozen=frozen)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            run(dense_block, problem, recompute=recompute)
        events = profiler.events()
        masks = [e.concrete_inputs[10] for e in events if e.name == "aten::convolution_backward"]
        matrices = sum(e.name in ("aten::mm", "aten::addmm", "aten::bmm") for e in events)
        return sum(mask[1] for mask in masks) + matrices, masks

    everything, _ = products(lambda name: False)
    for frozen, saved in (("conv1", 3), ("conv2", 3), ("conv", 6), ("layers[1].conv", 2)):
        found, masks = products(lambda name, frozen=frozen: frozen in name)
        assert found == everything - saved, frozen
        if frozen == "conv":
            assert not any(mask[1] for mask in masks)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("norms", MODES)
@by_dtype(torch.float32, torch.bfloat16)
def test_without_gradient_mode(device, dtype, norms, mode):
    problem = make_block_problem(dtype=dtype, device=device, norms=norms, drop_rate=0.2)
    expected, p = run(dense_block, problem), problem.fresh()
    torch.manual_seed(p.seed)
    with mode():
        y = dense_block(p.x, p.layers, p.drop_rate)
    assert not y.requires_grad
    ours = {"y": y, **p.statistics()}
    assert_same(ours, {name: expected[name] for name in ours})


# Settings of the user


def run_script(script, *arguments, **environment):
    """What a fresh process prints: some settings can be made only once, or not taken back."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


DETERMINISTIC = """
import sys, torch
from block_reference import dense_block, make_block_problem, run
torch.use_deterministic_algorithms(True)
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for recompute in ("bottleneck", "features"):
        problem = make_block_problem((4, 20, 20), dtype, sys.argv[1], channels=30, drop_rate=0.1)
        first, *others = (run(dense_block, problem, recompute=recompute) for _ in range(4))
        for other in others:
            print(all(torch.equal(other[name], first[name]) for name in first))
"""


def test_same_bits_every_time(device):
    found = run_script(DETERMINISTIC, device, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    assert found == "True\n" * 24


def test_statistics_do_not_depend_on_the_number_of_threads():
    """Nor does anything else that our kernels compute; matrix products are torch's."""
    problem = make_block_problem((5, 40, 30), num_layers=1)
    names = [f"layers[0].norm1.running_{name}" for name in ("mean", "var")]
    first = run(dense_block, problem)
    for count in (2, 3):
        torch.set_num_threads(count)
        again = run(dense_block, problem)
        assert all(torch.equal(again[name], first[name]) for name in names)


TF32 = """
import itertools, json, sys, torch
from block_reference import block_errors, make_block_problem

def use(conv, matmul):
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    if sys.argv[1] == "old":
        cudnn.allow_tf32, cublas.allow_tf32 = conv, matmul
    else:
        cudnn.conv.fp32_precision, cublas.fp32_precision = (
            "tf32" if allowed else "ieee" for allowed in (conv, matmul)
        )

found = []
for conv, matmul, recompute in itertools.product(
    (False, True), (False, True), ("bottleneck", "features")
):
    use(conv, matmul)
    problem = make_block_problem(
        (8, 16, 16), device="cuda", num_layers=2, channels=256, growth_rate=32
    )
    errors = block_errors(problem, recompute=recompute)
    for name in ("y", "grad x", *(f"grad layers[{i}].conv{j}" for i in (0, 1) for j in (1, 2))):
        found.append((f"conv {conv}, matmul {matmul}, {recompute}: {name}", conv, errors[name][0]))
print(json.dumps(found))
"""


@requires_cuda
@pytest.mark.parametrize("api", ["old", "new"])
def test_tf32_follows_the_setting_of_convolutions(api):
    """With 256 products per sum the error is about 3e-7 in float32 and 3e-4 in TF32."""
    for name, allowed, error in json.loads(run_script(TF32, api)):
        assert (error > 1e-5) == allowed, f"{name}: error {error:.3g}"


@BOTH
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("input_dtype", ["float32", "16 bits"])
@by_dtype(torch.float16, torch.bfloat16)
def test_autocast(device, dtype, input_dtype, backward_inside, recompute):
    problem = make_block_problem(dtype=dtype, device=device, norm_dtype=torch.float32)
    x, problem = problem.x.detach(), problem.to(torch.float32)
    if input_dtype == "float32":  # with digits that 16 bits do not hold
        x = x.float() * (1 + torch.finfo(dtype).eps / 4 * torch.randn_like(x.float()))
    problem.x = x.requires_grad_()
    autocast = partial(torch.autocast, device, dtype)
    found = block_errors(  # which compares dtypes with those of plain torch
        problem,
        forward_in=autocast,
        backward_in=autocast if backward_inside else nullcontext,
        recompute=recompute,
    )
    assert_error_rule(found, dtype)
    ours = run(dense_block, problem, forward_in=autocast, recompute=recompute)
    assert all(t.dtype == torch.float32 for name, t in ours.items() if "grad layers" in name)


def test_autocast_leaves_float64_alone(device):
    problem = make_block_problem(dtype=torch.float64, device=device)
    ours = run(dense_block, problem, forward_in=partial(torch.autocast, device, torch.bfloat16))
    assert_same(ours, run(dense_block, problem))


# Wrong arguments


def replace(name, value):
    """The call's arguments with `value(t)` in place of the tensor `name`."""

    def change(arguments):
        layers = map_tensors(arguments["layers"], lambda n, t: value(t) if n == name else t)
        return arguments | dict(layers=layers)

    return change


def give(**values):
    return lambda arguments: arguments | values


def change_x(function):
    return lambda arguments: arguments | dict(x=function(arguments["x"]))


def cut(arguments, sizes, first):
    """All tensors of the layers from `first` on, cut where their name ends as in `sizes`."""

    def function(name, t):
        for end, index in sizes.items():
            if name.endswith(end):
                return t[index]
        return t

    layers = arguments["layers"]
    return arguments | dict(layers=[*layers[:first], *map_tensors(layers[first:], function)])


def even_kernels(arguments):
    return cut(arguments, {"conv2": (..., slice(2), slice(2))}, 0)


def other_growth_rate(arguments):
    return cut(arguments, {"conv2": slice(2)}, 2)


def other_bottleneck(arguments):
    ends = ("conv1", *(f"norm2.{f}" for f in ("running_mean", "running_var", "weight", "bias")))
    sizes = {end: slice(5) for end in ends}
    return cut(arguments, {**sizes, "conv2": (slice(None), slice(5))}, 2)


WRONG = {
    "recompute": (give(recompute="all"), r"recompute: expected .*'?bottleneck.*got .*all"),
    "recompute none": (give(recompute=None), "recompute: expected"),
    "no layers": (give(layers=[]), "layers: expected"),
    "layers of another type": (give(layers=3), "layers: expected"),
    "a layer of another type": (give(layers=[3]), r"layers\[0\]: expected"),
    "x of another type": (give(x=[1.0]), "x: expected"),
    "x without spatial sizes": (change_x(lambda x: x[:, :, 0, 0]), "x: expected"),
    "x of 6 dimensions": (change_x(lambda x: x[..., None, None]), "x: expected"),
    "x of other dimensions": (change_x(lambda x: x[..., None]), r"conv1: expected|x: expected"),
    "x of other channels": (change_x(lambda x: x[:, :5]), "x: expected 7 channels"),
    "x of integers": (change_x(torch.Tensor.int), "x: expected"),
    "x of another dtype": (change_x(torch.Tensor.double), r": expected .*float"),
    "x elsewhere": (change_x(lambda x: x.to("meta")), r": expected .*device"),
    "drop_rate 1": (give(drop_rate=1.0), r"drop_rate: expected .*got 1"),
    "drop_rate < 0": (give(drop_rate=-0.1), r"drop_rate: expected .*got -0.1"),
    "drop_rate nan": (give(drop_rate=float("nan")), "drop_rate: expected"),
    "even kernels": (even_kernels, r"layers\[0\]\.conv2: expected .*odd.*got"),
    "another growth rate": (other_growth_rate, r"layers\[2\]\.conv2: expected .*3.*got .*2"),
    "another bottleneck": (other_bottleneck, r"layers\[2\]\.\w+(\.\w+)?: expected .*12.*got .*5"),
}


def assert_refuses(p, change, message):
    """The message names the argument, what was expected and what came; nothing has changed."""
    before = {name: t.clone() for name, t in p.statistics().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        dense_block(**change(dict(x=p.x, layers=p.layers)))
    assert_same(p.statistics(), before)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(device, wrong):
    assert_refuses(make_block_problem(device=device).fresh(), *WRONG[wrong])


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("layers[1].conv1", lambda t: t[:, :9], "expected .*10.*got .*9"),
        ("layers[1].conv1", lambda t: t.repeat(1, 1, 3, 3), "expected .*got"),
        ("layers[1].conv1", torch.Tensor.half, "expected .*got torch.float16"),
        ("layers[1].conv1", lambda t: t.to("meta"), "expected .*got meta"),
        ("layers[1].conv1", lambda t: None, "expected"),
        ("layers[1].conv2", lambda t: t[:, :3], "expected .*12.*got .*3"),
        ("layers[2].conv2", lambda t: t[..., :1], "expected .*got"),
        ("layers[1].norm1.weight", lambda t: t[:9], "expected .*10.*got .*9"),
        ("layers[1].norm2.bias", torch.Tensor.double, "expected .*got torch.float64"),
        ("layers[2].norm2.running_mean", lambda t: t.repeat(2), "expected .*12.*got .*24"),
        ("layers[2].norm2.running_var", lambda t: t.to("meta"), "expected .*got meta"),
    ],
)
def test_wrong_tensors(device, name, value, message):
    p = make_block_problem(device=device).fresh()
    assert_refuses(p, replace(name, value), f"{re.escape(name)}: {message}")


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_missing_running_statistics(device, name):
    name = f"layers[1].norm2.{name}"
    p = make_block_problem(device=device, norms="evaluation")
    message = f"{re.escape(name)}: expected .*training=False"
    assert_refuses(p, replace(name, lambda t: None), message)


def test_one_value_per_channel(device):
    p = make_block_problem(device=device).fresh()
    message = "Expected more than 1 value per channel when training"
    assert_refuses(p, change_x(lambda x: x[:1, :, :1, :1]), message)
    assert_block_matches(make_block_problem((1, 1, 1), torch.float64, device, norms="evaluation"))

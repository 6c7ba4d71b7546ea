"""Calls every operator of torch.ops.efficient_densenet with mutated arguments, on the CPU.

    python tests/fuzz_operators.py --cases 10000 --seed 0

A call may succeed or raise; a refusal must leave what the operator writes as it was. Overruns are
for AddressSanitizer to see: .ci/sanitize builds with it and runs this. A case depends on the seed
and its number alone. After a crash, --verbose prints each case before it runs, and --first begins
at one.
"""

import argparse
import contextlib
import dataclasses
import math
import random
import time

import torch

import efficient_densenet  # noqa: F401  registers the operators

OPS = torch.ops.efficient_densenet
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHER_DTYPES = [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.int32]
INTS = [-(2**63), -1, 0, 1, 2, 3, 7, 2**31, 2**62, 2**63 - 1]
CONTEXTS = [
    *[contextlib.nullcontext] * 4,
    torch.no_grad,
    torch.inference_mode,
    lambda: torch.autocast("cpu", torch.bfloat16),
]
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-300, 1e300]


@dataclasses.dataclass
class Case:
    """Random numbers, and the tensors that are made of them."""

    random: random.Random

    def tensor(self, sizes, dtype=torch.float32):
        values = torch.randn(*sizes, dtype=torch.float64)
        if self.random.random() < 0.1 and values.numel():
            values.view(-1)[self.random.randrange(values.numel())] = self.random.choice(FLOATS)
        return values.to(dtype)

    def images(self, n, channels, spatial, dtype, extra=0):
        """Channels-last, with more channels between the rows than there are."""
        memory = self.tensor((n, *spatial, channels + extra), dtype)
        return memory.movedim(-1, 1)[:, :channels]

    def sizes(self, least=1, dims=None):
        dims = dims or self.random.randint(1, 3)
        return [self.random.randint(least, 5) for _ in range(dims)]


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def norm_arguments(case, channels, dtype):
    mean, var = case.tensor((channels,), torch.float64), case.tensor((channels,), torch.float64)
    weight, bias = (
        case.tensor((channels,), wide(dtype)) if case.random.random() < 0.7 else None
        for _ in range(2)
    )
    return mean, var.abs(), weight, bias, 1e-5


def feature_list(case, dtype):
    n, spatial = case.random.randint(1, 3), case.sizes(dims=case.random.randint(1, 3))
    counts = [case.random.choice([0, 1, 2, 5, 17]) for _ in range(case.random.randint(1, 4))]
    counts[-1] = max(1, counts[-1])
    features = [
        case.images(n, c, spatial, dtype, case.random.randint(0, 1))
        if case.random.random() < 0.5
        else case.tensor((n, c, *spatial), dtype)
        for c in counts
    ]
    return features, (n, sum(counts), *spatial)


def concat_bn_stats(case, dtype):
    return [feature_list(case, dtype)[0]]


def concat_bn_relu(case, dtype):
    features, sizes = feature_list(case, dtype)
    return [features, *norm_arguments(case, sizes[1], dtype), case.tensor(sizes, dtype)]


def concat_bn_relu_backward(case, dtype):
    features, sizes = feature_list(case, dtype)
    needs = [i for i in range(len(features)) if case.random.random() < 0.7]
    batch = case.random.random() < 0.5
    return [
        case.tensor(sizes, dtype), features, *norm_arguments(case, sizes[1], dtype), batch, needs,
        [torch.empty_like(features[i]) for i in needs],
    ]  # fmt: skip


def pooled_arguments(case, dtype):
    n, channels, spatial = case.random.randint(1, 3), case.random.randint(1, 9), case.sizes()
    x = case.images(n, channels, spatial, dtype)
    y = case.images(n, channels, [(size + 1) // 2 for size in spatial], dtype)
    return x, y, torch.zeros_like(y, dtype=torch.uint8)


def bn_relu_max_pool(case, dtype):
    x, y, winners = pooled_arguments(case, dtype)
    return [x, *norm_arguments(case, x.size(1), dtype), y, winners]


def bn_relu_max_pool_backward(case, dtype):
    x, y, winners = pooled_arguments(case, dtype)
    winners.random_()
    norm = norm_arguments(case, x.size(1), dtype)
    return [y, winners, x, *norm, case.random.random() < 0.5, torch.empty_like(x)]


def update_running_statistics(case, dtype):
    r = case.random
    sizes = [r.randint(1, 9) for _ in range(r.randint(1, 3))]
    batches = [r.randrange(len(sizes)) for _ in range(r.randint(0, 4))]
    begins = [r.randint(0, sizes[i] - 1) for i in batches]
    counts = [sizes[i] - begin for i, begin in zip(batches, begins, strict=True)]
    lists = [[case.tensor((r.choice([0, count]),), dtype) for count in counts] for _ in range(2)]
    tracked = [torch.zeros(() if r.random() < 0.7 else 0, dtype=torch.int64) for _ in begins]
    momentum = [r.choice([0.1, *FLOATS]) for _ in begins]
    cumulative = [r.random() < 0.5 for _ in begins]
    batch = [[case.tensor((size,), torch.float64) for size in sizes] for _ in range(2)]
    rows = [r.choice([0, 2, 9]) for _ in sizes]
    return [*batch, rows, batches, begins, *lists, tracked, momentum, cumulative]


def cut_gradients(case, dtype):
    dims = case.random.randint(1, 5)
    shapes = [[case.random.randint(0, 4) for _ in range(dims)] for _ in range(3)]
    parameters = [case.tensor(shape, dtype) for shape in shapes]
    contiguous = [torch.empty(shape).stride() for shape in shapes]
    strides = [parameter.stride() for parameter in parameters]
    lists = [[n for numbers in per_piece for n in numbers]
             for per_piece in (shapes, contiguous, strides)]  # fmt: skip
    packed = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=dtype)
    return [packed, 0, dims, *lists]


def block_arguments(case, dtype):
    """Of both operators, by name, and a few more."""
    r = case.random
    layers, growth, bottleneck = r.randint(1, 3), r.choice([1, 2, 5]), r.choice([1, 3, 8])
    first, n, spatial = r.choice([1, 2, 7]), r.randint(1, 3), case.sizes()
    channels, rows = first + layers * growth, n * math.prod(spatial)
    kernel = [r.choice([1, 3, 5]) for _ in spatial]
    counts = [first + i * growth for i in range(layers)]
    has_reader, pool = r.random() < 0.5, r.randint(0, 2) if min(spatial) > 1 else 0
    norms = [*counts, *[bottleneck] * layers, *[channels] * has_reader]
    frozen = [i for i in range(len(norms)) if r.random() < 0.3]
    frozen_count = sum(norms[i] for i in frozen)
    projected = r.choice([1, 4]) if r.random() < 0.4 else None
    drops = r.random() < 0.2
    pooled = [[*spatial], [size // 2 for size in spatial], [1] * len(spatial)][pool]
    inputs = first if projected is None else projected
    weights = r.choice([dtype, dtype, torch.float32])
    x = case.images(n, inputs, spatial, dtype)
    if projected is None and r.random() < 0.5:
        x = case.tensor(x.shape, r.choice(DTYPES))
    return {
        "x": x,
        "projection": None if projected is None
        else case.tensor((first, projected, *[1] * len(spatial)), dtype),
        "features": case.images(n, channels, spatial, dtype, r.choice([0, 3])),
        "bottlenecks": case.tensor((layers, rows, bottleneck), dtype) if r.random() < 0.5 else None,
        "statistics": case.tensor((2, channels + layers * bottleneck), torch.float64).abs(),
        "conv1": [
            case.tensor((bottleneck, count, *[1] * len(spatial)), weights) for count in counts
        ],
        "conv2": [case.tensor((growth, bottleneck, *kernel), weights) for _ in counts],
        "affine": case.tensor((2, sum(norms)), wide(dtype)),
        "frozen": case.tensor((2, frozen_count), torch.float64).abs() if frozen else None,
        "frozen_norms": frozen,
        "eps": [1e-5] * len(norms),
        "dropout_mask": case.tensor((layers, n, *spatial, growth)) > 0 if drops else None,
        "dropout_scale": 2.0,
        "pool": pool,
        "allow_tf32": r.random() < 0.5,
        "products_match_convolutions": r.random() < 0.5,
    }, has_reader, case.images(n, channels, pooled, dtype)  # fmt: skip


def dense_block_layers(case, dtype):
    arguments, has_reader, y = block_arguments(case, dtype)
    return [*arguments.values(), case.random.random() < 0.5, y if has_reader else None]


def dense_block_layers_backward(case, dtype):
    arguments, has_reader, y = block_arguments(case, dtype)
    r, features = case.random, arguments["features"]
    del arguments["x"], arguments["projection"]
    layers, conv1, conv2 = len(arguments["conv2"]), arguments["conv1"], arguments["conv2"]
    needs = [[r.randint(0, 1) for _ in range(layers)] for _ in range(2)]
    n, channels, *spatial = features.shape
    growth, bottleneck, *kernel = conv2[0].shape
    weights = r.choice([dtype, torch.float32])
    inputs = channels - layers * growth
    return [
        y if has_reader else case.tensor(features.shape, r.choice(DTYPES)), *arguments.values(),
        has_reader, case.images(n, channels, spatial, wide(dtype)),
        r.choice([None, case.images(n, inputs, spatial, dtype)]),
        torch.empty_like(arguments["affine"]),
        torch.empty(sum(w.numel() for w in conv1), dtype=wide(dtype)) if any(needs[0]) else None,
        needs[0], torch.empty((sum(needs[1]), growth, bottleneck, *kernel), dtype=weights),
        needs[1],
    ]  # fmt: skip


def functional_bn_relu_max_pool(case, dtype):
    x, *_ = pooled_arguments(case, dtype)
    mean, var, weight, bias, eps = norm_arguments(case, x.size(1), dtype)
    running = case.random.choice([(None, None), (mean, var)])
    return [x, weight, bias, *running, eps, case.random.random() < 0.5]


def functional_bn_relu_max_pool_backward(case, dtype):
    x, y, winners = pooled_arguments(case, dtype)
    mean, var, weight, bias, eps = norm_arguments(case, x.size(1), dtype)
    return [y, winners.random_(), x, weight, bias, mean, var, eps, case.random.random() < 0.5]


def convolutions(case, counts, growth, width, dims, dtype):
    """Weights of layers that read so many channels each."""
    conv1 = [case.tensor((width, count, *[1] * dims), dtype) for count in counts]
    conv2 = [case.tensor((growth, width, *[3] * dims), dtype) for _ in counts]
    return conv1, conv2


def dropout_mask(case, dtype):
    r, spatial = case.random, case.sizes()
    layers, growth, first, width = (r.randint(1, 3) for _ in range(4))
    counts = [first + i * growth for i in range(layers)]
    conv1, conv2 = convolutions(case, counts, growth, width, len(spatial), dtype)
    x = case.images(2, first, spatial, dtype)
    return [x, conv1, conv2, dtype, 0.5, r.random() < 0.5, None]


def dense_block(case, dtype):
    r, spatial = case.random, case.sizes()
    layers, growth, first, width = (r.randint(1, 3) for _ in range(4))
    ones, has_reader = [1] * len(spatial), r.random() < 0.5
    counts = [first + i * growth for i in range(layers)]
    norms = [*counts, *[width] * layers, *[first + layers * growth] * has_reader]
    training = [r.random() < 0.7 for _ in norms]
    has_weight, has_bias = ([r.random() < 0.8 for _ in norms] for _ in range(2))
    inputs = r.choice([None, 4])
    lists = [
        [case.tensor((n,), wide(dtype)) for n, here in zip(norms, present, strict=True) if here]
        for present in (has_weight, has_bias, *[[not t for t in training]] * 2)
    ]
    lists[3] = [var.abs() for var in lists[3]]
    return [
        case.images(2, inputs or first, spatial, dtype),
        inputs and case.tensor((first, inputs, *ones), dtype), None, *lists,
        *convolutions(case, counts, growth, width, len(spatial), dtype),
        has_weight, has_bias, training, [1e-5] * len(norms), dtype, 0.0, r.random() < 0.5,
        has_reader, r.randint(0, 2) if has_reader and min(spatial) > 1 else 0,
    ]  # fmt: skip


def dense_block_backward(case, dtype):
    r, arguments = case.random, dense_block(case, dtype)
    x, projection, mask = arguments[:3]
    conv1, conv2 = arguments[7:9]
    result, features, *kept = OPS.dense_block(*arguments)
    has_reader = arguments[-2]
    needs = [[r.random() < 0.7 for _ in conv1] for _ in range(2)]
    return [
        torch.randn_like(result), features if has_reader else result, *kept, mask,
        None if projection is None else x, projection, conv1, conv2, *arguments[11:],
        [*x.shape], r.random() < 0.7, projection is not None, *needs,
    ]  # fmt: skip


def projection_backward(case, dtype):
    r, spatial = case.random, case.sizes()
    n, outputs, inputs = r.randint(1, 3), r.randint(1, 5), r.randint(1, 5)
    return [
        case.images(n, outputs, spatial, dtype, r.choice([0, 2])),
        case.images(n, inputs, spatial, dtype),
        case.tensor((outputs, inputs, *[1] * len(spatial)), dtype), r.random() < 0.5,
        r.choice([None, case.images(n, inputs, spatial, dtype)]),
        r.choice([None, case.tensor((outputs, inputs), dtype)]),
    ]  # fmt: skip


SAMPLES = [
    concat_bn_stats,
    concat_bn_relu,
    concat_bn_relu_backward,
    bn_relu_max_pool,
    bn_relu_max_pool_backward,
    update_running_statistics,
    dense_block_layers,
    dense_block_layers_backward,
    projection_backward,
]
# Those that are written in Python.
PYTHON_SAMPLES = [
    functional_bn_relu_max_pool,
    functional_bn_relu_max_pool_backward,
    dropout_mask,
    dense_block,
    dense_block_backward,
]
# Those that are made of other operators, for any device.
COMPOSITE_SAMPLES = [cut_gradients]


# Arguments of operators that no sample is written for: any values of the right types.
def any_value(case, kind):
    r = case.random
    if kind.startswith("Optional") or kind.endswith("?"):
        kind = kind.removeprefix("Optional[").removesuffix("]").removesuffix("?")
        return None if r.random() < 0.5 else any_value(case, kind)
    if kind.startswith("List"):
        inner = kind.removeprefix("List[").removesuffix("]")
        return [any_value(case, inner) for _ in range(r.randint(0, 4))]
    values = {
        "Tensor": lambda: case.tensor(case.sizes(0, r.randint(1, 5)), r.choice(DTYPES)),
        "int": lambda: r.choice(INTS),
        "bool": lambda: r.random() < 0.5,
        "float": lambda: r.choice([0.5, 1e-5, *FLOATS]),
        "str": lambda: r.choice(["", "bottleneck", "features", "nonsense"]),
    }
    return values[kind]()


def any_arguments(operator):
    def sample(case, dtype):
        schema = operator.default._schema
        return [any_value(case, str(argument.type)) for argument in schema.arguments]

    return sample


def all_samples():
    samples = {
        sample.__name__: sample for sample in (*SAMPLES, *PYTHON_SAMPLES, *COMPOSITE_SAMPLES)
    }
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, short = name.partition("::")
        if namespace == "efficient_densenet" and short not in samples:
            samples[short] = any_arguments(getattr(OPS, short))
    return dict(sorted(samples.items()))


# ------------------------------------------------------------------------------------------------
# Mutations


def other_size(case, tensor):
    if tensor.dim() == 0:
        return tensor.new_zeros(3)
    sizes, d = [*tensor.shape], case.random.randrange(tensor.dim())
    sizes[d] = max(0, case.random.choice([0, 1, sizes[d] - 1, sizes[d] + 1, 2 * sizes[d]]))
    return case.tensor(sizes, tensor.dtype)


def other_dims(case, tensor):
    choices = [tensor.unsqueeze(0), tensor.flatten(), tensor.unsqueeze(-1)]
    if tensor.dim() > 0 and tensor.size(0) > 0:
        choices.append(tensor[0])
    return case.random.choice(choices)


def other_strides(case, tensor):
    if tensor.dim() == 0 or tensor.dtype.is_complex:
        return tensor
    order = case.random.sample(range(tensor.dim()), tensor.dim())
    memory = tensor.permute(order).contiguous()
    return memory.permute([order.index(d) for d in range(tensor.dim())])


def expanded(case, tensor):
    if tensor.numel() == 0 or tensor.dim() == 0:
        return tensor
    d = case.random.randrange(tensor.dim())
    return tensor.narrow(d, 0, 1).expand(tensor.shape)


def overlapping(case, tensor):
    if tensor.numel() == 0 or tensor.dim() == 0:
        return tensor
    strides = [case.random.choice([0, 1, 1, s]) for s in tensor.stride()]
    reach = sum((size - 1) * s for size, s in zip(tensor.shape, strides, strict=True))
    return case.tensor((reach + 1,), tensor.dtype).as_strided(tensor.shape, strides)


def without_memory(case, tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(case.random.choice([0, tensor.nbytes // 2]))
    return tensor


def unaligned(case, tensor):
    memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return memory.copy_(tensor)


TENSORS = {
    "size": other_size,
    "dims": other_dims,
    "strides": other_strides,
    "expanded": expanded,
    "overlapping": overlapping,
    "no memory": without_memory,
    "unaligned": unaligned,
    "dtype": lambda case, t: t.to(case.random.choice([*DTYPES, *OTHER_DTYPES])),
    "meta": lambda case, t: t.to("meta"),
    "leaf": lambda case, t: t.detach().requires_grad_(t.is_floating_point()),
    "sparse": lambda case, t: t.to_sparse() if t.dim() else t,
    "negative": lambda case, t: torch._neg_view(t) if t.is_floating_point() else t,
    "no dims": lambda case, t: t.new_zeros(()),
    "none": lambda case, t: None,
}


def mutated_list(case, values):
    r, values = case.random, [*values]
    what = r.choice(["drop", "repeat", "swap", "one", "empty"])
    if not values:
        return [r.choice(INTS)]
    i = r.randrange(len(values))
    if what == "drop":
        del values[i]
    elif what == "repeat":
        values.insert(i, values[r.randrange(len(values))])
    elif what == "swap":
        values[i] = values[r.randrange(len(values))]
    elif what == "one":
        # Not None: torch prints such a list, and with it tensors that may have no memory.
        value = mutated(case, values[i])
        values[i] = values[i] if value is None else value
    return values if what != "empty" else []


def mutated_tensor(case, tensor):
    if not has_values(tensor):  # torch's own operators would read what is not there
        return tensor
    try:
        return TENSORS[case.random.choice([*TENSORS])](case, tensor)
    except (RuntimeError, NotImplementedError):  # not of one that was mutated before
        return tensor


def mutated(case, value):
    if isinstance(value, torch.Tensor):
        return mutated_tensor(case, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return case.random.choice(INTS)
    if isinstance(value, float):
        return case.random.choice(FLOATS)
    if isinstance(value, list):
        return mutated_list(case, value)
    if isinstance(value, torch.dtype):
        return case.random.choice([*DTYPES, *OTHER_DTYPES])
    return case.tensor(case.sizes(0, case.random.randint(1, 5)))  # None


# ------------------------------------------------------------------------------------------------


def flat(arguments):
    for argument in arguments:
        if isinstance(argument, list):
            yield from flat(argument)
        elif isinstance(argument, torch.Tensor):
            yield argument


def has_values(tensor):
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    reach = sum((size - 1) * s for size, s in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= needed


def values_of(tensor):
    """The bytes of its whole memory."""
    if not has_values(tensor):
        return None
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


def describe(value):
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided:
            return f"{value.layout}"
        return f"{value.dtype}{[*value.shape]}/{[*value.stride()]}@{value.device}"
    if isinstance(value, list):
        return "[" + ", ".join(map(describe, value)) + "]"
    return repr(value)


def run_case(name, sample, seed, verbose=False):
    """Whether the call succeeded."""
    case = Case(random.Random(seed))
    torch.manual_seed(case.random.randrange(2**31))
    dtype = case.random.choice(DTYPES)
    arguments = sample(case, dtype)
    for _ in range(case.random.choice([0, 1, 1, 1, 2, 3])):
        i = case.random.randrange(len(arguments))
        arguments[i] = mutated(case, arguments[i])
    if verbose:
        print(seed, name, *map(describe, arguments), flush=True)
    before = [(tensor, values_of(tensor)) for tensor in flat(arguments)]
    try:
        with case.random.choice(CONTEXTS)():
            getattr(OPS, name)(*arguments)
    except Exception as error:
        if str(error).startswith("efficient_densenet::"):
            for tensor, values in before:
                assert values is None or torch.equal(values_of(tensor), values), (seed, name, error)
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seconds", type=float, help="instead of a number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--operator", help="only this one")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    samples, start, number = all_samples(), time.monotonic(), arguments.first
    if arguments.operator:
        samples = {arguments.operator: samples[arguments.operator]}
    counts = {name: [0, 0] for name in samples}
    while True:
        if arguments.seconds is None and number >= arguments.first + arguments.cases:
            break
        if arguments.seconds is not None and time.monotonic() - start > arguments.seconds:
            break
        name = [*samples][number % len(samples)]
        seed = f"{arguments.seed}:{number}"
        counts[name][run_case(name, samples[name], seed, arguments.verbose)] += 1
        number += 1
    for name, (refused, succeeded) in counts.items():
        print(f"{name}: {succeeded} calls succeeded, {refused} were refused")
    if not any(succeeded for _, succeeded in counts.values()):
        raise SystemExit("no call succeeded: the samples are wrong")


if __name__ == "__main__":
    main()

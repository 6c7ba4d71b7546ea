"""What a dense block has to equal: the plain composition, on problems that have no kinks.

A ReLU whose argument is within rounding of 0 is open or closed by chance, and the one gradient that
then flips outweighs all rounding errors. `reference.py` sets the gradient to 0 there, which cannot
be done inside a block. So the problem itself is chosen: `clear_of_kinks` runs it in float64 and
sets each bias such that 0 falls into the widest gap between the arguments of its channel. Where no
gap is wide enough for the dtype, the channel is wholly open or wholly closed. Gradients of every
dtype can then be held to the same rule as results. A batch norm that has no bias and takes the
statistics of the batch stays as it is: in float32, problems of this size hardly ever meet a kink;
in 16 bits they do, and the test of that case compares no gradients.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_densenet import BatchNorm, DenseLayer, dense_block
from reference import DTYPES, assert_error_rule, compare, in_format, kept_bytes, relative_error

Context = Callable[[], AbstractContextManager]
RECOMPUTE = ["bottleneck", "features"]
SHAPES = [(4, 15), (3, 4, 6), (2, 3, 4, 5)]  # batch and spatial sizes
TINY = [(3, 3), (2, 2, 2), (2, 1, 2, 2)]
FEW = dict(num_layers=2, channels=2, growth_rate=1, bottleneck=3)
BOTH = pytest.mark.parametrize("recompute", RECOMPUTE)

# Options of the batch norm `norm` (1 or 2) of a layer; see `make_block_problem`.
MODES: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "training": lambda layer, norm: {},
    "evaluation": lambda layer, norm: dict(training=False),
    "mixed": lambda layer, norm: dict(training=(layer + norm) % 2 == 0),
}

MODIFIED = "modified by an inplace operation"


def plain_batch_norm(x: Tensor, norm: BatchNorm) -> Tensor:
    """F.batch_norm with the bookkeeping of nn.BatchNorm."""
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.training,
        0.0 if momentum is None else momentum,
        norm.eps,
    )


def cast_norm(norm: BatchNorm, dtype: torch.dtype) -> BatchNorm:
    """All but its count; numbers that a batch moves are copies."""
    fields = ("running_mean", "running_var", "weight", "bias")
    tensors = {name: getattr(norm, name) for name in fields}
    return norm._replace(
        **{n: None if t is None else t.detach().clone().to(dtype) for n, t in tensors.items()}
    )


def plain_dense_block(
    x: Tensor,
    layers: Sequence[DenseLayer],
    drop_rate: float = 0.0,
    recompute: str | None = None,
    batch_norm: Callable[[Tensor, BatchNorm], Tensor] = plain_batch_norm,
    dropout: Callable[[Tensor, float], Tensor] = F.dropout,
    entry: Tensor | None = None,
) -> Tensor:
    convolution = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    features = [x if entry is None else convolution(x, entry)]
    for layer in layers:
        z = convolution(F.relu(batch_norm(torch.cat(features, 1), layer.norm1)), layer.conv1)
        padding = [size // 2 for size in layer.conv2.shape[2:]]
        new = convolution(F.relu(batch_norm(z, layer.norm2)), layer.conv2, padding=padding)
        features.append(dropout(new, drop_rate) if drop_rate > 0 else new)
    return torch.cat(features, 1)


def recording(masks: list[Tensor]) -> Callable[[Tensor, float], Tensor]:
    """F.dropout that appends what it keeps to `masks`."""

    def dropout(x: Tensor, rate: float) -> Tensor:
        y = F.dropout(x, rate)
        masks.append(y.detach() != 0)
        return y

    return dropout


def replaying(masks: Sequence[Tensor]) -> Callable[[Tensor, float], Tensor]:
    """Dropout that keeps what another run kept, in any dtype (F.dropout's mask depends on it)."""
    iterator = iter(masks)
    return lambda x, rate: x * next(iterator) / (1 - rate)


def map_tensors(
    layers: Sequence[DenseLayer], function: Callable[[str, Tensor], Tensor]
) -> list[DenseLayer]:
    """The layers with `function(name, tensor)` in place of each tensor."""

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(name, value)
        if isinstance(value, (BatchNorm, DenseLayer)):
            fields = {f: convert(f"{name}.{f}", getattr(value, f)) for f in value._fields}
            return value._replace(**fields)
        return value

    return [convert(f"layers[{i}]", layer) for i, layer in enumerate(layers)]


def norms_of(layers: Sequence[DenseLayer]) -> Iterator[BatchNorm]:
    for layer in layers:
        yield from (layer.norm1, layer.norm2)


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@dataclasses.dataclass
class BlockProblem:
    """Inputs of one call and the gradient that comes back; a tensor wants a gradient or not."""

    x: Tensor
    layers: list[DenseLayer]
    grad_y: Tensor
    drop_rate: float = 0.0
    seed: int = 0  # of dropout
    entry: Tensor | None = None  # weight of a 1x1 convolution in front of the block

    def to(self, dtype: torch.dtype) -> BlockProblem:
        def convert(name: str, t: Tensor) -> Tensor:
            if not t.dtype.is_floating_point:
                return t
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        return dataclasses.replace(
            self,
            x=convert("x", self.x),
            layers=map_tensors(self.layers, convert),
            grad_y=convert("grad_y", self.grad_y),
            entry=None if self.entry is None else convert("entry", self.entry),
        )

    def fresh(self) -> BlockProblem:
        """Leaves of its own: no gradients yet, and statistics that may be updated."""

        def leaf(name: str, t: Tensor) -> Tensor:
            if is_statistic(name):
                return t.clone()
            return t.detach().requires_grad_(t.requires_grad)

        return dataclasses.replace(
            self,
            x=leaf("x", self.x),
            layers=map_tensors(self.layers, leaf),
            entry=None if self.entry is None else leaf("entry", self.entry),
        )

    def inputs(self) -> dict[str, Tensor]:
        """All that wants a gradient, by name."""
        found = {"x": self.x} | self.options()
        map_tensors(self.layers, found.setdefault)
        return {name: t for name, t in found.items() if t.requires_grad}

    def options(self) -> dict[str, Tensor]:
        """What not every operator takes."""
        return {} if self.entry is None else {"entry": self.entry}

    def statistics(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        map_tensors(self.layers, found.setdefault)
        return {name: t for name, t in found.items() if is_statistic(name)}

    def masks(self) -> list[Tensor]:
        """What dropout keeps in the plain composition."""
        masks: list[Tensor] = []
        if self.drop_rate == 0:
            return masks
        p = self.fresh()
        torch.manual_seed(p.seed)
        plain_dense_block(p.x, p.layers, p.drop_rate, dropout=recording(masks), **p.options())
        return masks


def make_block_problem(
    shape: Sequence[int] = (3, 4, 6),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    num_layers: int = 3,
    channels: int = 7,
    growth_rate: int = 3,
    bottleneck: int | None = None,
    kernel_size: int = 3,
    norms: str | Callable[[int, int], dict[str, Any]] = "training",
    memory_format: str = "contiguous",
    weights_format: str = "contiguous",
    norm_dtype: torch.dtype | None = None,
    frozen: Callable[[str], bool] = lambda name: False,
    drop_rate: float = 0.0,
    mean: float = 0.5,
    std: float = 2.0,
    seed: int = 0,
    entry_channels: int | None = None,
) -> BlockProblem:
    """A random block without kinks for an input of batch and spatial sizes `shape`.

    `norms` is a mode or a function from layer and norm (1 or 2) to options: `training`, `affine`,
    `statistics` (False: no running ones), `counted`, and BatchNorm's `momentum` and `eps`.
    `frozen` says of a tensor's name ("x", "layers[0].conv1") whether it wants no gradient;
    `mean` and `std` are those of the input's channels. With `entry_channels`, the problem's x has
    so many, and a 1x1 convolution makes the block's input of it.
    """
    generator = torch.Generator().manual_seed(seed)
    n, *spatial = shape
    bottleneck = 4 * growth_rate if bottleneck is None else bottleneck
    norms = MODES[norms] if isinstance(norms, str) else norms

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def norm(
        means: Tensor,
        stds: Tensor,
        training=True,
        affine=True,
        statistics=True,
        counted=True,
        **numbers,
    ):
        tensors: dict[str, Tensor | None] = dict(running_mean=None, running_var=None)
        if statistics:
            tensors["running_mean"] = means + 0.1 * stds * randn(len(means))
            tensors["running_var"] = stds**2 * (1 + 0.2 * randn(len(means)).abs())
        if affine:
            tensors["weight"] = 1 + 0.3 * randn(len(means))
            tensors["bias"] = 0.3 * randn(len(means))
        count = torch.tensor(2, device=device) if counted and statistics else None
        return BatchNorm(**tensors, training=training, num_batches_tracked=count, **numbers)

    def weight(*size: int) -> Tensor:  # results of about unit variance
        w = randn(*size) / math.sqrt(0.7 * math.prod(size[1:]))
        return in_format(w, weights_format)

    def make_layer(i: int) -> DenseLayer:
        inputs = channels + i * growth_rate
        new = torch.arange(inputs) >= channels
        means, stds = torch.where(new, 0.0, mean), torch.where(new, 1.0, std)
        return DenseLayer(
            norm(means.double(), stds.double(), **norms(i, 1)),
            weight(bottleneck, inputs, *[1] * len(spatial)),
            norm(torch.zeros(bottleneck), torch.ones(bottleneck), **norms(i, 2)),
            weight(growth_rate, bottleneck, *[kernel_size] * len(spatial)),
        )

    def convert(name: str, t: Tensor) -> Tensor:
        if not t.dtype.is_floating_point:
            return t
        t = t.to(device, (norm_dtype or dtype) if "norm" in name else dtype)
        return t.requires_grad_(not is_statistic(name) and not frozen(name))

    # Two hills with a gap between them: channels of x are partly open in every dtype.
    given = entry_channels or channels
    x = 2.0 * (randn(n, given, *spatial) > 0) - 1 + 0.25 * randn(n, given, *spatial)
    x = (mean + std * x).to(device, dtype)
    layers = map_tensors([make_layer(i) for i in range(num_layers)], convert)
    problem = BlockProblem(
        in_format(x, memory_format).requires_grad_(not frozen("x")),
        layers,
        randn(n, channels + num_layers * growth_rate, *spatial).to(device, dtype),
        drop_rate,
        seed,
    )
    if entry_channels is not None:
        ones = [1] * len(spatial)
        problem.entry = convert("entry", weight(channels, entry_channels, *ones))
    # With a distance of eps, no mask of 90 problems of each dtype and size was found to flip. The
    # statistics that torch takes in float32 lose the digits of a large mean.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * abs(mean) / std)
    clear_of_kinks(problem, max(4 * eps, 1e-5))
    return problem


@torch.no_grad()
def clear_of_kinks(problem: BlockProblem, distance: float) -> None:
    """Sets biases (running means, where there is none) such that no ReLU's argument is near 0."""
    exact = problem.to(torch.float64).fresh()
    pairs = zip(norms_of(exact.layers), norms_of(problem.layers), strict=True)

    def batch_norm(x: Tensor, _: BatchNorm) -> Tensor:
        norm, ours = next(pairs)
        shift = shift_to_a_gap(plain_batch_norm(x, norm), distance)
        if norm.bias is not None:
            ours.bias.copy_(norm.bias + shift)
            norm.bias.copy_(ours.bias)  # rounded
        elif not norm.training:
            factor = 1 if norm.weight is None else norm.weight
            ours.running_mean.copy_(
                norm.running_mean - shift * (norm.running_var + norm.eps).sqrt() / factor
            )
            norm.running_mean.copy_(ours.running_mean)
        return plain_batch_norm(x, norm)

    dropout = replaying(problem.masks())
    settings = dict(batch_norm=batch_norm, dropout=dropout, **exact.options())
    plain_dense_block(exact.x, exact.layers, exact.drop_rate, **settings)


@torch.no_grad()
def clear_model_of_kinks(model: nn.Module, x: Tensor, distance: float) -> None:
    """The same for a whole model on the input x: each of its batch norms is read by a ReLU."""
    exact = copy.deepcopy(model).double()

    def before(norm: Any, ours: Any) -> Callable[..., None]:
        def set_bias(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            z = F.batch_norm(inputs[0], None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
            ours.bias.copy_(norm.bias + shift_to_a_gap(z, distance))
            norm.bias.copy_(ours.bias)  # rounded

        return set_bias

    for norm, ours in zip(exact.modules(), model.modules(), strict=True):
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.register_forward_pre_hook(before(norm, ours))
    exact.train()(x.double())


def shift_to_a_gap(z: Tensor, distance: float) -> Tensor:
    """What to add per channel so that 0 lies in the widest gap between the middle values of z.

    Where that is narrower than `distance` to both sides, the channel opens or, one in four, closes.
    """
    values = z.transpose(0, 1).flatten(1).sort(1).values
    rows = values.size(1)
    gaps = torch.cat([values.diff(dim=1), torch.zeros_like(values[:, :1])], 1)
    gaps[:, : rows // 8] = gaps[:, rows - 1 - rows // 8 :] = 0
    width, index = gaps.max(1)
    middle = values.gather(1, index[:, None])[:, 0] + width / 2
    closed = torch.arange(len(values), device=z.device) % 4 == 1
    room = 2 * distance + 0.1
    whole = torch.where(closed, values[:, -1] + room, values[:, 0] - room)
    return -torch.where(width >= 2 * distance, middle, whole)


def make_reader(problem: BlockProblem, training: bool) -> BatchNorm:
    """A norm over all channels, without kinks."""
    exact = problem.to(torch.float64).fresh()
    z = plain_dense_block(exact.x, exact.layers, **exact.options()).detach()
    channels = torch.arange(z.size(1), device=z.device)
    ones = torch.ones_like(channels, dtype=torch.float64)
    norm = BatchNorm(0.1 * ones, 2 * ones, 1 + 0.1 * torch.sin(channels), 0 * ones, training)

    running = dict.fromkeys(("running_mean", "running_var")) if training else {}
    norm = cast_norm(norm, problem.x.dtype)
    z = plain_batch_norm(z, cast_norm(norm, torch.float64)._replace(**running))
    eps = torch.finfo(problem.x.dtype).eps
    return norm._replace(bias=shift_to_a_gap(z, max(4 * eps, 1e-5)).to(norm.bias))


def run(
    operator: Callable[..., Tensor],
    problem: BlockProblem,
    forward_in: Context = nullcontext,
    backward_in: Context = nullcontext,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Result, gradients and new statistics of one call, by name."""
    p = problem.fresh()
    torch.manual_seed(p.seed)
    with forward_in():
        y = operator(p.x, p.layers, p.drop_rate, **p.options(), **kwargs)
    result = {"y": y.detach().clone()}
    inputs = p.inputs()
    if inputs:
        with backward_in():
            grad_y = p.grad_y.to(y.dtype)  # of another dtype under autocast
            gradients = torch.autograd.grad(y, list(inputs.values()), grad_y)
        result |= {f"grad {name}": g for name, g in zip(inputs, gradients, strict=True)}
    return result | p.statistics()


def block_errors(
    problem: BlockProblem,
    operator: Callable[..., Tensor] = dense_block,
    forward_in: Context = nullcontext,
    backward_in: Context = nullcontext,
    **kwargs: Any,
) -> dict[str, tuple[float, float]]:
    """Per tensor: our error and plain torch's, against float64 from the same rounded inputs."""
    contexts = dict(forward_in=forward_in, backward_in=backward_in)
    masks: list[Tensor] = []
    torchs = run(plain_dense_block, problem, **contexts, dropout=recording(masks))
    exact = run(plain_dense_block, problem.to(torch.float64), dropout=replaying(masks))
    ours = run(operator, problem, **contexts, **kwargs)
    return compare(ours, torchs, exact)


def assert_block_matches(problem: BlockProblem, operator=dense_block, **kwargs: Any) -> None:
    assert_error_rule(block_errors(problem, operator, **kwargs), problem.x.dtype)


def by_dtype(*dtypes):
    return pytest.mark.parametrize("dtype", dtypes or DTYPES, ids=lambda t: str(t)[6:])


def assert_same(ours, expected, bits=True, limit=1e-10):
    """Equal dicts of tensors, to the bit or within a relative error."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if bits:
            assert torch.equal(ours[name], value), name
        else:
            assert ours[name].dtype == value.dtype, name
            error = relative_error(ours[name], value)
            assert error <= limit, f"{name}: error {error:.3g}"


def kept_by(block, problem, **kwargs):
    p, own = problem.fresh(), []
    map_tensors(p.layers, lambda name, t: own.append(t))
    own += p.options().values()
    return kept_bytes(lambda: block(p.x, p.layers, p.drop_rate, **p.options(), **kwargs), own)

"""What the operator has to equal, and the rule for how well (docs/design.md, "The error rule")."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from efficient_densenet import concat_bn_relu

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FORMATS = ["contiguous", "channels_last", "strided", "mixed"]


def plain_concat_bn_relu(features, *args, storage=None, **kwargs):
    return F.relu(F.batch_norm(torch.cat(list(features), 1), *args, **kwargs))


def in_format(x: Tensor, memory_format: str, index: int = 0) -> Tensor:
    """`x` with other strides: the values stay."""
    if memory_format == "mixed":
        memory_format = FORMATS[index % 3]
    if memory_format == "channels_last":  # of any number of dimensions
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory_format == "strided":
        padded = x.new_empty([*(size + 1 for size in x.shape[:-1]), 2 * x.shape[-1]])
        view = padded[tuple(slice(1, None) for _ in x.shape[:-1]) + (slice(None, None, 2),)]
        return view.copy_(x)
    return x.contiguous()


@dataclasses.dataclass
class Problem:
    """Inputs of one call and the gradient that comes back."""

    features: list[Tensor]
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    grad_y: Tensor
    training: bool
    momentum: float = 0.1
    eps: float = 1e-5

    def to(self, dtype: torch.dtype) -> Problem:
        def convert(x):
            return None if x is None else x.to(dtype)

        return dataclasses.replace(
            self,
            features=[convert(x) for x in self.features],
            **{
                name: convert(getattr(self, name))
                for name in ("running_mean", "running_var", "weight", "bias", "grad_y")
            },
        )


def make_problem(
    channels: Sequence[int],
    batch_and_spatial: Sequence[int],
    dtype: torch.dtype,
    device: str,
    training: bool = True,
    memory_format: str = "contiguous",
    parameter_dtype: torch.dtype | None = None,
    affine: bool = True,
    mean: float = 0.5,
    std: float = 2.0,
    seed: int = 0,
) -> Problem:
    """Random inputs; `mean` and `std` are those of the features' channels, about."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    n, *spatial = batch_and_spatial
    total = sum(channels)
    features = [
        in_format((mean + std * randn(n, c, *spatial)).to(dtype).to(device), memory_format, i)
        for i, c in enumerate(channels)
    ]
    p = parameter_dtype or dtype
    running_mean = (mean + std * 0.1 * randn(total)).to(p).to(device)
    running_var = (std**2 * (1 + 0.2 * randn(total).abs())).to(p).to(device)
    weight = (1 + 0.3 * randn(total)).to(p).to(device) if affine else None
    bias = (0.3 * randn(total)).to(p).to(device) if affine else None
    grad_y = randn(n, total, *spatial).to(dtype).to(device)
    return Problem(features, running_mean, running_var, weight, bias, grad_y, training)


def run(operator, problem: Problem, **kwargs) -> dict[str, Tensor]:
    """Result, gradients and new running statistics of one call, by name."""
    features = [x.detach().requires_grad_() for x in problem.features]
    weight, bias = (
        None if x is None else x.clone().requires_grad_() for x in (problem.weight, problem.bias)
    )
    running_mean, running_var = (
        None if x is None else x.clone() for x in (problem.running_mean, problem.running_var)
    )
    y = operator(
        features,
        running_mean,
        running_var,
        weight,
        bias,
        training=problem.training,
        momentum=problem.momentum,
        eps=problem.eps,
        **kwargs,
    )
    result = {"y": y.detach().clone()}
    inputs = {f"grad_features[{i}]": x for i, x in enumerate(features)}
    inputs |= {
        name: x for name, x in (("grad_weight", weight), ("grad_bias", bias)) if x is not None
    }
    gradients = torch.autograd.grad(y, list(inputs.values()), problem.grad_y)
    result |= dict(zip(inputs, gradients, strict=True))
    if running_mean is not None:
        result |= {"running_mean": running_mean, "running_var": running_var}
    return result


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Relative L2 error; infinite where the value is not finite."""
    value, exact = value.double(), exact.double()
    if not torch.isfinite(value).all():
        return math.inf
    scale = exact.norm().item()
    difference = (value - exact).norm().item()
    return difference / scale if scale > 0 else difference


def without_kinks(problem: Problem) -> Problem:
    """No gradient where the ReLU's argument is so near 0 that rounding decides its sign.

    There the gradient is not defined, and one such element outweighs all rounding errors.
    """
    if problem.grad_y.dtype == torch.float64:
        return problem
    p = problem.to(torch.float64)
    z = F.batch_norm(
        torch.cat(p.features, 1),
        None if p.training else p.running_mean,
        None if p.training else p.running_var,
        p.weight,
        p.bias,
        training=p.training,
        eps=p.eps,
    )
    return dataclasses.replace(problem, grad_y=problem.grad_y.masked_fill(z.abs() < 1e-3, 0))


def errors(operator, problem: Problem, **kwargs) -> dict[str, tuple[float, float]]:
    """Per tensor: our error and plain torch's, against float64 from the same rounded inputs."""
    problem = without_kinks(problem)
    exact = run(plain_concat_bn_relu, problem.to(torch.float64))
    torchs = run(plain_concat_bn_relu, problem)
    return compare(run(operator, problem, **kwargs), torchs, exact)


def compare(
    ours: dict[str, Tensor], torchs: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Per tensor, our error and plain torch's; shapes and dtypes have to be right."""
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == torchs[name].dtype, name
    return {
        name: (relative_error(ours[name], exact[name]), relative_error(torchs[name], exact[name]))
        for name in exact
    }


def kept_bytes(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Unique bytes that autograd keeps, as memory tools see them, without those of `own`."""
    excepted = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept = {}

    def pack(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in excepted:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(kept.values())


def assert_error_rule(
    found: dict[str, tuple[float, float]], dtype: torch.dtype, factor: int = 2
) -> None:
    """e <= 2 * e_torch + 4 * eps for each tensor; e <= 1e-10 in float64."""
    for name, (ours, torchs) in found.items():
        limit = 1e-10 if dtype == torch.float64 else factor * torchs + 4 * torch.finfo(dtype).eps
        assert ours <= limit, (
            f"{name}: error {ours:.3g}, plain torch {torchs:.3g}, limit {limit:.3g}"
        )


def assert_error_ratio(found: Sequence[dict[str, tuple[float, float]]]) -> None:
    """Over a grid of at least 20 seeds, the geometric mean of e / e_torch is at most 1.1."""
    assert len(found) >= 20
    for name in found[0]:
        # Both exact, or exact but for float32's last bit, is a ratio of 1.
        floor = torch.finfo(torch.float32).eps / 100
        logs = [
            math.log(max(ours, floor) / max(torchs, floor))
            for ours, torchs in (one[name] for one in found)
        ]
        ratio = math.exp(sum(logs) / len(logs))
        assert ratio <= 1.1, f"{name}: geometric mean of e / e_torch is {ratio:.3f}"


def assert_matches(problem: Problem, operator=concat_bn_relu, **kwargs) -> None:
    assert_error_rule(errors(operator, problem, **kwargs), problem.features[0].dtype)

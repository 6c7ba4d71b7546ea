"""Tries out whether modules of a library compute what their parts suggest.

A class may carry a library's names and do something else: a gate, another concatenation, dropout in
another place, a forward that somebody replaced. So a copy of the block, with random parameters in
float64 on the CPU, runs as it is and as it would run converted. Results, gradients and running
statistics have to agree, in training and in evaluation, with dropout and without.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .libraries import Library, has_activation
from .lowering import BATCH_NORMS, any_global_hook, has_hooks

_TOLERANCE = 1e-8
_DROP_RATE = 0.25
_PIXELS = 3  # in each spatial dimension
_OWN_PLACES = ("torch", "builtins", __package__)


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _in_a_new_thread(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Calls a function where nothing is set that changes what code computes.

    The caller's default device, dispatch modes, autocast and inference mode are its thread's.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(function, *args, **kwargs).result()

    return call


def code_of(kind: type) -> tuple[types.FunctionType, ...]:
    """The functions that a class and its bases define, up to those of torch."""
    return tuple(
        value
        for base in kind.__mro__
        if base.__module__.partition(".")[0] not in _OWN_PLACES
        for value in vars(base).values()
        if isinstance(value, types.FunctionType)
    )


# Modes and dropout are looked at elsewhere; the others are not for the code to read.
_NOT_NUMBERS = ("training", "drop_rate", "_efficient_densenet", "_is_replica")


def numbers_of(module: nn.Module) -> dict[str, object]:
    """The attributes that the code of a module may read, besides its parts, mode and dropout."""
    kinds = (bool, int, float, str, tuple, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, kinds) and name not in _NOT_NUMBERS
    }


# ------------------------------------------------------------------------------------------------
# Copies


class _Tensors(NamedTuple):
    """What stands in a copy for a parameter and for a buffer."""

    parameter: Callable[[Tensor], Tensor]
    buffer: Callable[[Tensor], Tensor]


def _random(seed: int) -> _Tensors:
    generator = torch.Generator().manual_seed(seed)

    def parameter(like: Tensor) -> Tensor:
        # Uniform with a variance of 1, which is drawn in a fraction of a normal one's time.
        values = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        values = (2 * values - 1) * 3**0.5
        # A convolution keeps the variance; norms stay away from 0.
        values = values * values[0].numel() ** -0.5 if values.dim() > 1 else 1 + 0.3 * values
        return nn.Parameter(values)

    def buffer(like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return torch.zeros(like.shape, dtype=like.dtype)
        return 0.5 + torch.rand(like.shape, generator=generator, dtype=torch.float64)

    return _Tensors(parameter, buffer)


def _copy(module: nn.Module, tensors: _Tensors, dims: int, without: str | None = None) -> Any:
    """A copy without hooks, and with other tensors. It shares all other attributes.

    Nothing but shapes is read of the original's tensors, which may be anywhere, or nowhere.

    Args:
        dims: spatial dimensions.
        without: a child to leave out.
    """
    kind = _class_alone(type(module), dims)
    copy: Any = kind.__new__(kind)
    vars(copy).update(vars(module))
    vars(copy).update({name: OrderedDict() for name in vars(module) if "_hooks" in name})
    for make, name in zip(tensors, ("_parameters", "_buffers"), strict=True):
        found = vars(module)[name].items()
        vars(copy)[name] = {n: None if t is None else make(t) for n, t in found}
    vars(copy)["_modules"] = {
        name: None if child is None else _copy(child, tensors, dims)
        for name, child in module._modules.items()
        if name != without
    }
    return copy


def _class_alone(kind: Any, dims: int) -> Any:
    """A module's class as it is in one process: neither converted, sharded nor synchronised."""
    if "original" in vars(kind):  # a copy of a converted module is tried out again
        kind = kind.original
    if kind.__bases__[0].__name__ == "FSDPModule":
        kind = kind.__bases__[1]
    if kind is nn.SyncBatchNorm:
        return BATCH_NORMS[dims]
    if issubclass(kind, nn.SyncBatchNorm):  # timm's
        return getattr(sys.modules[kind.__module__], "BatchNormAct2d", kind)
    return kind


def _spatial_dims(module: nn.Module) -> int:
    sizes: Any = (m.kernel_size for m in module.modules() if hasattr(m, "kernel_size"))
    return len(next(sizes))


# ------------------------------------------------------------------------------------------------
# Blocks


class Trial(NamedTuple):
    """Why a block computes something else, None where it does not: without and with dropout."""

    why: str | None
    why_with_dropout: str | None


@_in_a_new_thread
def try_block(block: nn.Module, library: Library, convert: Callable[[nn.Module], None]) -> Trial:
    """Compares a block with what it would be converted.

    Args:
        block: known by its names, and not converted.
        convert: converts a block in place, without a trial.
    """
    if any_global_hook():
        untried = "was not tried out, since a global module hook is registered"
        return Trial(untried, untried)
    plain = _copy(block, _random(0), _spatial_dims(block))
    for layer in plain.children():
        for name in library.checkpoints:
            vars(layer).pop(name, None)
            setattr(layer, name, False)
    same = _Tensors(lambda parameter: parameter, lambda buffer: buffer.clone())
    converted = _copy(plain, same, _spatial_dims(block))
    convert(converted)
    why = None
    for training in (True, False):
        why = why or _why_differs(library, plain, converted, training, 0.0)
    dropout = why or _why_differs(library, plain, converted, True, _DROP_RATE)
    return Trial(why, dropout)


def _why_differs(
    library: Library, plain: Any, converted: Any, training: bool, drop_rate: float
) -> str | None:
    """Compares a block and its converted copy, whose tensors have the same values."""
    for block in (plain, converted):
        block.train(training)
        for layer in block.children():
            if not library.set_drop_rate(layer, drop_rate) and drop_rate > 0:
                return "has no dropout to set"
    x = _example(library, plain)
    try:
        expected = _run(plain, x)
        difference = _difference(_run(converted, x), expected)
    except Exception as error:
        difference = f"{type(error).__name__}: {error}"
    mode = "training" if training else "evaluation"
    return difference and f"computes something else in {mode} mode ({difference})"


def _example(library: Library, block: nn.Module) -> Tensor:
    channels = library.read(next(block.children())).norm1.num_features
    generator = torch.Generator().manual_seed(1)
    sizes = 2, channels, *[_PIXELS] * _spatial_dims(block)
    return torch.randn(sizes, generator=generator, dtype=torch.float64)


def _run(block: Any, x: Tensor) -> dict[str, Tensor]:
    """Result, gradients and buffers of a block."""
    x = x.clone().requires_grad_()
    names, parameters = zip(*block.named_parameters(), strict=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        y = block(x)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        gradients = torch.autograd.grad(y, (x, *parameters), weight, allow_unused=True)
    found = {"result": y.detach(), **dict(block.named_buffers())}
    for name, gradient in zip(("x", *names), gradients, strict=True):
        if gradient is not None:
            found[f"gradient of {name}"] = gradient
    return found


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    if found.keys() != expected.keys():
        return f"only one has {', '.join(sorted(found.keys() ^ expected.keys()))}"
    for name, value in expected.items():
        if found[name].shape != value.shape:
            return f"{name} has shape {list(value.shape)} instead of {list(found[name].shape)}"
        scale = 1 + value.double().abs().max().item() if value.numel() else 1
        difference = found[name].double() - value.double()
        # NaN is not below any limit.
        if value.numel() and not difference.abs().max().item() <= _TOLERANCE * scale:
            return f"{name} differs"
    return None


# ------------------------------------------------------------------------------------------------
# Heads


class Head(NamedTuple):
    """What a model does behind its features, as far as it can be seen: to notice a change."""

    code: tuple[types.FunctionType, ...]
    kinds: list[type]
    numbers: list[dict[str, object]]


def head_of(model: nn.Module) -> Head:
    modules = list(_head_modules(model))
    numbers = [numbers_of(module) for module in (model, *modules)]
    return Head(code_of(type(model)), list(map(type, modules)), numbers)


def _head_modules(model: nn.Module) -> Iterator[nn.Module]:
    for name, child in model._modules.items():
        if name != "features" and child is not None:
            yield from child.modules()


def head_has_hooks(model: nn.Module) -> bool:
    """Whether somebody listens between the features and a linear layer."""
    between = (m for m in _head_modules(model) if not isinstance(m, nn.Linear))
    return any(has_hooks(module) or "forward" in vars(module) for module in between)


@_in_a_new_thread
def head_averages(model: Any) -> bool:
    """Whether a model reads of its features only ``relu(features)`` averaged over each image.

    A copy of its head runs on random features, and on their averages.
    """
    dims = _spatial_dims(model.features)
    norms = [m for m in model.features.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    if any_global_hook() or not norms:
        return False
    size = getattr(model, "input_resolution", 2)
    x = torch.zeros(2, 1, *[size] * dims, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    sizes = 2, norms[-1].num_features, *[_PIXELS] * dims
    features = torch.randn(sizes, generator=generator, dtype=torch.float64)
    if has_activation(norms[-1]):
        features = F.relu(features)  # The norm has applied its ReLU, so the head has none.
    averages = F.relu(features).flatten(2).mean(2).view(*sizes[:2], *[1] * dims)
    for training in (True, False):
        try:
            expected, found = (_run_head(model, x, f, training) for f in (features, averages))
        except Exception:  # whatever its head may do with other inputs
            return False
        if not isinstance(found, Tensor) or _difference({"y": found}, {"y": expected}):
            return False
    return True


def _run_head(model: nn.Module, x: Tensor, features: Tensor, training: bool) -> Any:
    copy = _copy(model, _random(0), features.dim() - 2, without="features")
    copy.features = _Constant(features)
    copy.train(training)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return copy(x)


class _Constant(nn.Module):
    """In place of a model's features."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        return self.values.clone()

"""From modules to the description of a block, or the reason why not: the only place that decides.

Every function ``why_not_*`` returns a reason, or None where a module computes exactly what the
operator would. :func:`lower` puts them together for a block, with the module that reads it and the
convolution in front of it. Everybody who runs or explains a block asks this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .arguments import in_autocast
from .batch_norm import BatchNorm
from .block_spec import BlockSpec, Pool
from .dense_block import describe
from .dense_block_formulas import BlockTensors, DenseLayer
from .libraries import LayerParts, has_activation, transition_of

BATCH_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGE_POOLS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
NORMS: tuple[Any, ...] = (*BATCH_NORMS.values(), nn.SyncBatchNorm)
LEAVES: tuple[Any, ...] = (
    *NORMS, *CONVOLUTIONS.values(), *MAX_POOLS.values(), *AVERAGE_POOLS.values(), nn.ReLU,
    nn.Sequential,
)  # fmt: skip
# The code that the reasons below know. Whoever puts another in its place is not fused.
_FORWARDS = tuple(kind.forward for kind in LEAVES)
HOOKS: tuple[str, ...] = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


# ------------------------------------------------------------------------------------------------
# Modules


def any_global_hook() -> bool:
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


def why_called(module: Any, *types: type[nn.Module]) -> str | None:
    """Why a module has to be called: it is not exactly of these types, or somebody listens.

    A subclass (a parametrised convolution, say) computes something else, and pruning is a hook.
    """
    if type(module) not in types:
        return f"is {type(module).__name__}"
    if "forward" in vars(module):
        return "has a forward of its own"
    if any_global_hook() or has_hooks(module):
        return "has hooks"
    return None


def why_torch_differs() -> str | None:
    """Whether somebody changed what torch's own modules compute."""
    for kind, forward in zip(LEAVES, _FORWARDS, strict=True):
        if kind.forward is not forward:
            return f"{kind.__name__}.forward was replaced"
    return None


def synchronises(norm: Any) -> bool:
    """Whether a SyncBatchNorm would take statistics over several processes now."""
    distributed = torch.distributed
    if not norm.training or not (distributed.is_available() and distributed.is_initialized()):
        return False
    group = norm.process_group or distributed.group.WORLD
    return distributed.get_world_size(group) > 1


def why_not_norm(norm: Any, relu: Any, may_synchronise: bool = False) -> str | None:
    """Batch norm and ReLU as two modules, or as one of timm's."""
    whole = relu is None and has_activation(norm)
    bases = (type(norm),) if whole else NORMS
    if relu is None and not whole:
        return f"norm is {type(norm).__name__}, without a ReLU"
    why = why_called(norm, *bases)
    if why is not None:
        return f"norm {why}"
    parts = ((norm.act, nn.ReLU), (norm.drop, nn.Identity)) if whole else ((relu, nn.ReLU),)
    for part, expected in parts:
        why = why_called(part, expected)
        if why is not None:
            return f"activation {why}"
    if whole and not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return f"norm is {type(norm).__name__}"
    if isinstance(norm, nn.SyncBatchNorm) and not may_synchronise and synchronises(norm):
        return f"norm is {type(norm).__name__}, which synchronises its statistics"
    return why_not_statistics(norm)


def why_not_statistics(norm: Any) -> str | None:
    if (norm.running_mean is None) != (norm.running_var is None):
        return "norm has only one of running_mean and running_var"
    return None


def why_not_kernel(conv: Any, pointwise: bool) -> str | None:
    """Why a convolution is another one than the operator's, whatever its input."""
    why = why_called(conv, *CONVOLUTIONS.values())
    if why is not None:
        return f"convolution {why}"
    kernel = conv.kernel_size
    if set(kernel) != {1} if pointwise else not all(size % 2 for size in kernel):
        return f"convolution has kernel {kernel}"
    if (
        set(conv.stride) != {1}
        or set(conv.dilation) != {1}
        or conv.groups != 1
        or conv.bias is not None
        or conv.padding_mode != "zeros"
        or conv.padding != tuple(size // 2 for size in kernel)
    ):
        return "convolution has a stride, padding, dilation, groups or a bias"
    return None


def why_not_convolution(conv: Any, x: Tensor, pointwise: bool) -> str | None:
    why = why_not_kernel(conv, pointwise)
    if why is not None:
        return why
    weight = conv.weight
    if not torch.compiler.is_compiling() and is_traceable_wrapper_subclass(weight):
        return f"convolution has a weight that is a {type(weight).__name__}"
    if weight.device != x.device:
        return f"convolution is on {weight.device}, its input on {x.device}"
    if weight.dtype != x.dtype and not in_autocast(x):
        return f"convolution has {weight.dtype}, its input {x.dtype}"
    return None


def one_number(size: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """A window's size, stride or padding as one number where it is the same in all dimensions."""
    return size[0] if isinstance(size, tuple) and len(set(size)) == 1 else size


def why_not_halving(pool: Any, x: Tensor) -> str | None:
    """Averages of windows of 2 with stride 2."""
    why = why_called(pool, *AVERAGE_POOLS.values())
    if why is not None:
        return f"pool {why}"
    sizes = [one_number(size) for size in (pool.kernel_size, pool.stride, pool.padding)]
    if type(pool) is not AVERAGE_POOLS.get(x.dim() - 2):
        return f"pool is {type(pool).__name__}, for another number of dimensions than {x.dim()}"
    if sizes != [2, 2, 0] or pool.ceil_mode:
        return "pool is not over windows of 2 with stride 2"
    if getattr(pool, "divisor_override", None) is not None or min(x.shape[2:]) < 2:
        return "pool divides otherwise, or its input is too small"
    return None


def why_not_max_pool(pool: Any, x: Tensor) -> str | None:
    """Maxima over windows of 3 with stride 2 and padding 1."""
    why = why_called(pool, *MAX_POOLS.values())
    if why is not None:
        return f"pool {why}"
    numbers = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    if type(pool) is not MAX_POOLS.get(x.dim() - 2) or pool.ceil_mode or pool.return_indices:
        return "pool is for other inputs, or returns something else"
    return None if [one_number(size) for size in numbers] == [3, 2, 1, 1] else "pool differs"


def why_not_layer_by_layer(parts: LayerParts) -> str | None:
    """Why the norms of a layer cannot run in linear memory: it computes something else.

    What its convolutions are does not matter for that, as long as nobody listens to them.
    """
    if parts.other is not None:
        return parts.other
    if parts.drop_rate >= 1:
        return "drops out everything"
    for module in (parts.layer, *parts.containers):
        why = why_called(module, type(module))
        if why is not None:
            return f"layer {why}"
    for conv in (parts.conv1, parts.conv2):
        why = why_called(conv, *CONVOLUTIONS.values())
        if why is not None:
            return f"convolution {why}"
    return why_not_norm(parts.norm1, parts.relu1, True) or why_not_norm(
        parts.norm2, parts.relu2, True
    )


def why_not_layers_in_turn(layers: Mapping[str, LayerParts]) -> str | None:
    """Why a block cannot run layer by layer in linear memory, whatever its input."""
    why = why_torch_differs()
    for name, parts in layers.items():
        reason = why_not_layer_by_layer(parts) if why is None else None
        why = why or reason and f"{name}: {reason}"
    return why


def why_not_layers(layers: Mapping[str, LayerParts], may_synchronise: bool = False) -> str | None:
    """Why a block cannot run as one, whatever its input."""
    why = why_not_layers_in_turn(layers)
    if why is not None:
        return why
    first_name, first = next(iter(layers.items()))
    for name, parts in layers.items():
        why = (
            why_not_kernel(parts.conv1, pointwise=True)
            or why_not_kernel(parts.conv2, pointwise=False)
            or why_not_norm(parts.norm1, parts.relu1, may_synchronise)
            or why_not_norm(parts.norm2, parts.relu2, may_synchronise)
        )
        if why is not None:
            return f"{name}: {why}"
        if (parts.drop_rate, parts.drops_channels) != (first.drop_rate, first.drops_channels):
            return f"{name}: other dropout or mode than {first_name}"
        if parts.conv2.weight.shape != first.conv2.weight.shape:
            return f"{name}: other numbers of channels than {first_name}"
    return None


def why_not_block(layers: Mapping[str, LayerParts], x: Tensor) -> str | None:
    """Why a block cannot run as one on an input."""
    why = why_not_layers(layers)
    if why is not None:
        return why
    dims = next(iter(layers.values())).conv2.weight.dim()
    if x.dim() != dims or dims not in (3, 4, 5):
        return f"x: expected {dims} dimensions, [N, C, *spatial], got shape {list(x.shape)}"
    if not x.is_floating_point():
        return f"x: expected floating-point numbers, got {x.dtype}"
    for name, parts in layers.items():
        why = (
            why_not_convolution(parts.conv1, x, pointwise=True)
            or why_not_convolution(parts.conv2, x, pointwise=False)
            or why_not_dims(parts.norm1, x)
            or why_not_dims(parts.norm2, x)
        )
        if why is not None:
            return f"{name}: {why}"
    return None


def why_not_dims(norm: nn.Module, x: Tensor) -> str | None:
    """Norms check the number of dimensions; a SyncBatchNorm takes any."""
    if isinstance(norm, (nn.SyncBatchNorm, BATCH_NORMS.get(x.dim() - 2, nn.SyncBatchNorm))):
        return None
    return f"norm is {type(norm).__name__}, for another number of dimensions than {x.dim()}"


class Reader(NamedTuple):
    """What reads a block: a transition, or the norm behind the last one."""

    module: nn.Module
    norm: Any
    relu: Any  # None where the norm holds it, or where it follows in the head
    conv: Any  # a transition's
    pool_module: Any
    pool: int  # of Pool


def transition_reader(module: nn.Module) -> Reader | None:
    parts = transition_of(module)
    if parts is None:
        return None
    return Reader(module, parts.norm, parts.relu, parts.conv, parts.pool, Pool.WINDOWS)


def why_not_reader(reader: Reader, x: Tensor, may_synchronise: bool = False) -> str | None:
    """Why a module does not run with the block before it."""
    if reader.conv is None:
        if has_activation(reader.norm):
            return why_not_norm(reader.norm, None)
        why = why_called(reader.norm, *NORMS)
        if why is None and type(reader.norm) is nn.SyncBatchNorm and synchronises(reader.norm):
            why = "synchronises its statistics"
        return why or why_not_dims(reader.norm, x) or why_not_statistics(reader.norm)
    return (
        why_called(reader.module, type(reader.module))
        or why_not_halving(reader.pool_module, x)
        or why_not_norm(reader.norm, reader.relu, may_synchronise)
        or why_not_dims(reader.norm, x)
        or why_not_convolution(reader.conv, x, pointwise=True)
    )


# ------------------------------------------------------------------------------------------------
# Numbers and tensors


def batch_norm(norm: Any) -> BatchNorm:
    """What ``norm.forward`` would hand to ``F.batch_norm``, and the count it would move."""
    uses_running = not norm.training or norm.track_running_stats
    counts = norm.training and norm.track_running_stats
    return BatchNorm(
        norm.running_mean if uses_running else None,
        norm.running_var if uses_running else None,
        norm.weight,
        norm.bias,
        training=norm.training or norm.running_mean is None,
        momentum=norm.momentum,
        eps=norm.eps,
        num_batches_tracked=norm.num_batches_tracked if counts else None,
    )


def read_tensors(
    layers: Sequence[LayerParts], reader: Reader | None, projection: Any
) -> BlockTensors:
    """What the modules hold now."""
    norms = [*(parts.norm1 for parts in layers), *(parts.norm2 for parts in layers)]
    norms += [] if reader is None else [reader.norm]
    means, variances, counts = (
        read_attribute(norms, "_buffers", name)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    for i, norm in enumerate(norms):
        if norm.training and not norm.track_running_stats:
            means[i] = variances[i] = counts[i] = None
    return BlockTensors(
        read_attribute(norms, "_parameters", "weight"),
        read_attribute(norms, "_parameters", "bias"),
        means,
        variances,
        counts,
        read_attribute([parts.conv1 for parts in layers], "_parameters", "weight"),
        read_attribute([parts.conv2 for parts in layers], "_parameters", "weight"),
        None if projection is None else projection.weight,
    )


def read_attribute(modules: Sequence[Any], kind: str, name: str) -> list[Any]:
    """A parameter or buffer of each, past nn.Module.__getattr__, which is slow.

    Raises:
        AttributeError: a module has none, or computes it whenever it is read (parametrisations).
            That happens once, where the module is called, and not here.
    """
    if torch.compiler.is_compiling():
        return [getattr(module, name) for module in modules]
    try:
        return [module.__dict__[kind][name] for module in modules]
    except KeyError:
        pass
    try:  # The replicas of nn.DataParallel have plain attributes instead of parameters.
        return [own[kind][name] if name in own[kind] else own[name] for own in map(vars, modules)]
    except KeyError as error:
        raise AttributeError(name) from error


# ------------------------------------------------------------------------------------------------
# Blocks


class Refusal(NamedTuple):
    """Why a block does not run as one, and the type of error where the input is wrong."""

    why: str
    error: type[Exception] | None = None


def lower(
    layers: Mapping[str, LayerParts],
    recompute: str,
    x: Tensor,
    reader: Reader | None = None,
    projection: Any = None,
) -> BlockSpec | Refusal:
    """A block, the module that reads it and the convolution in front of it as one operator.

    Args:
        layers: by their names.
        x: the block's input, or that of the projection.
        projection: a transition's convolution.
    """
    why = why_not_block(layers, x)
    if why is None and reader is not None:
        why = why_not_reader(reader, x)
    if why is None and projection is not None:
        # With dropout, masks depend on the format of what the convolution makes.
        drops = next(iter(layers.values())).drop_rate > 0
        why = "dropout" if drops else why_not_convolution(projection, x, pointwise=True)
    if why is not None:
        return Refusal(why)
    first = next(iter(layers.values()))
    arguments = (
        [
            DenseLayer(
                batch_norm(parts.norm1), parts.conv1.weight,
                batch_norm(parts.norm2), parts.conv2.weight,
            )
            for parts in layers.values()
        ],
        first.drop_rate,
        recompute,
        None if reader is None else batch_norm(reader.norm),
        Pool.NONE if reader is None else reader.pool,
        first.drops_channels,
        None if projection is None else projection.weight,
    )  # fmt: skip
    try:
        return describe(x, *arguments)[0]
    except (TypeError, ValueError) as error:
        return Refusal(str(error), type(error))

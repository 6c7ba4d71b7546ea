"""Runs dense blocks, and sequences of modules that hold them, on the operators.

:class:`Block` is what our blocks and converted ones have in common. :func:`run_sequence` is the
only loop over a network: it runs the stem's norm, ReLU and pool as one operator, and a block with
the module that reads it as another, and calls every other module as it is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import check_tensor, computed_dtype
from .batch_norm import RunningUpdates
from .block_spec import BlockSpec, Pool
from .bn_relu_max_pool import run_bn_relu_max_pool
from .concat_bn_relu import concat_bn_relu, recompute_in_backward
from .dense_block import kernel_path, run_dense_block
from .layout import block_is_channels_last, convolution_is_channels_last
from .libraries import LayerParts, has_activation
from .lowering import (
    MAX_POOLS,
    Reader,
    Refusal,
    batch_norm,
    lower,
    read_tensors,
    synchronises,
    transition_reader,
    why_called,
    why_not_dims,
    why_not_layers_in_turn,
    why_not_max_pool,
    why_not_norm,
    why_not_reader,
)
from .remembered import Remembered, gather_facts
from .storage import SharedStorage


def records(x: object) -> bool:
    """Whether somebody writes down what the modules do, and so wants plain ones: torch.fx,
    TorchScript's tracing, ``torch.export``. (On torch 2.11 the compiler takes
    ``torch.compiler.is_exporting()`` for True always.)
    """
    return (
        isinstance(x, torch.fx.Proxy)
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or (torch.compiler.is_compiling() and torch.compiler._is_exporting_flag)
    )


class WrongValue(ValueError, RuntimeError):
    """An argument that plain modules refuse with a RuntimeError as often as with a ValueError.

    Our message names it before anything is changed; whoever expects plain's type still catches it.
    """


class WrongType(TypeError, RuntimeError):
    """The same of a TypeError."""


WRONG: dict[type[Exception], type[Exception]] = {ValueError: WrongValue, TypeError: WrongType}


# ------------------------------------------------------------------------------------------------
# Layers


def norm_relu_conv(
    norm: Any,
    relu: Any,
    consumer: Callable[[Tensor], Tensor],
    features: Sequence[Tensor],
    storage: SharedStorage | None = None,
) -> Tensor:
    """``consumer(relu(norm(cat(features, 1))))``, keeping nothing that can be recomputed."""
    if (
        not torch.compiler.is_compiling()
        and why_not_norm(norm, relu, may_synchronise=True) is None
        and why_not_dims(norm, features[0]) is None
    ):
        fused: Tensor = _recomputed_bn_relu(norm, consumer, features, storage)
        return fused
    y = norm(torch.cat(list(features), 1) if len(features) > 1 else features[0])
    return consumer(y if relu is None else relu(y))


@torch.compiler.disable  # saved-tensor hooks and shared memory are not for a compiler to trace
def _recomputed_bn_relu(
    norm: Any,
    consumer: Callable[[Tensor], Tensor],
    features: Sequence[Tensor],
    storage: SharedStorage | None,
) -> Tensor:
    bn = batch_norm(norm)
    momentum = bn.momentum
    if momentum is None:  # cumulative average
        count = bn.num_batches_tracked
        momentum = 0.0 if count is None else 1.0 / float(count + 1)
    group = None
    if isinstance(norm, nn.SyncBatchNorm) and synchronises(norm):
        group = norm.process_group or torch.distributed.group.WORLD
    try:
        y = concat_bn_relu(
            features, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=bn.training,
            momentum=momentum, eps=bn.eps, storage=storage, process_group=group,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise WRONG.get(type(error), type(error))(str(error)) from None
    if bn.num_batches_tracked is not None:  # only now, so that an error leaves it as it was
        bn.num_batches_tracked.add_(1)
    with recompute_in_backward(y):
        return consumer(y)


def _run_layers(layers: Mapping[str, LayerParts], x: Tensor, storage: SharedStorage) -> Tensor:
    """A block of a library layer by layer."""
    features = [x]
    for parts in layers.values():
        z = norm_relu_conv(parts.norm1, parts.relu1, parts.conv1, features, storage)
        new = norm_relu_conv(parts.norm2, parts.relu2, parts.conv2, [z], storage)
        if parts.drop_rate > 0:
            drop = torch.feature_dropout if parts.drops_channels else F.dropout
            new = drop(new, parts.drop_rate, True)
        features.append(new)
    return torch.cat(features, 1)


# ------------------------------------------------------------------------------------------------
# Blocks


class Block(nn.Module):
    """A dense block, ours or converted, that runs as one operator where it can."""

    def each_layer(self) -> Iterator[tuple[str, LayerParts]]:
        """The names and the parts of its layers."""
        raise NotImplementedError

    def layer_parts(self) -> dict[str, LayerParts]:
        return dict(self.each_layer())

    def why_not_itself(self) -> str | None:
        """Why it does not run as one, for reasons that are not its modules'."""
        raise NotImplementedError

    def settings(self) -> Settings:
        raise NotImplementedError

    def run_plain(self, x: Tensor) -> Tensor:
        """As it would run without this package."""
        raise NotImplementedError

    def run_refused(self, x: Tensor, layers: Mapping[str, LayerParts]) -> Tensor:
        """As it runs where it cannot be one operator: layer by layer in linear memory if each norm
        can run so (where norms synchronise their statistics, say); else plainly.
        """
        if torch.compiler.is_compiling() or not self._runs_in_turn():
            return self.run_plain(x)
        return _run_layers(layers, x, self.settings().storage)

    def _runs_in_turn(self) -> bool:
        return self.why_not_itself() is None and why_not_layers_in_turn(self.layer_parts()) is None

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why the block would not run as one operator on this input; None where it would."""
        lowered, _ = lower_block(self, x)
        return lowered.why if isinstance(lowered, Refusal) else None

    def kernel_path(self, x: Tensor) -> str:
        """What the block's convolutions would run on for this input, with torch's settings.

        ``"tensor cores"``: batch norm, ReLU and each convolution are one kernel. ``"tensor cores
        but for conv2: why"``: the second convolutions are torch's. ``"matrix products: why"`` and
        ``"convolutions: why"``: operators of torch, on normalised features in scratch memory.
        Anything else is what runs instead of the operator, and why, see :meth:`why_not_fused`.
        """
        lowered, _ = lower_block(self, x)
        if isinstance(lowered, BlockSpec):
            return kernel_path(lowered, x)
        return f"{self.instead()}: {lowered.why}"

    def instead(self) -> str:
        """What runs where the operator does not, in a word."""
        return "layer by layer" if self._runs_in_turn() else "plain modules"


class Settings:
    """What a block keeps besides its modules. Copies remember nothing.

    Args:
        recompute: see :func:`efficient_densenet.dense_block`.
        name: of the block in its model, for messages.
    """

    def __init__(self, recompute: str, name: str = "") -> None:
        self.recompute, self.name = recompute, name
        self.remembered, self.storage = Remembered(), SharedStorage()


def lower_block(
    block: Block, x: Tensor, reader: Reader | None = None, projection: Any = None
) -> tuple[BlockSpec | Refusal, Any]:
    """How a block runs with its reader and the convolution in front, and the tensors of it all."""
    check_tensor("x", x)
    why = block.why_not_itself()
    if why is not None:
        return Refusal(why), None
    if reader is not None and why_called(block, type(block)) is not None:
        return Refusal("somebody listens to what is between the block and its reader"), None
    layers, settings = block.layer_parts(), block.settings()
    parts = list(layers.values())
    why = next((f"{name}: {p.other}" for name, p in layers.items() if p.other is not None), None)
    if why is not None or not parts:
        return Refusal(why or "has no layers"), None
    if torch.compiler.is_compiling():
        lowered = lower(layers, settings.recompute, x, reader, projection)
        if isinstance(lowered, Refusal):
            return lowered, None
        return lowered, read_tensors(parts, reader, projection)
    try:
        tensors = read_tensors(parts, reader, projection)
    except AttributeError:  # another kind of norm or convolution
        return lower(layers, settings.recompute, x, reader, projection), None
    roots = [block, *([] if reader is None else [reader.module])]
    roots += [] if projection is None else [projection]
    pool = None if reader is None else reader.pool
    use = pool, projection is None, x.device
    facts = gather_facts(x, parts, roots, tensors, (settings.recompute, pool))
    lowered_before = settings.remembered.get(use, facts)
    if lowered_before is None:
        lowered_before = lower(layers, settings.recompute, x, reader, projection)
        settings.remembered.put(use, facts, lowered_before)
    return lowered_before, tensors


def run_block(block: Block, x: Tensor) -> Tensor:
    """A block alone."""
    if records(x):
        return block.run_plain(x)
    lowered, tensors = lower_block(block, x)
    if isinstance(lowered, Refusal):
        if lowered.error is not None:
            raise WRONG.get(lowered.error, lowered.error)(lowered.why)
        return block.run_refused(x, block.layer_parts())
    result = run_dense_block(lowered, tensors, x, block.settings().name)
    if _draws_in_order_of_memory(lowered) and not torch.compiler.is_compiling():
        result = in_format(result, _is_plainly_channels_last(block, x))
    # A hook gets the result, and may write to it.
    return result.clone() if block._forward_hooks else result


def _draws_in_order_of_memory(spec: BlockSpec) -> bool:
    """As F.dropout does, so that the format of a block's input decides on its masks."""
    return spec.drop_rate > 0 and not spec.drops_channels


def _is_plainly_channels_last(block: Block, x: Tensor) -> bool:
    """Whether the output would be channels-last in the plain composition."""
    weights = [(parts.conv1.weight, parts.conv2.weight) for parts in block.layer_parts().values()]
    return block_is_channels_last(x, weights, computed_dtype(x))


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """x in the memory format of the plain network, on which the next block's dropout depends."""
    if x.dim() == 3:
        return x.contiguous()
    inner = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=inner if channels_last else torch.contiguous_format)


# ------------------------------------------------------------------------------------------------
# Sequences


class Ending(enum.Enum):
    """What follows the last module of a sequence, and may run with it."""

    NOTHING = enum.auto()
    RELU = enum.auto()
    AVERAGE = enum.auto()  # ReLU, and the average over each image


def run_sequence(
    modules: Sequence[Any],
    x: Tensor,
    ending: Ending = Ending.NOTHING,
    intermediates: list[Tensor] | None = None,
    efficient: bool = True,
) -> tuple[Tensor, bool]:
    """Runs modules one after the other.

    A block and its reader are one operator where nobody asks for what is between them. A
    transition's convolution belongs to the next block's, where that may be one as well.

    Args:
        ending: what follows.
        intermediates: gets what is read by a module that pools.
        efficient: False to call every module as it is.

    Returns:
        The result, and whether the ending is in it.
    """
    # A compiler's masks need not be those of eager mode.
    restores = not torch.compiler.is_compiling() and any(
        isinstance(module, Block) and _drops_elements(module) for module in modules
    )
    updates = RunningUpdates()
    position, projection, channels_last = 0, None, False
    while position < len(modules) or projection is not None:
        lowered, tensors, reader = None, None, None
        if efficient and intermediates is None and not (restores and projection is not None):
            reader = _reader_at(modules, position, ending)
        if reader is not None:
            lowered, tensors = lower_block(modules[position], x, reader, projection)
        if isinstance(lowered, BlockSpec):
            assert reader is not None and tensors is not None
            block = modules[position]
            if restores:
                channels_last = _is_plainly_channels_last(block, x)
            x = run_dense_block(lowered, tensors, x, block.settings().name, updates)
            position, projection = position + 2, reader.conv
            if projection is None and position == len(modules):
                updates.move()
                return x, ending != Ending.AVERAGE or reader.pool == Pool.IMAGES
        elif projection is not None:
            channels_last = restores and convolution_is_channels_last(
                x, channels_last, projection.weight, computed_dtype(x)
            )
            x, projection = projection(x), None
            x = in_format(x, channels_last) if restores else x
        else:
            updates.move()  # before a module is called, which may look at them
            run = _run_unfused if efficient else _call
            x, position = run(modules, position, x, updates, intermediates is None)
        if (
            intermediates is not None
            and position < len(modules)
            and _lowers_resolution(modules[position])
        ):
            intermediates.append(x)
    updates.move()
    return x, False


def _drops_elements(block: Block) -> bool:
    _, parts = next(block.each_layer(), (None, None))
    return parts is not None and parts.drop_rate > 0 and not parts.drops_channels


def _lowers_resolution(module: nn.Module) -> bool:
    return isinstance(module, tuple(MAX_POOLS.values())) or transition_reader(module) is not None


def _reader_at(modules: Sequence[Any], position: int, ending: Ending) -> Reader | None:
    """The module that reads the block at a position and may run with it."""
    if position + 1 >= len(modules) or not isinstance(modules[position], Block):
        return None
    module, is_last = modules[position + 1], position + 2 == len(modules)
    transition = transition_reader(module)
    if transition is not None:
        return transition
    if not has_activation(module) and (not is_last or ending == Ending.NOTHING):
        return None
    pool = Pool.IMAGES if is_last and ending == Ending.AVERAGE else Pool.NONE
    return Reader(module, module, None, None, None, pool)


def _call(
    modules: Sequence[Any], position: int, x: Tensor, updates: RunningUpdates, fuses: bool
) -> tuple[Tensor, int]:
    return modules[position](x), position + 1


def _run_unfused(
    modules: Sequence[Any], position: int, x: Tensor, updates: RunningUpdates, fuses: bool
) -> tuple[Tensor, int]:
    """The result of one module, or of a norm, its ReLU and what follows; and the next position."""
    module, following = modules[position], modules[position + 1 :]
    if torch.compiler.is_compiling() and not fuses:
        return module(x), position + 1
    transition = transition_reader(module)
    if transition is not None and _why_not_pooling_first(transition, x) is None:

        def pool_and_convolve(y: Tensor) -> Tensor:
            convolved: Tensor = transition.conv(transition.pool_module(y))
            return convolved

        y = norm_relu_conv(transition.norm, transition.relu, pool_and_convolve, [x])
        return y, position + 1
    relus = [] if has_activation(module) else list(following[:1])
    consumers = following[len(relus) :]
    if fuses and consumers and _is_stem(module, relus, x):
        relu = relus[0] if relus else None
        return _run_stem(module, relu, consumers[0], x, updates), position + 2 + len(relus)
    x = module(x)
    if isinstance(module, Block) and following and writes_to_input(following):
        x = x.clone()  # The block keeps its result for the backward pass.
    return x, position + 1


def writes_to_input(modules: Sequence[Any]) -> bool:
    """Whether the first of these modules that computes anything works in place."""
    for module in modules:
        if type(module).forward is nn.Sequential.forward:
            children = list(module.children())
            if children and not passes_through(children):
                return writes_to_input(children)
        elif getattr(module, "inplace", False):
            return True
        elif not passes_through([module]):
            return False
    return False


def passes_through(modules: Sequence[Any]) -> bool:
    """Whether the result of modules may be their input itself."""
    return all(
        passes_through(list(module.children()))
        if type(module).forward is nn.Sequential.forward
        else isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd))
        and not getattr(module, "inplace", False)
        for module in modules
    )


def _why_not_pooling_first(transition: Reader, x: Tensor) -> str | None:
    """An average and a 1x1 convolution commute, and a quarter of the pixels is less to convolve."""
    return why_not_reader(transition, x, may_synchronise=True)


def _is_stem(norm: Any, relus: Sequence[Any], x: Tensor) -> bool:
    """Whether a norm and what follows it are batch norm and ReLU in front of something else."""
    is_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm) and 3 <= x.dim() <= 5
    return (
        is_norm
        and x.is_floating_point()
        and why_not_norm(norm, relus[0] if relus else None, may_synchronise=True) is None
        and why_not_dims(norm, x) is None
    )


def _run_stem(norm: Any, relu: Any, consumer: Any, x: Tensor, updates: RunningUpdates) -> Tensor:
    """With the stem's max pooling as one operator, or with any other consumer."""
    alone = why_not_norm(norm, relu) is None
    if alone and why_not_max_pool(consumer, x) is None:
        return run_bn_relu_max_pool(x, batch_norm(norm), updates)
    return norm_relu_conv(norm, relu, consumer, [x])

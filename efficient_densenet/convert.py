"""Makes the DenseNets of other libraries run in linear memory, without touching their parameters.

:func:`convert` changes the class of dense blocks, of the ``nn.Sequential`` that holds them and of
the library's model around that to a subclass that runs :mod:`efficient_densenet.dense_block`. Every
module, parameter, buffer and name
stays the same object, so optimizers, checkpoints and copies of the weights go on working, and
:func:`revert` is the change back. A block that the operator does not compute exactly (see
:meth:`DenseBlock.why_not_fused <efficient_densenet.DenseBlock.why_not_fused>`) runs as it did, and
so does everything else.

Known are the dense blocks of torchvision, timm, MONAI (1-d to 3-d), torchxrayvision and of copies
of the original efficient_densenet_pytorch. None of these is imported here: a class is known by its
module and name, and its parts by theirs.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, get_type_hints

import torch
import torch.fx
from torch import Tensor, nn

from . import functional
from .arguments import RECOMPUTE, check_choice, computed_dtype
from .dense_block import DenseLayer, Plan, Pool
from .densenet import (
    _BATCH_NORMS,
    _batch_norm,
    _in_format,
    _layer_tensors,
    _Plans,
    _run_blocks,
    _size,
    _stem_norm_relu,
    _why_called,
    _why_not_convolution,
    _why_not_halving,
)
from .layout import block_is_channels_last

_logger = logging.getLogger("efficient_densenet")
_ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


# ------------------------------------------------------------------------------------------------
# What the libraries' modules are made of


class _Layer(NamedTuple):
    """The parts of a dense layer. A ReLU of None is inside the norm (timm)."""

    whole: nn.Module
    norm1: nn.Module
    relu1: nn.Module | None
    conv1: Any  # modules with a weight
    norm2: nn.Module
    relu2: nn.Module | None
    conv2: Any
    drop_rate: float = 0.0  # 0 in evaluation mode
    drops_channels: bool = False  # whole ones
    containers: tuple[nn.Module, ...] = ()  # between the layer and its parts
    other: str | None = None  # what else the layer does


class _Library(NamedTuple):
    """Where a library has its dense blocks, and the names of their classes.

    And what is between the features of its ``DenseNet`` and the classifier: ``head`` names the
    methods that run, ``averages`` says whether they are ReLU and average over each image.
    """

    name: str
    module: str | None  # None: anywhere, for a file that is copied
    block: str
    layer: str
    transition: str
    read: Callable[[nn.Module], _Layer]
    head: tuple[str, ...] = ()
    averages: Callable[[Any], bool] = lambda model: True

    def has_block(self, module: nn.Module) -> bool:
        return self._is(_original(module), self.block)

    def has_layer(self, module: nn.Module) -> bool:
        return self._is(type(module), self.layer)

    def has_transition(self, module: object) -> bool:
        return self._is(type(module), self.transition)

    def has_model(self, kind: type) -> bool:
        """Whether it is the library's ``DenseNet``, or computes what that does."""
        methods = [getattr(kind, name, None) for name in self.head]
        names = [
            (getattr(m, "__module__", None), getattr(m, "__qualname__", None)) for m in methods
        ]
        return bool(names) and names == [(self.module, f"DenseNet.{name}") for name in self.head]

    def _is(self, kind: type, name: str) -> bool:
        return kind.__qualname__ == name and self.module in (None, kind.__module__)


def _read_attributes(layer: Any) -> _Layer:
    return _Layer(
        layer,
        layer.norm1,
        getattr(layer, "relu1", None),
        layer.conv1,
        layer.norm2,
        getattr(layer, "relu2", None),
        layer.conv2,
        float(layer.drop_rate) if layer.training else 0.0,
    )


def _read_monai(layer: Any) -> _Layer:
    parts = layer.layers
    read = _Layer(
        layer, parts.norm1, parts.relu1, parts.conv1, parts.norm2, parts.relu2, parts.conv2,
        containers=(parts,),
    )  # fmt: skip
    dropout = getattr(parts, "dropout", None)
    if dropout is None:
        return read
    of_channels = {4: nn.Dropout2d, 5: nn.Dropout3d}.get(parts.conv2.weight.dim())
    if type(dropout) not in (nn.Dropout, of_channels):
        return read._replace(other=f"drops out with {type(dropout).__name__}")
    return read._replace(
        drop_rate=float(dropout.p) if dropout.training else 0.0,
        drops_channels=type(dropout) is of_channels,
        containers=(parts, dropout),
    )


def _is_average(pool: Any) -> bool:
    """Over each image, and nobody listens."""
    return _why_called(pool, *_ADAPTIVE_POOLS) is None and _size(pool.output_size) in (1, (1,))


def _timm_averages(model: Any) -> bool:
    pool = model.global_pool
    return (
        _why_called(pool, type(pool)) is None
        and _is_average(getattr(pool, "pool", None))
        and _has_activation([*model.features.children()][-1])
    )


def _monai_averages(model: Any) -> bool:
    layers = model.class_layers
    relu, pool = [*layers.children(), None, None][:2]
    whys = _why_called(layers, nn.Sequential), _why_called(relu, nn.ReLU)
    return whys == (None, None) and _is_average(pool)


_LIBRARIES = (
    _Library(
        "torchvision", "torchvision.models.densenet", "_DenseBlock", "_DenseLayer", "_Transition",
        _read_attributes, ("forward",),
    ),
    _Library(
        "timm", "timm.models.densenet", "DenseBlock", "DenseLayer", "DenseTransition",
        _read_attributes, ("forward", "forward_features", "forward_head"), _timm_averages,
    ),
    _Library(
        "MONAI", "monai.networks.nets.densenet", "_DenseBlock", "_DenseLayer", "_Transition",
        _read_monai, ("forward",), _monai_averages,
    ),
    _Library(
        "torchxrayvision", "torchxrayvision.models", "_DenseBlock", "_DenseLayer", "_Transition",
        _read_attributes, ("forward", "features2"),
    ),
    # Last: its classes are known by their names alone, and by what is in them.
    _Library(
        "efficient_densenet_pytorch", None, "_DenseBlock", "_DenseLayer", "_Transition",
        _read_attributes,
    ),
)  # fmt: skip


def _original(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was converted."""
    return module.original if isinstance(module, _Converted) else type(module)


def _library_of(module: nn.Module) -> _Library | None:
    """The library whose dense block this is."""
    for library in _LIBRARIES:
        if library.has_block(module):
            layers = list(module.children())
            if layers and all(map(library.has_layer, layers)):
                return library
    return None


def _library_of_model(kind: type) -> _Library | None:
    """The library whose ``DenseNet`` this is."""
    return next((library for library in _LIBRARIES if library.has_model(kind)), None)


def _layers_of(library: _Library, block: nn.Module) -> list[_Layer]:
    """Raises AttributeError where a layer has other parts."""
    return [library.read(layer) for layer in block.children()]


# ------------------------------------------------------------------------------------------------
# What may run fused. Each function returns why not, or None.


def _why_not_norm(norm: Any, relu: nn.Module | None) -> str | None:
    """Batch norm and ReLU as two modules, or timm's BatchNormAct2d."""
    if relu is not None:
        why = _why_called(norm, *_BATCH_NORMS.values())
        if why is not None:
            return f"norm {why}"
        why = _why_called(relu, nn.ReLU)
        return None if why is None else f"activation {why}"
    if not _has_activation(norm) or not issubclass(type(norm), nn.BatchNorm2d):
        return f"norm is {type(norm).__name__}"
    for module, expected in ((norm, type(norm)), (norm.act, nn.ReLU), (norm.drop, nn.Identity)):
        why = _why_called(module, expected)
        if why is not None:
            return f"norm or its {expected.__name__} {why}"
    return None


def _why_not_layer(layer: _Layer) -> str | None:
    """Of its structure alone."""
    if layer.other is not None:
        return layer.other
    if layer.drop_rate == 1:
        return "drops out everything"
    for module in (layer.whole, *layer.containers):
        why = _why_called(module, type(module))
        if why is not None:
            return f"layer {why}"
    for norm, relu in ((layer.norm1, layer.relu1), (layer.norm2, layer.relu2)):
        why = _why_not_norm(norm, relu)
        if why is not None:
            return why
    return None


def _why_not_structure(module: nn.Module) -> str | None:
    """Why a dense block cannot run fused, whatever its input."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted"
    library = _library_of(module)
    if library is None:
        return "is not a dense block of a known library"
    try:
        layers = _layers_of(library, module)
    except AttributeError as error:
        return f"has other parts: {error}"
    first = layers[0]
    for name, layer in zip(dict(module.named_children()), layers, strict=True):
        why = _why_not_layer(layer)
        if why is not None:
            return f"{name}: {why}"
        weight = getattr(layer.conv2, "weight", None)
        if not isinstance(weight, nn.Parameter):
            return f"{name}: conv2 has no weight of its own"
        if weight.shape != first.conv2.weight.shape:
            return f"{name}: other numbers of channels than the first layer"
        if (layer.drop_rate, layer.drops_channels) != (first.drop_rate, first.drops_channels):
            return f"{name}: other dropout or mode than the first layer"
    return None


def _why_not_block(block: nn.Module, x: Tensor) -> str | None:
    """Why a dense block does not run fused on an input."""
    why = _why_not_structure(block)
    if why is not None:
        return why
    if not x.is_floating_point() or not 3 <= x.dim() <= 5:
        return f"the input has {x.dtype} and {x.dim()} dimensions"
    library = _library_of(block)
    assert library is not None
    for name, layer in zip(dict(block.named_children()), _layers_of(library, block), strict=True):
        for conv, pointwise in ((layer.conv1, True), (layer.conv2, False)):
            why = _why_not_convolution(conv, x, pointwise)
            if why is not None:
                return f"{name}: {why}"
    return None


def _is_transition(module: object) -> bool:
    return any(library.has_transition(module) for library in _LIBRARIES)


def _why_not_transition(transition: Any, x: Tensor) -> str | None:
    """Why a transition does not run with the block before it."""
    if not _is_transition(transition):
        return f"is {type(transition).__name__}"
    why = _why_called(transition, type(transition))
    if why is not None:
        return why
    parts: dict[str, Any] = dict(transition.named_children())
    if list(parts) not in (["norm", "relu", "conv", "pool"], ["norm", "conv", "pool"]):
        return f"has parts {', '.join(parts)}"
    return (
        _why_not_halving(parts["pool"], x)
        or _why_not_norm(parts["norm"], parts.get("relu"))
        or _why_not_convolution(parts["conv"], x, pointwise=True)
    )


def _why_not_reader(reader: nn.Module, x: Tensor) -> str | None:
    """Why a module does not run with the block before it."""
    if _is_transition(reader):
        return _why_not_transition(reader, x)
    if _has_activation(reader):
        return _why_not_norm(reader, None)
    return _why_called(reader, *_BATCH_NORMS.values())


def _is_traced(x: object) -> bool:
    """Whether somebody records what the modules do, and so wants those of the library."""
    return (
        not isinstance(x, Tensor)
        or isinstance(x, torch.fx.Proxy)
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch.compiler.is_compiling()
    )


# ------------------------------------------------------------------------------------------------
# Converted modules


class _Settings:
    """What a converted block keeps besides the library's own attributes.

    `copies`: the next module writes to the block's output, which autograd needs as it is.
    """

    def __init__(self, recompute: str, copies: bool) -> None:
        self.recompute = recompute
        self.copies = copies
        self.plans = _Plans()


class _Converted(nn.Module):
    """A module of another class, whose instances are of a subclass of both.

    The subclass is made when it is needed, so pickles name the original class instead.
    """

    original: type[nn.Module]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "forward" in vars(cls):  # torch.fx writes types into code, where a string is none
            cls.forward.__annotations__.update(get_type_hints(cls.forward))

    def as_it_was(self, x: Tensor) -> Tensor:
        y: Tensor = self.original.forward(self, x)
        return y

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_converted, (type(self).original, type(self).__mro__[1]), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script, which puts what this returns in the module's place for good."""
        _logger.info("%s: reverted, for torch.jit.script", type(self).__name__)
        _revert_one(self)
        return self


class _ConvertedBlock(_Converted):
    """Runs as one operator where it can, else as the library's block."""

    _efficient_densenet: _Settings

    def forward(self, x: Tensor) -> Tensor:
        if functional.is_wanted():
            return self._traced(x)
        plan = None if _is_traced(x) else self.plan(x)
        if plan is None:
            return self.as_it_was(x)
        result = _in_plain_format(plan, x, plan.run(x))
        return result.clone() if self._efficient_densenet.copies else result

    def _traced(self, x: Tensor) -> Tensor:
        """For a compiler: one operator that it can look around."""
        if _why_not_block(self, x) is not None:
            return self.as_it_was(x)
        tensors, drop_rate, drops_channels = self._tensors()
        settings = self._efficient_densenet
        result = functional.dense_block(x, tensors, drop_rate, settings.recompute, drops_channels)
        return result.clone() if settings.copies else result

    def _tensors(self) -> tuple[list[DenseLayer], float, bool]:
        """Those of the layers, the rate of dropout, and whether it drops whole channels."""
        library = _library_of(self)
        assert library is not None
        layers = _layers_of(library, self)
        first = layers[0]
        return [_layer_tensors(layer) for layer in layers], first.drop_rate, first.drops_channels

    def plan(
        self, x: Tensor, reader: Any = None, averages: bool = False, entry: Any = None
    ) -> Plan | None:
        """As :meth:`DenseBlock.plan <efficient_densenet.DenseBlock.plan>`."""
        roots = [module for module in (self, reader, entry) if module is not None]
        use = reader is None, averages, entry is None
        plans = self._efficient_densenet.plans
        return plans.get(use, x, roots, lambda: self._new_plan(x, reader, averages, entry))

    def _new_plan(self, x: Tensor, reader: Any, averages: bool, entry: Any) -> Plan | None:
        if _why_not_block(self, x) is not None:
            return None
        if reader is not None:
            # A hook of the block's is for what is between the two.
            why = _why_not_reader(reader, x) or _why_called(self, type(self))
            if why is not None:
                return None
        tensors, drop_rate, drops_channels = self._tensors()
        if entry is not None and (drop_rate > 0 or _why_not_convolution(entry, x, pointwise=True)):
            return None
        norm, pool = reader, Pool.IMAGES if averages else Pool.NONE
        if _is_transition(reader):
            norm, pool = reader.norm, Pool.WINDOWS
        return Plan(
            x,
            tensors,
            drop_rate,
            self._efficient_densenet.recompute,
            None if norm is None else _batch_norm(norm),
            pool,
            drops_channels,
            None if entry is None else entry.weight,
        )


# The features whose next result is wanted averaged over each image, after a ReLU.
_averaged: ContextVar[nn.Module | None] = ContextVar("averaged", default=None)


class _ConvertedModel(_Converted):
    """Asks its features for what the library would make of them: ReLU and average of each image.

    The library's own code runs all the same. What it makes of one pixel that is not negative is
    that pixel.
    """

    features: Any

    def forward(self, x: Tensor) -> Tensor:
        if _is_traced(x) or not self._averages():
            return self.as_it_was(x)
        token = _averaged.set(self.features)
        try:
            return self.as_it_was(x)
        finally:
            _averaged.reset(token)

    def _averages(self) -> bool:
        """Whether it would, and nobody listens."""
        library = _library_of_model(self.original)
        return (
            library is not None
            and vars(self).keys().isdisjoint(library.head)
            and isinstance(self.features, _ConvertedSequential)
            and _why_called(self.features, type(self.features)) is None
            and library.averages(self)
        )


class _ConvertedSequential(_Converted):
    """Runs a block and who reads it as one, and so the stem's norm, ReLU and pool."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_traced(x):
            return self.as_it_was(x)
        averages = _averaged.get() is self
        if averages:  # this once
            _averaged.set(None)
        modules: deque[Any] = deque(self.children())
        plan_next = functools.partial(_plan, modules, averages)
        while modules:
            plan, module = plan_next(x), modules.popleft()
            relus = [] if _has_activation(module) else list(modules)[:1]
            if plan is not None:
                x, conv = _run_blocks(plan, x, modules, plan_next)
                x = x if conv is None else conv(x)
            elif len(modules) > len(relus) and _is_norm_relu(module, relus, x):
                for _ in relus:
                    modules.popleft()
                x = _stem_norm_relu(module, modules.popleft(), x)
            else:
                x = module(x)
        return x


def _plan(
    modules: Sequence[Any], averages: bool, x: Tensor, entry: nn.Module | None = None
) -> Plan | None:
    """How the first of the modules runs with the second: a block with its last reader."""
    if len(modules) < 2 or not isinstance(modules[0], _ConvertedBlock):
        return None
    block, reader, is_last = modules[0], modules[1], len(modules) == 2
    averages = averages and is_last
    if not (averages or _is_transition(reader) or _has_activation(reader)):
        return None
    plan = block.plan(x, reader, averages, entry)
    if plan is not None and _draws_in_order_of_memory(plan) and not is_last:
        return None  # the format between the two matters for the next block
    return plan


def _has_activation(norm: object) -> bool:
    """Norm and activation in one: timm's."""
    return type(norm).__name__ == "BatchNormAct2d"


def _is_norm_relu(norm: nn.Module, relus: list[nn.Module], x: Tensor) -> bool:
    return x.is_floating_point() and _why_not_norm(norm, relus[0] if relus else None) is None


def _draws_in_order_of_memory(plan: Plan) -> bool:
    """As F.dropout does, so that the format of a block's input decides on its masks."""
    return plan.drop_rate > 0 and not plan.drops_channels


def _in_plain_format(plan: Plan, x: Tensor, result: Tensor) -> Tensor:
    """The result in the format that the library's block gives it, where that matters."""
    if not _draws_in_order_of_memory(plan):
        return result
    weights = [(layer.conv1, layer.conv2) for layer in plan.layers]
    return _in_format(result, block_is_channels_last(x, weights, computed_dtype(x)))


def _converted_class(original: Any, mixin: Any) -> Any:
    return _make_class((original, mixin))


@functools.cache
def _make_class(parts: tuple[Any, Any]) -> Any:
    original, mixin = parts
    return type(original.__name__, (mixin, original), {"original": original})


def _new_converted(original: type[nn.Module], mixin: type[_Converted]) -> nn.Module:
    """For pickles and copies: an empty instance."""
    kind = _converted_class(original, mixin)
    module: nn.Module = kind.__new__(kind)
    return module


# ------------------------------------------------------------------------------------------------
# Converting


def convert(
    model: nn.Module, recompute: str = "bottleneck", inplace: bool = True, strict: bool = False
) -> nn.Module:
    """Makes the dense blocks of a model run in memory linear in their depth, and faster.

    Known are the DenseNets of torchvision, timm, MONAI (1-d, 2-d, 3-d), torchxrayvision and copies
    of efficient_densenet_pytorch, alone or anywhere inside a model. Parameters, buffers, names and
    results stay; running statistics are updated exactly once per step, also where the library's
    own checkpointing is on, which is then not used. A block runs together with the transition
    behind it; the last one, in the library's own model, with the final norm, ReLU and average over
    each image. The stem's batch norm, ReLU and max pooling are one operator. Converting again
    changes nothing but ``recompute``. Each block is logged (logger ``efficient_densenet``, level
    INFO).

    A block's output is channels-last and is itself kept for the backward pass; where the next
    module of a ``nn.Sequential`` works in place, that gets a copy. ``torch.compile`` sees a block
    as one operator. While a model is traced or exported, it runs as the library wrote it;
    ``torch.jit.script`` reverts it.

    Args:
        model: is changed, and returned.
        recompute: ``"bottleneck"`` or ``"features"``, see :func:`efficient_densenet.dense_block`.
        inplace: False converts a deep copy instead.
        strict: a dense block that cannot run fused is an error.

    Raises:
        ValueError: the model has no dense block of a known library; or, with ``strict``, one that
            cannot be converted. Nothing was changed.
    """
    check_choice("recompute", recompute, RECOMPUTE)
    found = dict(_dense_blocks(model))
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no dense block of torchvision, timm, MONAI, "
            "torchxrayvision or efficient_densenet_pytorch"
        )
    whys = {name: _why_not_structure(block) for name, block in found.items()}
    if strict and any(whys.values()):
        refused = "; ".join(f"{name}: {why}" for name, why in whys.items() if why)
        raise ValueError(f"model: cannot be converted wholly: {refused}")
    if not inplace:
        model = copy.deepcopy(model)
        found = dict(_dense_blocks(model))
    followed_by_writers = set(_before_writers(model))
    for name, block in found.items():
        if whys[name] is not None:
            _logger.info("%s: not converted: %s", name, whys[name])
            continue
        _logger.info("%s: converted, %d layers", name, len(list(block.children())))
        block.__class__ = _converted_class(_original(block), _ConvertedBlock)
        vars(block)["_efficient_densenet"] = _Settings(recompute, block in followed_by_writers)
    for module in reversed(list(model.modules())):  # features before the model that has them
        if type(module) is nn.Sequential and _holds_blocks(module):
            module.__class__ = _converted_class(nn.Sequential, _ConvertedSequential)
        elif _library_of_model(type(module)) and _has_converted_features(module):
            module.__class__ = _converted_class(type(module), _ConvertedModel)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert`, in place; returns the model. Does nothing to other models."""
    for module in list(model.modules()):
        if isinstance(module, _Converted):
            _revert_one(module)
    return model


def _revert_one(module: Any) -> None:
    module.__class__ = module.original
    vars(module).pop("_efficient_densenet", None)


def _dense_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if _library_of(module) is not None:
            yield name or type(module).__name__, module


def _before_writers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules in front of one that works in place, in anything sequential."""
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):
            children = list(parent.children())
            for module, following in itertools.pairwise(children):
                if getattr(following, "inplace", False):
                    yield module


def _has_converted_features(module: nn.Module) -> bool:
    return isinstance(getattr(module, "features", None), _ConvertedSequential)


def _holds_blocks(module: nn.Module) -> bool:
    return any(isinstance(child, _ConvertedBlock) for child in module.children())

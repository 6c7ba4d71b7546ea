"""What a block remembers of its lowering, and the facts by which it notices a change.

Lowering looks at every module of a block, which costs as much as its kernels. So
:class:`Remembered` keeps the last description with the *facts* that it followed from: types, modes,
numbers, hooks, and dtypes, devices and shapes of tensors. Facts hold no tensor and no module, so
nothing is kept alive, and replicas and copies share them.
"""

from __future__ import annotations

import itertools
import operator
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import computed_dtype, in_autocast
from .block_spec import BlockSpec
from .dense_block_formulas import BlockTensors
from .libraries import LayerParts
from .lowering import (
    AVERAGE_POOLS,
    CONVOLUTIONS,
    HOOKS,
    LEAVES,
    NORMS,
    Refusal,
    any_global_hook,
    read_attribute,
    synchronises,
)

# What decides about a module, besides its type, its hooks and what LayerParts tell.
_NORM_FIELDS = operator.itemgetter("training", "eps", "momentum", "track_running_stats")
_CONVOLUTION_FIELDS = operator.itemgetter(
    "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)


_CONVOLUTION_TYPES = frozenset(CONVOLUTIONS.values())
_POOL_NAMES = ("kernel_size", "stride", "padding", "ceil_mode", "divisor_override")


def _pool_fields(own: Mapping[str, Any]) -> object:
    return tuple(map(own.get, _POOL_NAMES))  # AvgPool1d has no divisor_override


class _FieldsOf(dict[type, Any]):
    """By the first known class that a class inherits from (timm's norms inherit from torch's)."""

    def __missing__(self, kind: type) -> Any:
        known = (self[base] for base in kind.__mro__[1:] if base in self)
        self[kind] = next(known, operator.itemgetter("training"))
        return self[kind]


_fields_of = _FieldsOf(
    {
        **dict.fromkeys(NORMS, _NORM_FIELDS),
        **dict.fromkeys(CONVOLUTIONS.values(), _CONVOLUTION_FIELDS),
        **dict.fromkeys(AVERAGE_POOLS.values(), _pool_fields),
    }
)
_hooks_of = operator.itemgetter(*HOOKS)
_tensor_facts = operator.attrgetter("shape", "dtype", "device")
_needs_grad = operator.attrgetter("requires_grad")


def _flatten(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules and all inside of them, one level after the other."""
    level = list(roots)
    found = level
    while level:
        children = [module.__dict__["_modules"].values() for module in level]
        level = [child for each in children for child in each if child is not None]
        found = found + level
    return found


def gather_facts(
    x: Tensor,
    layers: Iterable[LayerParts],
    roots: Iterable[nn.Module],
    tensors: BlockTensors,
    extra: object,
) -> tuple[object, ...]:
    """All that :func:`lower` reads.

    Loops are without bytecode where they can be: they run over hundreds of modules in every step.
    """
    modules = _flatten(roots)
    attributes, kinds = list(map(vars, modules)), list(map(type, modules))
    fields = [_fields_of[kind](own) for kind, own in zip(kinds, attributes, strict=True)]
    present = [tensor for tensor in itertools.chain(*tensors[:7]) if tensor is not None]
    absent = [tensor is None for tensor in itertools.chain(*tensors[:7])]
    running = [t for t in itertools.chain(*tensors[2:4]) if t is not None]
    convolutions = [m for m, kind in zip(modules, kinds, strict=True) if kind in _CONVOLUTION_TYPES]
    biases = read_attribute(convolutions, "_parameters", "bias")
    sync: list[bool] = []
    if any(issubclass(kind, nn.SyncBatchNorm) for kind in set(kinds)):
        sync = [synchronises(m) for m in modules if isinstance(m, nn.SyncBatchNorm)]
    return (
        (x.dtype, x.device, x.dim(), x.shape[1:2], min(x.shape[2:], default=0) < 2, extra),
        computed_dtype(x), in_autocast(x), any_global_hook(),
        [kind.forward for kind in LEAVES],
        kinds, fields, sync, [bias is None for bias in biases],
        list(map(any, map(_hooks_of, attributes))), ["forward" in own for own in attributes],
        [parts[7:9] + parts[10:] for parts in layers],
        absent, list(map(_tensor_facts, present)), list(map(type, present)),
        list(map(Tensor.stride, running)),
        torch.is_grad_enabled() and any(map(_needs_grad, running)),
        None if tensors.projection is None else _tensor_facts(tensors.projection),
    )  # fmt: skip


class Remembered:
    """The last description of a block for every use of it, with the facts that it follows from.

    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._last: dict[object, tuple[object, BlockSpec | Refusal]] = {}

    def get(self, use: object, facts: object) -> BlockSpec | Refusal | None:
        last = self._last.get(use)
        return None if last is None or last[0] != facts else last[1]

    def put(self, use: object, facts: object, lowered: BlockSpec | Refusal) -> None:
        if _is_plain(facts):
            self._last[use] = facts, lowered

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()


def _is_plain(fact: object) -> bool:
    """Whether nothing in it could keep a tensor or a module alive."""
    if isinstance(fact, (list, tuple)):
        return all(map(_is_plain, fact))
    kinds = (int, float, str, type, torch.dtype, torch.device, types.FunctionType)
    return fact is None or isinstance(fact, kinds)

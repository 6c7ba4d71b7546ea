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
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ._extension import _C
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
    synchronises,
)

# What decides about a module, besides its type, its hooks and what LayerParts tell.
_NORM_NAMES = ("training", "eps", "momentum", "track_running_stats")
_CONVOLUTION_NAMES = ("training", "kernel_size", "stride", "padding", "dilation", "groups",
                      "padding_mode")  # fmt: skip
_POOL_NAMES = ("training", "kernel_size", "stride", "padding", "ceil_mode", "divisor_override")


class _NamesOf(dict[type, tuple[str, ...]]):
    """By the first known class that a class inherits from (timm's norms inherit from torch's)."""

    def __missing__(self, kind: type) -> tuple[str, ...]:
        known = (self[base] for base in kind.__mro__[1:] if base in self)
        self[kind] = next(known, ("training", "drop_rate"))  # of dense layers
        return self[kind]


_names_of = _NamesOf(
    {
        **dict.fromkeys(NORMS, _NORM_NAMES),
        **dict.fromkeys(CONVOLUTIONS.values(), _CONVOLUTION_NAMES),
        **dict.fromkeys(AVERAGE_POOLS.values(), _POOL_NAMES),
        nn.modules.dropout._DropoutNd: ("training", "p"),
    }
)

_tensor_facts = operator.attrgetter("shape", "dtype", "device")
_needs_grad = operator.attrgetter("requires_grad")


def facts_of_modules(roots: Sequence[nn.Module]) -> tuple[object, ...]:
    """Types, hooks, modes and numbers of all modules below, in one call of C++."""
    facts: tuple[object, ...] = _C.module_facts(roots, _names_of, HOOKS)
    return facts


def gather_facts(
    x: Tensor,
    layers: Iterable[LayerParts],
    roots: Sequence[nn.Module],
    tensors: BlockTensors,
    extra: object,
) -> tuple[object, ...]:
    """All that :func:`lower` reads. C++ and loops without bytecode look at hundreds of modules."""
    present = [tensor for tensor in itertools.chain(*tensors[:7]) if tensor is not None]
    absent = [tensor is None for tensor in itertools.chain(*tensors[:7])]
    running = [t for t in itertools.chain(*tensors[2:4]) if t is not None]
    sync: list[bool] = []
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        modules = (module for root in roots for module in root.modules())
        sync = [synchronises(m) for m in modules if isinstance(m, nn.SyncBatchNorm)]
    return (
        (x.dtype, x.device, x.dim(), x.shape[1:2], min(x.shape[2:], default=0) < 2, extra),
        computed_dtype(x), in_autocast(x), any_global_hook(),
        [kind.forward for kind in LEAVES],
        facts_of_modules(roots), sync,
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

"""DenseNet and DenseNet-BC (arXiv:1608.06993) that can run in memory linear in their depth.

With ``efficient=True`` each dense block is one operator, together with the transition or final norm
that reads it (:mod:`efficient_densenet.dense_block`). A block that the operator does not compute
exactly (without bottlenecks, or with a hook on an inner module, another norm, a pruned convolution)
runs layer by layer on :func:`efficient_densenet.concat_bn_relu`, and what that does not compute as
plain modules.
Parameters, module names and results are those of ``efficient=False``.
"""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional
from .arguments import (
    RECOMPUTE,
    check_block_config,
    check_bn_size,
    check_choice,
    check_drop_rate,
    check_num_classes,
    check_number,
    check_positive,
    check_spatial_dims,
    computed_dtype,
    in_autocast,
)
from .batch_norm import BatchNorm
from .bn_relu_max_pool import bn_relu_max_pool
from .concat_bn_relu import concat_bn_relu, recompute_in_backward
from .dense_block import DenseLayer, Plan, Pool
from .layout import block_is_channels_last, convolution_is_channels_last
from .storage import SharedStorage

_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_GLOBAL_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


# ------------------------------------------------------------------------------------------------
# What may run fused. Each function returns why not, or None.


def _any_global_hook() -> bool:
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def _why_called(module: nn.Module, *types: type[nn.Module]) -> str | None:
    """Why a module has to be called: it is not exactly of these types, or somebody listens.

    A subclass (SyncBatchNorm, a parametrised convolution) computes something else, and pruning is
    a hook.
    """
    if type(module) not in types:
        return f"is {type(module).__name__}"
    if "forward" in vars(module):
        return "has a forward of its own"
    if _any_global_hook() or any(getattr(module, name) for name in _HOOKS):
        return "has hooks"
    return None


def _why_not_norm_relu(norm: nn.Module, relu: nn.Module) -> str | None:
    why = _why_called(norm, *_BATCH_NORMS.values())
    if why is not None:
        return f"norm {why}"
    why = _why_called(relu, nn.ReLU)
    return None if why is None else f"relu {why}"


def _why_not_convolution(conv: Any, x: Tensor, pointwise: bool) -> str | None:
    why = _why_called(conv, *_CONVOLUTIONS.values())
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
    weight = conv.weight
    if weight.device != x.device:
        return f"convolution is on {weight.device}, its input on {x.device}"
    if weight.dtype != x.dtype and not in_autocast(x):
        return f"convolution has {weight.dtype}, its input {x.dtype}"
    return None


def _why_not_halving(pool: Any, x: Tensor) -> str | None:
    """Averages of windows of 2 with stride 2."""
    why = _why_called(pool, *_AVERAGE_POOLS.values())
    if why is not None:
        return f"pool {why}"
    sizes = [_size(size) for size in (pool.kernel_size, pool.stride, pool.padding)]
    if sizes != [2, 2, 0] or pool.ceil_mode:
        return "pool is not over windows of 2 with stride 2"
    if getattr(pool, "divisor_override", None) is not None or min(x.shape[2:]) < 2:
        return "pool divides otherwise, or its input is too small"
    return None


def _why_not_max_pool(pool: Any, x: Tensor) -> str | None:
    """Maxima over windows of 3 with stride 2 and padding 1."""
    why = _why_called(pool, *_MAX_POOLS.values())
    if why is not None:
        return f"pool {why}"
    numbers = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    if type(pool) is not _MAX_POOLS.get(x.dim() - 2) or pool.ceil_mode or pool.return_indices:
        return "pool is for other inputs, or returns something else"
    return None if [_size(size) for size in numbers] == [3, 2, 1, 1] else "pool has other windows"


# ------------------------------------------------------------------------------------------------
# Fused pieces


def _batch_norm(norm: Any) -> BatchNorm:
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


def _layer_tensors(layer: Any) -> DenseLayer:
    """Of anything with norm1, conv1, norm2 and conv2."""
    return DenseLayer(
        _batch_norm(layer.norm1), layer.conv1.weight, _batch_norm(layer.norm2), layer.conv2.weight
    )


@torch.compiler.disable  # saved-tensor hooks and shared memory are not for a compiler to trace
def _fused_bn_relu(
    norm: nn.Module,
    consumer: Callable[[Tensor], Tensor],
    features: Sequence[Tensor],
    storage: SharedStorage | None = None,
) -> Tensor:
    """``consumer(relu(norm(cat(features, 1))))`` that does not keep what the consumer reads."""
    bn = _batch_norm(norm)
    momentum = bn.momentum
    if momentum is None:  # cumulative average
        count = bn.num_batches_tracked
        momentum = 0.0 if count is None else 1.0 / float(count + 1)
    y = concat_bn_relu(
        features,
        bn.running_mean,
        bn.running_var,
        bn.weight,
        bn.bias,
        training=bn.training,
        momentum=momentum,
        eps=bn.eps,
        storage=storage,
    )
    if bn.num_batches_tracked is not None:  # only now, so that an error leaves it as it was
        bn.num_batches_tracked.add_(1)
    with recompute_in_backward(y):
        return consumer(y)


def _stem_norm_relu(norm: nn.Module, consumer: nn.Module, x: Tensor) -> Tensor:
    """``consumer(relu(norm(x)))``: as one with the stem's max pooling, or any other consumer."""
    pools = _why_not_max_pool(consumer, x) is None
    y: Tensor = (
        bn_relu_max_pool(x, _batch_norm(norm)) if pools else _fused_bn_relu(norm, consumer, [x])
    )
    return y


class _DenseLayer(nn.Module):
    """``[features] -> growth_rate`` new channels: BN-ReLU-conv1x1-BN-ReLU-conv3x3.

    Without a bottleneck (``bn_size=None``): BN-ReLU-conv3x3, that is norm1, relu1 and conv2.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None,
        drop_rate: float,
        efficient: bool,
        spatial_dims: int,
    ) -> None:
        super().__init__()
        norm, conv = _BATCH_NORMS[spatial_dims], _CONVOLUTIONS[spatial_dims]
        self.has_bottleneck = bn_size is not None
        self.norm1 = norm(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        width = num_input_features
        if bn_size is not None:
            width = bn_size * growth_rate
            self.conv1 = conv(num_input_features, width, kernel_size=1, bias=False)
            self.norm2 = norm(width)
            self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv(width, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.efficient = efficient

    def forward(self, features: Sequence[Tensor], storage: SharedStorage) -> Tensor:
        if self.has_bottleneck:
            bottleneck = self._norm_relu_conv(self.norm1, self.relu1, self.conv1, features, storage)
            new = self._norm_relu_conv(self.norm2, self.relu2, self.conv2, [bottleneck], storage)
        else:
            new = self._norm_relu_conv(self.norm1, self.relu1, self.conv2, features, storage)
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new

    def _norm_relu_conv(
        self,
        norm: nn.Module,
        relu: nn.Module,
        conv: Callable[[Tensor], Tensor],
        features: Sequence[Tensor],
        storage: SharedStorage,
    ) -> Tensor:
        fuses = self.efficient and not torch.compiler.is_compiling()
        if fuses and _why_not_norm_relu(norm, relu) is None:
            fused: Tensor = _fused_bn_relu(norm, conv, features, storage)
            return fused
        y: Tensor = relu(norm(torch.cat(list(features), 1) if len(features) > 1 else features[0]))
        return conv(y)

    def why_not_fused(self, x: Tensor) -> str | None:
        why = _why_called(self, _DenseLayer)
        if why is None and not self.has_bottleneck:
            why = "no bottleneck (bn_size=None)"
        return (
            why
            or _why_not_norm_relu(self.norm1, self.relu1)
            or _why_not_convolution(self.conv1, x, pointwise=True)
            or _why_not_norm_relu(self.norm2, self.relu2)
            or _why_not_convolution(self.conv2, x, pointwise=False)
        )

    def convolutions(self) -> list[Tensor]:
        """Their weights, in the order in which they run."""
        convolutions = [self.conv1, self.conv2] if self.has_bottleneck else [self.conv2]
        return [convolution.weight for convolution in convolutions]


def _input_facts(x: Tensor) -> tuple[object, ...]:
    return (
        x.dtype, x.device, x.dim(), x.size(1), min(x.shape[2:], default=0) < 2,
        torch.get_autocast_dtype(x.device.type) if in_autocast(x) else None, _any_global_hook(),
    )  # fmt: skip


# Module.to and the like put other data into the same parameter.
_parameter_facts = operator.attrgetter("dtype", "device", "shape")


class _State:
    """All that a block's plan depends on, of its modules and of the input.

    Objects are compared by identity and kept, so that no other can take the place of one. This is
    looked at in every step, for thousands of objects: hence the loops without bytecode.
    """

    def __init__(self, x: Tensor, roots: Sequence[nn.Module]) -> None:
        self.roots, self.input = roots, _input_facts(x)
        self.modules = [module for root in roots for module in root.modules()]
        self.attributes = list(map(vars, self.modules))
        self.dicts = [*self.attributes]
        for attributes in self.attributes:
            names = ("_parameters", "_buffers", "_modules", *_HOOKS)
            self.dicts += [attributes[name] for name in names]
        self.objects = self._objects()
        found = (p for a in self.attributes for p in a["_parameters"].values())
        self.parameters = [parameter for parameter in found if parameter is not None]
        self.parameter_facts = list(map(_parameter_facts, self.parameters))

    def _objects(self) -> list[object]:
        return list(itertools.chain.from_iterable(map(dict.values, self.dicts)))

    def still_holds(self, x: Tensor, roots: Sequence[nn.Module]) -> bool:
        return (
            self.input == _input_facts(x)
            and _same(roots, self.roots)
            and _same(list(map(vars, self.modules)), self.attributes)
            and _same(self._objects(), self.objects)
            and list(map(_parameter_facts, self.parameters)) == self.parameter_facts
        )


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


class _Plans:
    """The last plan of a block for every use of it (alone, with a reader), with what it depends on.

    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._last: dict[object, tuple[_State, Plan | None]] = {}

    def get(
        self, use: object, x: Tensor, roots: Sequence[nn.Module], make: Callable[[], Plan | None]
    ) -> Plan | None:
        last = self._last.get(use)
        if last is None or not last[0].still_holds(x, roots):
            self._last[use] = last = _State(x, roots), make()
        return last[1]

    def __reduce__(self) -> tuple[type[_Plans], tuple[()]]:
        return _Plans, ()


class DenseBlock(nn.Module):
    """A dense block: ``num_layers`` layers, each reading all features before it.

    Args:
        num_layers: number of dense layers, ``denselayer1`` and so on.
        num_input_features: channels of the input.
        growth_rate: channels that each layer adds (``k`` in the paper).
        bn_size: the bottleneck has ``bn_size * growth_rate`` channels; None for layers without one,
            BN-ReLU-conv3x3.
        drop_rate: dropout probability after each layer, in ``[0, 1)``.
        efficient: run as one operator, :func:`efficient_densenet.dense_block`. Its output is
            channels-last and is itself kept for the backward pass. Without bottlenecks, layer by
            layer on :func:`efficient_densenet.concat_bn_relu`, also in linear memory.
        recompute: ``"bottleneck"`` or ``"features"``, see :func:`efficient_densenet.dense_block`;
            without bottlenecks there is nothing to choose.
        spatial_dims: 1, 2 or 3.

    Shape: ``[N, num_input_features, *spatial]`` to
    ``[N, num_input_features + num_layers * growth_rate, *spatial]``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None = 4,
        drop_rate: float = 0,
        efficient: bool = True,
        recompute: str = "bottleneck",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        check_positive(
            num_layers=num_layers,
            num_input_features=num_input_features,
            growth_rate=growth_rate,
        )
        check_bn_size(bn_size)
        check_drop_rate(drop_rate)
        check_choice("recompute", recompute, RECOMPUTE)
        check_choice("spatial_dims", spatial_dims, tuple(_CONVOLUTIONS))
        for i in range(num_layers):
            channels = num_input_features + i * growth_rate
            layer = _DenseLayer(channels, growth_rate, bn_size, drop_rate, efficient, spatial_dims)
            self.add_module(f"denselayer{i + 1}", layer)
        self.efficient = efficient
        self.recompute = recompute
        # For running layer by layer. Not a buffer: it holds nothing that outlives a step.
        self.storage = SharedStorage()
        self._plans = _Plans()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            fuses = functional.is_wanted() and self.why_not_fused(x) is None
            return self._traced(x) if fuses else self._layer_by_layer(x)
        plan = self.plan(x)
        return self._layer_by_layer(x) if plan is None else plan.run(x)

    def _layer_by_layer(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(features, self.storage))
        return torch.cat(features, 1)

    def _traced(self, x: Tensor) -> Tensor:
        """For a compiler: one operator that it can look around."""
        tensors, drop_rate = self._tensors()
        return functional.dense_block(x, tensors, drop_rate, self.recompute)

    def _tensors(self) -> tuple[list[DenseLayer], float]:
        """Those of the layers, and the rate of dropout."""
        layers: list[Any] = list(self.children())
        drop_rate = layers[0].drop_rate if layers[0].training else 0.0
        return [_layer_tensors(layer) for layer in layers], drop_rate

    @torch.compiler.disable
    def plan(
        self,
        x: Tensor,
        reader: nn.Module | None = None,
        averages: bool = False,
        entry: nn.Module | None = None,
    ) -> Plan | None:
        """How to run as one operator on ``x``, with the module that reads it; None for not so.

        With ``averages``, the result of a reader that is a norm is averaged over each image. With
        ``entry``, a transition's convolution, ``x`` is what that reads.
        Looking at every module of a block costs as much as running it, so plans are kept for as
        long as nothing has changed.
        """
        roots = [module for module in (self, reader, entry) if module is not None]
        use = reader is None, averages, entry is None
        return self._plans.get(use, x, roots, lambda: self._new_plan(x, reader, averages, entry))

    def _new_plan(self, x: Tensor, reader: Any, averages: bool, entry: Any) -> Plan | None:
        if self.why_not_fused(x) is not None:
            return None
        norm = reader.norm if type(reader) is _Transition else reader
        if reader is not None:
            # Somebody listens to what is between them, or the reader is another.
            if _why_called(self, DenseBlock) or _why_called(norm, *_BATCH_NORMS.values()):
                return None
            if norm is not reader and (_why_called(reader, _Transition) or reader.why_not_fused(x)):
                return None
        tensors, drop_rate = self._tensors()
        # With dropout, masks depend on the format of what the convolution makes.
        if entry is not None and (drop_rate > 0 or _why_not_convolution(entry, x, pointwise=True)):
            return None
        bn = None if norm is None else _batch_norm(norm)
        pool = Pool.IMAGES if averages else Pool.NONE
        if norm is not reader:
            pool = Pool.WINDOWS
        weight = None if entry is None else entry.weight
        return Plan(x, tensors, drop_rate, self.recompute, bn, pool, entry=weight)

    def is_plainly_channels_last(self, x: Tensor) -> bool:
        """Whether the output would be channels-last with ``efficient=False``."""
        layers: list[Any] = list(self.children())
        weights = [layer.convolutions() for layer in layers]
        return block_is_channels_last(x, weights, computed_dtype(x))

    def kernel_path(self, x: Tensor) -> str:
        """What the block's convolutions would run on for this input, with torch's settings.

        ``"tensor cores"``: batch norm, ReLU and each convolution are one kernel. ``"tensor cores
        but for conv2: why"``: the second convolutions are torch's. ``"matrix products: why"`` and
        ``"convolutions: why"``: operators of torch, on normalised features in scratch memory.
        ``"layer by layer: why"``: the block is not one operator, see :meth:`why_not_fused`.
        """
        why = self.why_not_fused(x)
        if why is not None:
            return f"layer by layer: {why}"
        path: str = self.plan(x).kernel_path(x)
        return path

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why the block would run layer by layer on this input; None where it would not."""
        if not self.efficient:
            return "efficient=False"
        layers: list[tuple[str, Any]] = list(self.named_children())
        first = layers[0][1]
        for name, layer in layers:
            why = layer.why_not_fused(x)
            if why is not None:
                return f"{name}: {why}"
            if (layer.drop_rate, layer.training) != (first.drop_rate, first.training):
                return f"{name}: other drop_rate or mode than denselayer1"
            if layer.conv2.weight.shape != first.conv2.weight.shape:
                return f"{name}: other numbers of channels than denselayer1"
        return None


class _Transition(nn.Sequential):
    """BN-ReLU-conv1x1-pool.

    A 1x1 convolution and an average commute, so with ``efficient`` the pooling comes first, and a
    quarter of the activations (a half in one dimension, an eighth in three) is convolved and kept.
    """

    norm: Any  # users may put other modules in their place
    relu: Any
    conv: Any
    pool: Any

    def __init__(
        self,
        num_input_features: int,
        num_output_features: int,
        efficient: bool,
        spatial_dims: int,
    ) -> None:
        norm, conv = _BATCH_NORMS[spatial_dims], _CONVOLUTIONS[spatial_dims]
        super().__init__(
            OrderedDict(
                norm=norm(num_input_features),
                relu=nn.ReLU(inplace=True),
                conv=conv(num_input_features, num_output_features, kernel_size=1, bias=False),
                pool=_AVERAGE_POOLS[spatial_dims](kernel_size=2, stride=2),
            )
        )
        self.efficient = efficient

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self.why_not_fused(x) is None:
            fused: Tensor = _fused_bn_relu(self.norm, lambda y: self.conv(self.pool(y)), [x])
            return fused
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y

    def why_not_fused(self, x: Tensor) -> str | None:
        if not self.efficient:
            return "efficient=False"
        return (
            _why_not_halving(self.pool, x)
            or _why_not_norm_relu(self.norm, self.relu)
            or _why_not_convolution(self.conv, x, pointwise=True)
        )


# The modules that lower the resolution behind the stem's convolution.
_POOLING = (_Transition, *_MAX_POOLS.values())


class DenseNet(nn.Module):
    """DenseNet for images ``[N, in_chans, *spatial]``; returns logits ``[N, num_classes]``.

    The defaults are those of DenseNet-BC-100 with k=12 for CIFAR-10. The networks of the paper have
    functions of their own, such as :func:`efficient_densenet.densenet121`.

    Args:
        growth_rate: channels that each dense layer adds (``k`` in the paper).
        block_config: number of dense layers in each dense block.
        compression: a transition keeps this fraction of its channels, in ``(0, 1]``.
        num_init_features: channels of the stem convolution.
        bn_size: the bottleneck has ``bn_size * growth_rate`` channels; None for layers without one,
            BN-ReLU-conv3x3 (DenseNet without B; without C is ``compression=1``).
        drop_rate: dropout probability after each dense layer, in ``[0, 1)``.
        num_classes: number of logits; 0 for none, and pooled features ``[N, num_features]``.
        small_inputs: stem for 32x32 images (one 3x3 convolution) instead of ImageNet's
            (7x7 convolution with stride 2, batch norm, ReLU, max pooling).
        efficient: run in memory linear in depth, and faster. Weights load either way, and
            results agree to rounding.
        recompute: what a block keeps for the backward pass besides its features, see
            :func:`efficient_densenet.dense_block`. ``"bottleneck"`` is faster, ``"features"``
            takes about half the memory: for what does not fit otherwise.
        spatial_dims: 1 (signals), 2 (images) or 3 (volumes).
        in_chans: channels of the images.

    Attributes:
        num_features: channels of the last feature map.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        growth_rate: int = 12,
        block_config: Sequence[int] = (16, 16, 16),
        compression: float = 0.5,
        num_init_features: int = 24,
        bn_size: int | None = 4,
        drop_rate: float = 0,
        num_classes: int = 10,
        small_inputs: bool = True,
        efficient: bool = False,
        recompute: str = "bottleneck",
        spatial_dims: int = 2,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        check_positive(
            growth_rate=growth_rate, num_init_features=num_init_features, in_chans=in_chans
        )
        check_block_config(block_config)
        check_bn_size(bn_size)
        check_number("compression", compression)
        if not 0 < compression <= 1:
            raise ValueError(f"compression: expected a number in (0, 1], got {compression}")
        check_drop_rate(drop_rate)
        check_num_classes(num_classes)
        check_choice("recompute", recompute, RECOMPUTE)
        check_choice("spatial_dims", spatial_dims, tuple(_CONVOLUTIONS))
        self.efficient = efficient
        self.drop_rate = drop_rate
        self.spatial_dims = spatial_dims

        stem = _stem(in_chans, num_init_features, small_inputs, spatial_dims)
        self.features = nn.Sequential(stem)
        num_features = num_init_features
        for i, num_layers in enumerate(block_config):
            block = DenseBlock(
                num_layers, num_features, growth_rate, bn_size, drop_rate, efficient, recompute,
                spatial_dims,
            )  # fmt: skip
            self.features.add_module(f"denseblock{i + 1}", block)
            num_features += num_layers * growth_rate
            if i + 1 < len(block_config):
                num_output_features = int(num_features * compression)
                if num_output_features == 0:
                    raise ValueError(
                        f"compression: expected to keep one or more of the {num_features} channels "
                        f"of transition{i + 1}, got {compression}"
                    )
                transition = _Transition(num_features, num_output_features, efficient, spatial_dims)
                self.features.add_module(f"transition{i + 1}", transition)
                num_features = num_output_features
        self.features.add_module("norm_final", _BATCH_NORMS[spatial_dims](num_features))
        self.num_features = num_features
        self.classifier = _classifier(num_features, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Fan-out normal for convolutions, identity batch norms, as in the original."""
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a new one, for fine-tuning.

        It has the device, dtype and mode of the model. Make the optimizer afterwards: the old
        classifier's parameters are the model's no longer.

        Args:
            num_classes: number of logits; 0 for none, and pooled features ``[N, num_features]``.

        Raises:
            TypeError, ValueError: ``num_classes`` is not an integer or below 0.
        """
        check_num_classes(num_classes)
        like = next(self.features.parameters())
        classifier = _classifier(self.num_features, num_classes)
        self.classifier = classifier.to(like.device, like.dtype).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self._last_features(x, averages=True).flatten(1))
        return logits

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, after norm and ReLU: what the classifier pools.

        Args:
            x: ``[N, in_chans, *spatial]``.

        Returns:
            ``[N, num_features, *spatial / stride]``, with a stride of 2 for each transition, times
            4 for the stem unless ``small_inputs``.

        Raises:
            ValueError: ``x`` has another number of dimensions.
        """
        return self._last_features(x, averages=False)

    def _last_features(self, x: Tensor, averages: bool) -> Tensor:
        """As :meth:`forward_features`, or its average over each image."""
        check_spatial_dims(x, self.spatial_dims)
        fuses = self.efficient and not torch.compiler.is_compiling()
        if fuses and _why_called(self.features, nn.Sequential) is None:
            return self._run(x, averages=averages)
        return self._activate(self.features(x), averages)

    def _activate(self, x: Tensor, averages: bool) -> Tensor:
        y = F.relu(x)
        return _GLOBAL_POOLS[self.spatial_dims](y, 1) if averages else y

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last feature map, and a list of one map of every resolution, finest first.

        For detection, segmentation and the like. As timm's ``forward_intermediates``: what the stem
        pools (nothing with ``small_inputs``), the output of each dense block but the last, and
        what :meth:`forward_features` returns. Those of ``densenet121()`` have 64, 256, 512, 1024
        and 1024 channels and strides 2, 4, 8, 16 and 32.

        The whole network runs, but no hook on ``features`` itself. Blocks' outputs are kept for
        the backward pass: do not write to them in place.

        Args:
            x: ``[N, in_chans, *spatial]``.

        Returns:
            The last map, and the list of all of them, the last one included.

        Raises:
            ValueError: ``x`` has another number of dimensions.
        """
        check_spatial_dims(x, self.spatial_dims)
        intermediates: list[Tensor] = []
        last = self._run(x, intermediates)
        return last, [*intermediates, last]

    def _run(
        self, x: Tensor, intermediates: list[Tensor] | None = None, averages: bool = False
    ) -> Tensor:
        """``relu(self.features(x))``, or its average over each image; appends what is read by
        something that pools.

        A block and its last reader are one operator where nobody asks for what is between them. A
        transition's convolution belongs to the next block's, where that may be one as well.
        """
        fuses = self.efficient and intermediates is None
        restores = self.efficient and self.training and self.drop_rate > 0
        modules: deque[Any] = deque(self.features.children())

        def plan_next(x: Tensor, entry: nn.Module | None = None) -> Plan | None:
            takes_part = fuses and not (restores and entry is not None)
            return _plan(modules, x, averages, entry) if takes_part else None

        while modules:
            plan, module = plan_next(x), modules.popleft()
            if isinstance(module, DenseBlock):
                channels_last = restores and module.is_plainly_channels_last(x)
                if plan is None:
                    y = module(x)
                else:
                    y, conv = _run_blocks(plan, x, modules, plan_next)
                    if conv is None:  # the final norm was last
                        return y
                    y = conv(y)
                    channels_last = restores and convolution_is_channels_last(
                        x, channels_last, conv.weight, computed_dtype(x)
                    )
                x = _in_format(y, channels_last) if restores else y
            elif fuses and len(modules) > 1 and _why_not_norm_relu(module, modules[0]) is None:
                modules.popleft()  # the stem's
                x = _stem_norm_relu(module, modules.popleft(), x)
            else:
                x = module(x)
            if intermediates is not None and modules and isinstance(modules[0], _POOLING):
                intermediates.append(x)
        return self._activate(x, averages)


def _in_format(x: Tensor, channels_last: bool) -> Tensor:
    """x in the memory format of the plain network, on which the next block's dropout depends."""
    inner = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=inner if channels_last else torch.contiguous_format)


def _plan(
    modules: Sequence[Any], x: Tensor, averages: bool, entry: nn.Module | None = None
) -> Plan | None:
    """How the first of the modules runs with the second: a block with its last reader."""
    if len(modules) < 2 or not isinstance(modules[0], DenseBlock):
        return None
    block, reader, is_last = modules[0], modules[1], len(modules) == 2
    if type(reader) is not _Transition and not is_last:
        return None
    plan: Plan | None = block.plan(x, reader, averages and is_last, entry)
    return plan


def _run_blocks(
    plan: Plan,
    x: Tensor,
    following: deque[Any],
    plan_next: Callable[[Tensor, nn.Module], Plan | None],
) -> tuple[Tensor, Any]:
    """Runs a block with its last reader, the first of the modules that follow; and each block
    behind a transition that can take the convolution of that.

    Args:
        following: loses what has run.
        plan_next: how the first two of them run as one, on the input of a convolution.

    Returns:
        The last result, and the convolution that is still to run on it; None for none.
    """
    while True:
        x, reader = plan.run(x), following.popleft()
        if plan.pool != Pool.WINDOWS:  # a norm
            return x, None
        next_plan = plan_next(x, reader.conv)
        if next_plan is None:
            return x, reader.conv
        following.popleft()
        plan = next_plan


def _stem(
    in_chans: int, num_init_features: int, small_inputs: bool, spatial_dims: int
) -> OrderedDict[str, nn.Module]:
    conv = _CONVOLUTIONS[spatial_dims]
    if small_inputs:
        return OrderedDict(
            conv0=conv(in_chans, num_init_features, kernel_size=3, stride=1, padding=1, bias=False)
        )
    return OrderedDict(
        conv0=conv(in_chans, num_init_features, kernel_size=7, stride=2, padding=3, bias=False),
        norm0=_BATCH_NORMS[spatial_dims](num_init_features),
        relu0=nn.ReLU(inplace=True),
        pool0=_MAX_POOLS[spatial_dims](kernel_size=3, stride=2, padding=1, ceil_mode=False),
    )


def _classifier(num_features: int, num_classes: int) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    classifier = nn.Linear(num_features, num_classes)
    nn.init.zeros_(classifier.bias)
    return classifier


def _size(size: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """A window's size, stride or padding as one number where it is the same in all dimensions."""
    return size[0] if isinstance(size, tuple) and len(set(size)) == 1 else size

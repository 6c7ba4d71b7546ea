"""DenseNet-BC (arXiv:1608.06993) whose dense layers can run in linear memory.

With ``efficient=True`` each ``concatenation -> batch norm -> ReLU`` of a dense layer
(and its second ``batch norm -> ReLU``) is one :func:`efficient_densenet.concat_bn_relu`
that writes into storage shared by the whole dense block and is recomputed in the
backward pass (arXiv:1707.06990). Parameters, module names and results are those of
``efficient=False``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .concat_bn_relu import concat_bn_relu, recompute_in_backward
from .storage import SharedStorage


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        _has_any_global_hook()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _can_fuse(norm: nn.Module, relu: nn.Module) -> bool:
    """Whether ``relu(norm(cat(features)))`` is exactly what the operator computes.

    A subclass such as SyncBatchNorm computes something else, and a hook has to be called.
    """
    return (
        type(norm) is nn.BatchNorm2d
        and type(relu) is nn.ReLU
        and not _has_hooks(norm)
        and not _has_hooks(relu)
    )


def _fused_bn_relu(
    norm: nn.BatchNorm2d, features: Sequence[Tensor], storage: SharedStorage
) -> Tensor:
    """``relu(norm(cat(features, 1)))`` with the bookkeeping of ``nn.BatchNorm2d.forward``."""
    uses_running = not norm.training or norm.track_running_stats
    counts = norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    momentum = norm.momentum
    if momentum is None:  # cumulative average
        momentum = 1.0 / float(norm.num_batches_tracked + 1) if counts else 0.0
    y = concat_bn_relu(
        features,
        norm.running_mean if uses_running else None,
        norm.running_var if uses_running else None,
        norm.weight,
        norm.bias,
        training=norm.training or norm.running_mean is None,
        momentum=momentum,
        eps=norm.eps,
        storage=storage,
    )
    if counts:  # only now, so that an error leaves the module as it was
        norm.num_batches_tracked.add_(1)
    return y


@torch.compiler.disable  # saved-tensor hooks and shared memory are not for a compiler to trace
def _fused_bn_relu_conv(
    norm: nn.BatchNorm2d, conv: nn.Module, features: Sequence[Tensor], storage: SharedStorage
) -> Tensor:
    y = _fused_bn_relu(norm, features, storage)
    with recompute_in_backward(y):
        return conv(y)


class _DenseLayer(nn.Module):
    """``[features] -> growth_rate`` new channels: BN-ReLU-conv1x1-BN-ReLU-conv3x3."""

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        efficient: bool,
    ) -> None:
        super().__init__()
        bottleneck = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, bottleneck, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.efficient = efficient

    def forward(self, features: Sequence[Tensor], storage: SharedStorage) -> Tensor:
        bottleneck = self._norm_relu_conv(self.norm1, self.relu1, self.conv1, features, storage)
        new = self._norm_relu_conv(self.norm2, self.relu2, self.conv2, [bottleneck], storage)
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new

    def _norm_relu_conv(
        self,
        norm: nn.Module,
        relu: nn.Module,
        conv: nn.Module,
        features: Sequence[Tensor],
        storage: SharedStorage,
    ) -> Tensor:
        if self.efficient and _can_fuse(norm, relu):
            return _fused_bn_relu_conv(norm, conv, features, storage)
        return conv(relu(norm(torch.cat(features, 1) if len(features) > 1 else features[0])))


class _DenseBlock(nn.Module):
    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        efficient: bool,
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            layer = _DenseLayer(
                num_input_features + i * growth_rate, growth_rate, bn_size, drop_rate, efficient
            )
            self.add_module(f"denselayer{i + 1}", layer)
        # Not a buffer: it holds nothing that outlives a step, and the layers overwrite it.
        self.storage = SharedStorage()

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(features, self.storage))
        return torch.cat(features, 1)


class _Transition(nn.Sequential):
    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(num_input_features),
                relu=nn.ReLU(inplace=True),
                conv=nn.Conv2d(num_input_features, num_output_features, kernel_size=1, bias=False),
                pool=nn.AvgPool2d(kernel_size=2, stride=2),
            )
        )


class DenseNet(nn.Module):
    """DenseNet-BC for images ``[N, 3, H, W]``; returns logits ``[N, num_classes]``.

    Args:
        growth_rate: channels that each dense layer adds (``k`` in the paper).
        block_config: number of dense layers in each dense block.
        compression: a transition keeps this fraction of its channels, in ``(0, 1]``.
        num_init_features: channels of the stem convolution.
        bn_size: the bottleneck has ``bn_size * growth_rate`` channels.
        drop_rate: dropout probability after each dense layer, in ``[0, 1)``.
        num_classes: number of logits.
        small_inputs: stem for 32x32 images (one 3x3 convolution) instead of ImageNet's
            (7x7 convolution with stride 2, batch norm, ReLU, max pooling).
        efficient: run the dense layers in memory linear in depth. Weights load
            either way, and results agree to rounding.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        growth_rate: int = 12,
        block_config: Sequence[int] = (16, 16, 16),
        compression: float = 0.5,
        num_init_features: int = 24,
        bn_size: int = 4,
        drop_rate: float = 0,
        num_classes: int = 10,
        small_inputs: bool = True,
        efficient: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("growth_rate", growth_rate),
            ("num_init_features", num_init_features),
            ("bn_size", bn_size),
            ("num_classes", num_classes),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        if not block_config or min(block_config) < 1:
            raise ValueError(
                f"block_config: expected at least one positive integer, got {block_config}"
            )
        if not 0 < compression <= 1:
            raise ValueError(f"compression: expected a number in (0, 1], got {compression}")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate: expected a number in [0, 1), got {drop_rate}")

        self.features = nn.Sequential(_stem(num_init_features, small_inputs))
        num_features = num_init_features
        for i, num_layers in enumerate(block_config):
            block = _DenseBlock(
                num_layers, num_features, bn_size, growth_rate, drop_rate, efficient
            )
            self.features.add_module(f"denseblock{i + 1}", block)
            num_features += num_layers * growth_rate
            if i + 1 < len(block_config):
                num_output_features = int(num_features * compression)
                transition = _Transition(num_features, num_output_features)
                self.features.add_module(f"transition{i + 1}", transition)
                num_features = num_output_features
        self.features.add_module("norm_final", nn.BatchNorm2d(num_features))
        self.classifier = nn.Linear(num_features, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Fan-out normal for convolutions, identity batch norms, as in the original."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.features(x), inplace=True)
        pooled = F.adaptive_avg_pool2d(features, (1, 1)).flatten(1)
        return self.classifier(pooled)


def _stem(num_init_features: int, small_inputs: bool) -> OrderedDict[str, nn.Module]:
    if small_inputs:
        return OrderedDict(
            conv0=nn.Conv2d(3, num_init_features, kernel_size=3, stride=1, padding=1, bias=False)
        )
    return OrderedDict(
        conv0=nn.Conv2d(3, num_init_features, kernel_size=7, stride=2, padding=3, bias=False),
        norm0=nn.BatchNorm2d(num_init_features),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1, ceil_mode=False),
    )

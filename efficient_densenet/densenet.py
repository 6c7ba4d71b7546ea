"""DenseNet and DenseNet-BC (arXiv:1608.06993) that can run in memory linear in their depth.

These are the modules alone. With ``efficient=True`` they hand their input to
:mod:`efficient_densenet.runner`; traced, scripted or exported they are the plain modules that they
are made of. Parameters, module names and results are those of ``efficient=False``.

``if not torch.jit.is_scripting()`` stands alone wherever it is asked: behind an ``and``,
TorchScript would compile the other conditions as well.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import (
    RECOMPUTE,
    check_block_config,
    check_bn_size,
    check_bool,
    check_choice,
    check_drop_rate,
    check_num_classes,
    check_number,
    check_positive,
    check_spatial_dims,
)
from .libraries import PART_NAMES, LayerParts
from .lowering import AVERAGE_POOLS, BATCH_NORMS, CONVOLUTIONS, MAX_POOLS, why_called
from .runner import Block, Ending, Settings, norm_relu_conv, records, run_block, run_sequence
from .storage import SharedStorage


class _DenseLayer(nn.Module):
    """``[features] -> growth_rate`` new channels: BN-ReLU-conv1x1-BN-ReLU-conv3x3.

    Without a bottleneck (``bn_size=None``): BN-ReLU-conv3x3, that is norm1, relu1 and conv2.
    """

    __constants__ = ["has_bottleneck"]

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None,
        drop_rate: float,
        efficient: bool,
        spatial_dims: int,
        storage: SharedStorage,
    ) -> None:
        super().__init__()
        norm, conv = BATCH_NORMS[spatial_dims], CONVOLUTIONS[spatial_dims]
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
        self.drop_rate = float(drop_rate)
        self.efficient = efficient
        self.storage = (
            storage  # one for all layers of a block; not a buffer: nothing outlives a step
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self.efficient and not records(features[0]):
                return self._run(features)
        y = torch.cat(features, 1) if len(features) > 1 else features[0]
        y = self.relu1(self.norm1(y))
        if self.has_bottleneck:
            y = self.relu2(self.norm2(self.conv1(y)))
        return self._drop(self.conv2(y))

    def _drop(self, y: Tensor) -> Tensor:
        if self.drop_rate > 0:
            y = F.dropout(y, p=self.drop_rate, training=self.training)
        return y

    @torch.jit.unused
    def _run(self, features: list[Tensor]) -> Tensor:
        """In linear memory, where the block is not one operator."""
        if self.has_bottleneck:
            z = norm_relu_conv(self.norm1, self.relu1, self.conv1, features, self.storage)
            y = norm_relu_conv(self.norm2, self.relu2, self.conv2, [z], self.storage)
        else:
            y = norm_relu_conv(self.norm1, self.relu1, self.conv2, features, self.storage)
        return self._drop(y)


def _read(layer: Any) -> LayerParts:
    other = None
    if type(layer) is not _DenseLayer:
        other = f"is {type(layer).__name__}"
    elif not layer.has_bottleneck:
        other = "no bottleneck (bn_size=None)"
    drop_rate = layer.drop_rate if other is None and layer.training else 0.0
    parts: Any = map(layer._modules.get, PART_NAMES)
    return LayerParts(layer, *parts, drop_rate, False, (), other)  # type: ignore[call-arg]


class DenseBlock(Block):
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
        check_bool("efficient", efficient)
        check_choice("recompute", recompute, RECOMPUTE)
        check_choice("spatial_dims", spatial_dims, tuple(CONVOLUTIONS))
        self.efficient, self.recompute = efficient, recompute
        self._settings = Settings(recompute)
        storage = self._settings.storage
        for i in range(num_layers):
            channels = num_input_features + i * growth_rate
            layer = _DenseLayer(
                channels, growth_rate, bn_size, drop_rate, efficient, spatial_dims, storage
            )
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.run_plain(x)
        return self._run(x)

    @torch.jit.unused
    def _run(self, x: Tensor) -> Tensor:
        return run_block(self, x)

    def run_plain(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(features))
        return torch.cat(features, 1)

    @torch.jit.unused
    def run_refused(self, x: Tensor, layers: Any) -> Tensor:
        return self.run_plain(x)  # every layer decides for itself

    @torch.jit.unused
    def each_layer(self) -> Iterator[tuple[str, LayerParts]]:
        return ((name, _read(layer)) for name, layer in self._modules.items())

    @torch.jit.unused
    def why_not_itself(self) -> str | None:
        return None if self.efficient else "efficient=False"

    @torch.jit.unused
    def settings(self) -> Settings:
        self._settings.recompute = self.recompute
        return self._settings

    @torch.jit.unused
    def instead(self) -> str:
        return "layer by layer" if self.efficient else "plain modules"


class _Transition(nn.Sequential):
    """BN-ReLU-conv1x1-pool."""

    def __init__(
        self, num_input_features: int, num_output_features: int, spatial_dims: int
    ) -> None:
        norm, conv = BATCH_NORMS[spatial_dims], CONVOLUTIONS[spatial_dims]
        super().__init__(
            OrderedDict(
                norm=norm(num_input_features),
                relu=nn.ReLU(inplace=True),
                conv=conv(num_input_features, num_output_features, kernel_size=1, bias=False),
                pool=AVERAGE_POOLS[spatial_dims](kernel_size=2, stride=2),
            )
        )


class _Features(nn.Sequential):
    """All but the head of a network."""

    efficient = False

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self.efficient and not records(x):
                return self._run(x)
        for module in self:
            x = module(x)
        return x

    @torch.jit.unused
    def _run(self, x: Tensor) -> Tensor:
        return run_sequence(list(self.children()), x)[0]


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
        check_bool("small_inputs", small_inputs)
        check_bool("efficient", efficient)
        check_choice("recompute", recompute, RECOMPUTE)
        check_choice("spatial_dims", spatial_dims, tuple(CONVOLUTIONS))
        self.efficient, self.drop_rate = efficient, float(drop_rate)
        self.spatial_dims = spatial_dims

        self.features = _Features(_stem(in_chans, num_init_features, small_inputs, spatial_dims))
        self.features.efficient = efficient
        num_features = num_init_features
        for i, num_layers in enumerate(block_config):
            block = DenseBlock(
                num_layers, num_features, growth_rate, bn_size, drop_rate, efficient, recompute,
                spatial_dims,
            )  # fmt: skip
            name = f"denseblock{i + 1}"
            block.settings().name = f"features.{name}"
            self.features.add_module(name, block)
            num_features += num_layers * growth_rate
            if i + 1 < len(block_config):
                num_output_features = int(num_features * compression)
                if num_output_features == 0:
                    raise ValueError(
                        f"compression: expected to keep one or more of the {num_features} channels "
                        f"of transition{i + 1}, got {compression}"
                    )
                transition = _Transition(num_features, num_output_features, spatial_dims)
                self.features.add_module(f"transition{i + 1}", transition)
                num_features = num_output_features
        self.features.add_module("norm_final", BATCH_NORMS[spatial_dims](num_features))
        self.num_features = num_features
        self.classifier = _classifier(num_features, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Fan-out normal for convolutions, identity batch norms, as in the original."""
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.unused
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
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if not records(x):
                return self._classify(self._run(x, Ending.AVERAGE).flatten(1))
        return self._classify(F.relu(self.features(x)).flatten(2).mean(2))

    def _classify(self, averages: Tensor) -> Tensor:
        y: Tensor = self.classifier(averages)
        return y

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
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if not records(x):
                return self._run(x, Ending.RELU)
        return F.relu(self.features(x))

    @torch.jit.unused
    def _run(self, x: Tensor, ending: Any) -> Tensor:
        check_spatial_dims(x, self.spatial_dims)
        done = False
        if self.efficient and why_called(self.features, _Features) is None:
            x, done = run_sequence(list(self.features.children()), x, ending)
        else:
            x = self.features(x)
        if done:
            return x
        x = F.relu(x)
        return x.flatten(2).mean(2) if ending == Ending.AVERAGE else x

    @torch.jit.unused
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
        modules = list(self.features.children())
        last, _ = run_sequence(modules, x, Ending.RELU, intermediates, self.efficient)
        last = F.relu(last)
        return last, [*intermediates, last]


def _stem(
    in_chans: int, num_init_features: int, small_inputs: bool, spatial_dims: int
) -> OrderedDict[str, nn.Module]:
    conv = CONVOLUTIONS[spatial_dims]
    if small_inputs:
        return OrderedDict(
            conv0=conv(in_chans, num_init_features, kernel_size=3, stride=1, padding=1, bias=False)
        )
    return OrderedDict(
        conv0=conv(in_chans, num_init_features, kernel_size=7, stride=2, padding=3, bias=False),
        norm0=BATCH_NORMS[spatial_dims](num_init_features),
        relu0=nn.ReLU(inplace=True),
        pool0=MAX_POOLS[spatial_dims](kernel_size=3, stride=2, padding=1, ceil_mode=False),
    )


def _classifier(num_features: int, num_classes: int) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    classifier = nn.Linear(num_features, num_classes)
    nn.init.zeros_(classifier.bias)
    return classifier

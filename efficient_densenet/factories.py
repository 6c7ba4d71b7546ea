"""The DenseNets of the paper (arXiv:1608.06993, tables 1 and 2) by name.

Each function takes, by keyword:

- ``weights``: what :func:`efficient_densenet.load_weights` takes, or None for random weights. They
  have to fit: for another number of classes load first, then call ``reset_classifier``.
- ``progress``: show the progress of a download (default: True).
- ``memory_format`` of the parameters: ``torch.contiguous_format`` (default), or
  ``torch.channels_last`` (``torch.channels_last_3d`` for ``spatial_dims=3``), for images in that
  format. Without ``efficient``, it is what makes convolutions in 16 bits fast on a GPU.
- all options of :class:`efficient_densenet.DenseNet` but those that make the network; ``efficient``
  is True unless told otherwise.

Input is ``[N, in_chans, *spatial]``, output ``[N, num_classes]``. Numbers of parameters are those
for 3 channels. A wrong argument raises TypeError or ValueError; the message names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch

from .arguments import check_choice
from .densenet import DenseNet
from .weights import Weights, load_weights

_MEMORY_FORMATS = {
    1: (torch.contiguous_format,),
    2: (torch.contiguous_format, torch.channels_last),
    3: (torch.contiguous_format, torch.channels_last_3d),
}


def densenet121(*, weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-121 for ImageNet: 7,978,856 parameters at 1000 classes (default).

    Arguments: :mod:`efficient_densenet.factories`. torchvision's weights:
    ``DenseNet121_Weights.IMAGENET1K_V1``.
    """
    return _imagenet("densenet121", 32, (6, 12, 24, 16), weights, options)


def densenet161(*, weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-161 for ImageNet, k=48: 28,681,000 parameters at 1000 classes (default).

    Arguments: :mod:`efficient_densenet.factories`. torchvision's weights:
    ``DenseNet161_Weights.IMAGENET1K_V1``.
    """
    return _imagenet("densenet161", 48, (6, 12, 36, 24), weights, options)


def densenet169(*, weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-169 for ImageNet: 14,149,480 parameters at 1000 classes (default).

    Arguments: :mod:`efficient_densenet.factories`. torchvision's weights:
    ``DenseNet169_Weights.IMAGENET1K_V1``.
    """
    return _imagenet("densenet169", 32, (6, 12, 32, 32), weights, options)


def densenet201(*, weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-201 for ImageNet: 20,013,928 parameters at 1000 classes (default).

    Arguments: :mod:`efficient_densenet.factories`. torchvision's weights:
    ``DenseNet201_Weights.IMAGENET1K_V1``.
    """
    return _imagenet("densenet201", 32, (6, 12, 48, 32), weights, options)


def densenet264(*, weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-264 for ImageNet, k=32: 33,337,704 parameters at 1000 classes (default).

    Arguments: :mod:`efficient_densenet.factories`.
    """
    return _imagenet("densenet264", 32, (6, 12, 64, 48), weights, options)


def densenet_bc_100_12(*, weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-BC of 100 layers, k=12, for CIFAR: 769,162 parameters at 10 classes (default).

    Arguments: :mod:`efficient_densenet.factories`.
    """
    return _cifar("densenet_bc_100_12", 12, (16, 16, 16), weights, options)


def densenet_bc_190_40(*, weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-BC of 190 layers, k=40, for CIFAR: 25,624,430 parameters at 10 classes (default).

    Arguments: :mod:`efficient_densenet.factories`.
    """
    return _cifar("densenet_bc_190_40", 40, (31, 31, 31), weights, options)


def densenet_bc_250_24(*, weights: Weights | None = None, **options: Any) -> DenseNet:
    """DenseNet-BC of 250 layers, k=24, for CIFAR: 15,324,406 parameters at 10 classes (default).

    Arguments: :mod:`efficient_densenet.factories`.
    """
    return _cifar("densenet_bc_250_24", 24, (41, 41, 41), weights, options)


def _imagenet(
    name: str,
    growth_rate: int,
    block_config: Sequence[int],
    weights: Weights | None,
    options: dict[str, Any],
) -> DenseNet:
    options = {"num_classes": 1000, "small_inputs": False} | options
    return _create(name, growth_rate, block_config, weights, **options)


def _cifar(
    name: str,
    growth_rate: int,
    block_config: Sequence[int],
    weights: Weights | None,
    options: dict[str, Any],
) -> DenseNet:
    options = {"num_classes": 10, "small_inputs": True} | options
    return _create(name, growth_rate, block_config, weights, **options)


def _create(
    name: str,
    growth_rate: int,
    block_config: Sequence[int],
    weights: Weights | None,
    progress: bool = True,
    memory_format: torch.memory_format = torch.contiguous_format,
    efficient: bool = True,
    **options: Any,
) -> DenseNet:
    # Before a download. torchvision calls those of densenet121 DenseNet121_Weights.
    if isinstance(weights, Enum) and type(weights).__name__.lower() != f"{name}_weights":
        raise TypeError(f"weights: expected those of {name}, got {weights}")
    model = DenseNet(
        growth_rate=growth_rate,
        block_config=block_config,
        num_init_features=2 * growth_rate,
        efficient=efficient,
        **options,
    )
    check_choice("memory_format", memory_format, _MEMORY_FORMATS[model.spatial_dims])
    model.to(memory_format=memory_format)
    if weights is not None:
        load_weights(model, weights, progress)
    return model

"""How each library names the parts of its dense layers, transitions and norms.

None of the libraries is imported here: a class is a candidate by its module and name. Names decide
nothing but where to look. What a block of such a class computes is tried out when it is converted
(:mod:`efficient_densenet.trial`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

PART_NAMES = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")
_PARTS_WITHOUT_RELU = ("norm1", "conv1", "norm2", "conv2")


class LayerParts(NamedTuple):
    """The parts of a dense layer.

    Args:
        layer: the module itself.
        relu1, relu2: None where the norm holds its activation (timm).
        conv1: None for a layer without a bottleneck.
        drop_rate: 0 in evaluation mode.
        drops_channels: dropout zeroes whole channels of an image.
        containers: modules between the layer and its parts, and those that drop out.
        other: what else the layer does, or how it differs; None for nothing.
    """

    layer: nn.Module
    norm1: Any
    relu1: Any
    conv1: Any
    norm2: Any
    relu2: Any
    conv2: Any
    drop_rate: float = 0.0
    drops_channels: bool = False
    containers: tuple[nn.Module, ...] = ()
    other: str | None = None


class TransitionParts(NamedTuple):
    """The parts of a transition; ``relu`` is None where the norm holds its activation."""

    transition: nn.Module
    norm: Any
    relu: Any
    conv: Any
    pool: Any


class Library(NamedTuple):
    """A library: the module and names of its classes, and a function that reads a layer.

    Args:
        module: where the classes are defined; None for anywhere, for a file that people copy.
        set_drop_rate: sets the probability of dropout of a layer; False where it has none.
        checkpoints: attributes of a layer that switch checkpointing on, which changes no result.
    """

    name: str
    module: str | None
    block: str
    layer: str
    read: Callable[[Any], LayerParts]
    set_drop_rate: Callable[[Any, float], bool]
    checkpoints: tuple[str, ...] = ()

    def has_block(self, module: nn.Module) -> bool:
        """Whether the module may be a dense block of the library, with layers of its own."""
        layers = list(module.children())
        return (
            self._names(type(module), self.block)
            and bool(layers)
            and all(self._names(type(layer), self.layer) for layer in layers)
        )

    def _names(self, kind: type, name: str) -> bool:
        """Whether a class, or one that it inherits from, has that name."""
        return any(
            base.__qualname__ == name and self.module in (None, base.__module__)
            for base in kind.__mro__
        )


def _read_attributes(layer: Any) -> LayerParts:
    """Parts that are children of the layer."""
    children = layer._modules
    holds_activation = "relu1" not in children and "relu2" not in children
    expected = _PARTS_WITHOUT_RELU if holds_activation else PART_NAMES
    other = None
    if tuple(children) != expected:
        other = f"has children {', '.join(children)} instead of {', '.join(expected)}"
    return LayerParts(
        layer,
        children.get("norm1"),
        children.get("relu1"),
        children.get("conv1"),
        children.get("norm2"),
        children.get("relu2"),
        children.get("conv2"),
        float(layer.drop_rate) if layer.training else 0.0,
        other=other,
    )


def _set_attribute(layer: Any, drop_rate: float) -> bool:
    layer.drop_rate = drop_rate
    return True


def _set_monai(layer: Any, drop_rate: float) -> bool:
    dropout = layer.layers._modules.get("dropout")
    if dropout is not None:
        dropout.p = drop_rate
    return dropout is not None


def _read_monai(layer: Any) -> LayerParts:
    """Parts in a container, whose last one may be dropout."""
    container = layer.layers
    children = container._modules
    dropout = children.get("dropout")
    expected = PART_NAMES if dropout is None else (*PART_NAMES, "dropout")
    norms_and_convolutions: Any = map(children.get, PART_NAMES)
    parts = LayerParts(layer, *norms_and_convolutions)._replace(containers=(container,))
    if tuple(children) != expected or tuple(layer._modules) != ("layers",):
        other = f"has children {', '.join(children)} instead of {', '.join(expected)}"
        return parts._replace(other=other)
    if dropout is None:
        return parts
    kinds = {nn.Conv2d: nn.Dropout2d, nn.Conv3d: nn.Dropout3d}
    of_channels = kinds.get(type(children["conv2"]))
    if type(dropout) not in (nn.Dropout, of_channels):
        return parts._replace(other=f"drops out with {type(dropout).__name__}")
    return parts._replace(
        drop_rate=float(dropout.p) if dropout.training else 0.0,
        drops_channels=type(dropout) is of_channels,
        containers=(container, dropout),
    )


LIBRARIES = (
    Library(
        "torchvision", "torchvision.models.densenet", "_DenseBlock", "_DenseLayer",
        _read_attributes, _set_attribute, ("memory_efficient",),
    ),
    Library(
        "timm", "timm.models.densenet", "DenseBlock", "DenseLayer",
        _read_attributes, _set_attribute, ("grad_checkpointing",),
    ),
    Library(
        "MONAI", "monai.networks.nets.densenet", "_DenseBlock", "_DenseLayer",
        _read_monai, _set_monai,
    ),
    Library(
        "torchxrayvision", "torchxrayvision.models", "_DenseBlock", "_DenseLayer",
        _read_attributes, _set_attribute,
    ),
    # Last: its classes are known by their names alone.
    Library(
        "efficient_densenet_pytorch", None, "_DenseBlock", "_DenseLayer",
        _read_attributes, _set_attribute, ("efficient",),
    ),
)  # fmt: skip

NAMES = "torchvision, timm, MONAI, torchxrayvision or efficient_densenet_pytorch"


def library_of(module: nn.Module) -> Library | None:
    """The library whose dense block this may be."""
    return next((library for library in LIBRARIES if library.has_block(module)), None)


def find_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that may be dense blocks of a library, converted ones included."""
    for name, module in model.named_modules():
        if library_of(module) is not None:
            yield name or type(module).__name__, module


def has_activation(norm: object) -> bool:
    """Whether a norm is one of timm's that hold their activation."""
    return type(norm).__name__ in ("BatchNormAct2d", "SyncBatchNormAct")


def transition_of(module: Any) -> TransitionParts | None:
    """The parts of a transition of any library: a sequence of norm, ReLU, conv and pool."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return None
    children = module._modules
    names = tuple(children)
    if names == ("norm", "relu", "conv", "pool"):
        return TransitionParts(module, *children.values())
    if names == ("norm", "conv", "pool") and has_activation(children["norm"]):
        return TransitionParts(module, children["norm"], None, children["conv"], children["pool"])
    return None

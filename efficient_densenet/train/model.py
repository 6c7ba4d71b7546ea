"""The network of a run: ours, or one of a library, converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import factories
from ..convert import convert
from ..densenet import DenseNet
from ..weights import _read, load_weights
from .errors import UsageError, one_line
from .options import Options

LIBRARIES = ("efficient_densenet", "torchvision", "timm", "monai")
FACTORIES = [name for name in vars(factories) if name.startswith("densenet")]


def create_model(options: Options, num_classes: int, pretrained: bool = False) -> nn.Module:
    """The network of ``--library`` and ``--model``; without ``--efficient`` as plain modules.

    Args:
        pretrained: begin with the weights of ``--pretrained``; a checkpoint replaces them anyway.

    Raises:
        UsageError: there is no such network, or its weights cannot be had.
    """
    weights = options.pretrained if pretrained else None
    try:
        if options.library == "efficient_densenet":
            return _create_ours(options, num_classes, weights)
        model = _OTHERS[options.library](options, num_classes, weights)
        return convert(model, options.recompute) if options.efficient else model
    except UsageError:
        raise
    # A library's own refusal of a name, an option, a file or a download.
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = one_line(error)
        raise UsageError(
            f"--library {options.library} --model {options.model}: {reason}"
        ) from error


def _create_ours(options: Options, num_classes: int, weights: str | None) -> DenseNet:
    if options.model != "densenet_bc" and options.model not in FACTORIES:
        listed = ", ".join(["densenet_bc", *FACTORIES])
        raise UsageError(f"--model {options.model}: expected one of {listed}")
    if weights is None:
        return _ours(options, num_classes)
    try:
        if weights == "default":
            state = _torchvision_weights(options.model).get_state_dict(check_hash=True)
        else:
            state = _read(weights, progress=False)
        classes = _classes_of(state) or num_classes
        model = _ours(options, classes)
        load_weights(model, state)
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"--pretrained: {one_line(error)}") from error
    if classes != num_classes:
        model.reset_classifier(num_classes)
    return model


def _ours(options: Options, num_classes: int) -> DenseNet:
    common: dict[str, Any] = {
        "num_classes": num_classes,
        "drop_rate": options.drop_rate,
        "efficient": options.efficient,
        "recompute": options.recompute,
    }
    if options.model != "densenet_bc":
        model: DenseNet = getattr(factories, options.model)(**common)
        return model
    assert options.depth is not None and options.growth_rate is not None
    growth_rate, layers = options.growth_rate, (options.depth - 4) // 6
    return DenseNet(growth_rate, [layers] * 3, num_init_features=2 * growth_rate, **common)


def _torchvision_weights(name: str) -> Any:
    import torchvision

    try:
        return torchvision.models.get_model_weights(name).DEFAULT
    except ValueError:
        raise UsageError(f"--pretrained: nobody offers weights of {name}: give a file") from None


def _classes_of(state: Any) -> int | None:
    """Classes of the network that the weights are of: the rows of its classifier."""
    names = [
        name for name in state if name.endswith(("classifier.weight", "class_layers.out.weight"))
    ]
    return len(state[names[0]]) if names and state[names[0]].dim() == 2 else None


# ------------------------------------------------------------------------------------------------
# Other libraries


def _create_torchvision(options: Options, num_classes: int, weights: str | None) -> nn.Module:
    import torchvision

    source = "DEFAULT" if weights == "default" else None
    model: Any = torchvision.models.get_model(
        options.model,
        weights=source,
        drop_rate=options.drop_rate,
        **({} if source else {"num_classes": num_classes}),
    )
    if source:
        model.classifier = nn.Linear(model.classifier.in_features, num_classes)
    return _with_file(model, weights, "classifier")


def _create_timm(options: Options, num_classes: int, weights: str | None) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(
        options.model,
        pretrained=weights == "default",
        num_classes=num_classes,
        proj_drop_rate=options.drop_rate,
    )
    return _with_file(model, weights, "classifier")


def _create_monai(options: Options, num_classes: int, weights: str | None) -> nn.Module:
    from monai.networks import nets

    model: nn.Module = getattr(nets, options.model)(
        spatial_dims=2,
        in_channels=3,
        out_channels=num_classes,
        dropout_prob=options.drop_rate,
        **({"pretrained": True} if weights == "default" else {}),
    )
    return _with_file(model, weights, "class_layers.out")


def _with_file(model: nn.Module, file: str | None, classifier: str) -> nn.Module:
    """The model with weights of a file, whose classifier may be of other classes."""
    if file is None or file == "default":
        return model
    try:
        state = dict(_read(file, progress=False))
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"--pretrained: {one_line(error)}") from error
    own = model.state_dict()
    for name in (f"{classifier}.weight", f"{classifier}.bias"):
        if name in state and state[name].shape != own[name].shape:
            state[name] = own[name]
    model.load_state_dict(state)
    return model


_OTHERS: dict[str, Callable[[Options, int, str | None], nn.Module]] = {
    "torchvision": _create_torchvision,
    "timm": _create_timm,
    "monai": _create_monai,
}


# ------------------------------------------------------------------------------------------------
# How it runs


def prepare_model(model: nn.Module, options: Options, device: torch.device) -> nn.Module:
    """The model on its device, with the memory format and the norms that were asked for."""
    if options.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    memory_format = torch.channels_last if options.channels_last else torch.preserve_format
    return model.to(device).to(memory_format=memory_format)


def compile_model(model: nn.Module, backend: str) -> None:
    """Compile ``forward`` in place, so that names of parameters stay.

    Raises:
        UsageError: torch knows no such backend.
    """
    backends = torch._dynamo.list_backends(exclude_tags=())
    if backend not in backends:
        raise UsageError(f"--compile {backend}: expected one of {', '.join(backends)}")
    model.compile(backend=backend)


def parameter_groups(model: nn.Module, options: Options) -> list[dict[str, Any]]:
    """All parameters, or without weight decay those of norms and the biases."""
    parameters = list(model.parameters())
    if options.norm_decay:
        return [{"params": parameters}]
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]

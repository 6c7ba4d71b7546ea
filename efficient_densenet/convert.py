"""Makes the DenseNets of other libraries run in linear memory, without touching their parameters.

:func:`convert` changes the class of dense blocks, of the ``nn.Sequential`` that holds them and of
the library's model around that to a subclass that runs :mod:`efficient_densenet.runner`. Every
module, parameter, buffer and name stays the same object, so optimizers, checkpoints and copies of
the weights go on working, and :func:`revert` is the change back. A block that the operator does not
compute exactly runs as it did, and so does everything else.
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from . import libraries
from .arguments import RECOMPUTE, check_bool, check_choice, check_module
from .densenet import DenseBlock
from .libraries import LayerParts, find_blocks, library_of
from .lowering import why_called, why_not_layers, why_not_layers_in_turn
from .remembered import Remembered
from .runner import Block, Ending, Settings, passes_through, records, run_block, run_sequence
from .storage import SharedStorage
from .trial import (
    Head,
    Trial,
    code_of,
    head_averages,
    head_has_hooks,
    head_of,
    numbers_of,
    try_block,
)

_logger = logging.getLogger("efficient_densenet")


class _Converted(nn.Module):
    """A module of another class, whose instances are of a subclass of both.

    The subclass is made when it is needed, so pickles name the original class instead.
    """

    original: type[nn.Module]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "forward" in vars(cls):  # torch.fx writes types into code, where a string is none
            cls.forward.__annotations__.update(get_type_hints(cls.forward))

    def run_plain(self, x: Tensor) -> Tensor:
        """As the library wrote it."""
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


class _ConvertedSettings(Settings):
    """Of a converted block, with the code and the numbers that were tried out.

    What is read from a pickle is tried out again: the code may be another there.
    """

    def __init__(self, recompute: str, name: str, block: nn.Module, trial: Trial) -> None:
        super().__init__(recompute, name)
        library = library_of(block)
        assert library is not None
        self.library, self.trial = library, trial
        self.code = _codes(block)
        # A library's own code reads nothing but what LayerParts tell; that of others may.
        kinds = (_original(block), *map(type, block.children()))
        is_own = all(kind.__module__ == library.module for kind in kinds)
        self.numbers = None if is_own else list(map(numbers_of, block.children()))

    def __deepcopy__(self, memo: dict[int, Any]) -> _ConvertedSettings:
        twin = _ConvertedSettings.__new__(_ConvertedSettings)
        vars(twin).update(vars(self), remembered=Remembered(), storage=SharedStorage())
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _Untried, (self.recompute, self.name)


class _Untried(NamedTuple):
    """What a pickle keeps of the settings of a converted block."""

    recompute: str
    name: str


def _codes(block: nn.Module) -> dict[type, Any]:
    layers = {type(layer) for layer in block.children()}
    return {kind: code_of(kind) for kind in {_original(block), *layers}}


class _ConvertedBlock(_Converted, Block):
    """Runs as one operator where it can, else as the library's block."""

    _efficient_densenet: Any

    def forward(self, x: Tensor) -> Tensor:
        if records(x):
            _warn_of_recording()
            return self.run_plain(x)
        return run_block(self, x)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        settings = self._efficient_densenet
        # Now and not in its first call, which may be one that a compiler traces.
        if isinstance(settings, _Untried):
            _convert_block(self, *settings, _try(self))

    def settings(self) -> _ConvertedSettings:
        found: _ConvertedSettings = self._efficient_densenet
        return found

    def each_layer(self) -> Iterator[tuple[str, LayerParts]]:
        read = self.settings().library.read
        return ((name, read(layer)) for name, layer in self._modules.items())

    def why_not_itself(self) -> str | None:
        settings = self.settings()
        library = settings.library
        if torch.compiler.is_compiling():
            return settings.trial.why
        if _codes(self) != settings.code:
            return "its code is not the one that was tried out: convert the model again"
        numbers = settings.numbers
        if numbers is not None and list(map(numbers_of, self.children())) != numbers:
            return "an attribute of a layer was changed: convert the model again"
        drops = any(library.read(layer).drop_rate > 0 for layer in self.children())
        return settings.trial.why_with_dropout if drops else settings.trial.why

    def instead(self) -> str:
        what = super().instead()
        return "library" if what == "plain modules" else what


class _Request:
    """Asks features for their next result averaged over each image, after a ReLU.

    Threads may share a model, so this is a variable of the context. A compiler cannot set one, and
    writes to the module instead.
    """

    _asked: ContextVar[nn.Module | None] = ContextVar("asked", default=None)

    @classmethod
    def ask(cls, features: Any) -> None:
        if torch.compiler.is_compiling():
            features._is_asked = True
        else:
            cls._asked.set(features)

    @classmethod
    def take(cls, features: Any) -> bool:
        """Whether these features were asked; they are no longer."""
        if torch.compiler.is_compiling():
            asked = features._is_asked
            features._is_asked = False
            return bool(asked)
        asked = cls._asked.get() is features
        if asked:
            cls._asked.set(None)
        return asked


class _ConvertedModel(_Converted):
    """Asks its features for what the library would make of them: ReLU and average of each image.

    The library's own code runs all the same. What it makes of one pixel that is not negative is
    that pixel.
    """

    features: Any
    _efficient_densenet: Any  # a _TriedHead; None in pickles

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._efficient_densenet is None:
            self._efficient_densenet = _TriedHead(self)

    def forward(self, x: Tensor) -> Tensor:
        if records(x) or not self._averages():
            return self.run_plain(x)
        _Request.ask(self.features)
        try:
            return self.run_plain(x)
        finally:  # where its code failed before it came to the features
            _Request.take(self.features)

    def _averages(self) -> bool:
        """Whether it would, and nobody listens."""
        head = self._efficient_densenet.averages
        return (
            head is not None
            and isinstance(self.features, _ConvertedSequential)
            and why_called(self.features, type(self.features)) is None
            and not head_has_hooks(self)
            and (torch.compiler.is_compiling() or head == head_of(self))
        )


class _TriedHead:
    """The head of a model that was found to read averages alone.

    What is read from a pickle is tried out again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.averages: Head | None = head_of(model) if head_averages(model) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> _TriedHead:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _ConvertedSequential(_Converted):
    """Runs a block and who reads it as one, and so the stem's norm, ReLU and pool."""

    _is_asked = False

    def forward(self, x: Tensor) -> Tensor:
        if records(x):
            _warn_of_recording()
        if records(x) or not isinstance(x, Tensor):
            return self.run_plain(x)
        ending = Ending.AVERAGE if _Request.take(self) else Ending.NOTHING
        modules = list(self.children())
        y, _ = run_sequence(modules, x, ending)
        # Behind a model's features, an activation may work in place.
        blocks = [i for i, module in enumerate(modules) if isinstance(module, Block)]
        return y.clone() if blocks and passes_through(modules[blocks[-1] + 1 :]) else y


@functools.cache
def _warn_of_recording() -> None:
    warnings.warn(
        "a converted model is being traced (torch.fx, torch.jit.trace or torch.export): what is "
        "recorded are the library's own modules, which use more memory",
        stacklevel=4,
    )


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


def _original(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was converted."""
    return module.original if isinstance(module, _Converted) else type(module)


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

    What a block computes decides, not its name: a copy with random weights runs as it is and
    converted, and a block that gives something else is left alone.

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
        TypeError: an argument is of another type.
        ValueError: the model has no dense block of a known library; or, with ``strict``, one that
            cannot be converted. Nothing was changed.
    """
    check_module("model", model)
    check_choice("recompute", recompute, RECOMPUTE)
    check_bool("inplace", inplace)
    check_bool("strict", strict)
    found = dict(find_blocks(model))
    if not found:
        raise ValueError(why_nothing_to_convert(model))
    trials = {name: _try(block) for name, block in found.items()}
    reasons = {name: trials[name].why or _why_never_fused(block) for name, block in found.items()}
    refused = [f"{name}: {why}" for name, why in reasons.items() if why is not None]
    if strict and refused:
        raise ValueError(f"model: cannot be converted wholly: {'; '.join(refused)}")
    if not inplace:
        model = copy.deepcopy(model)
        found = dict(find_blocks(model))
    for name, block in found.items():
        if trials[name].why is not None:
            _logger.info("%s: not converted: %s", name, trials[name].why)
            continue
        _convert_block(block, recompute, name, trials[name])
        slow = why_not_layers(_layers_of(block))
        how = f", for now layer by layer: {slow}" if slow else ""
        _logger.info("%s: converted, %d layers%s", name, len(list(block.children())), how)
    _convert_around(model)
    return model


def _convert_block(block: Any, recompute: str, name: str, trial: Trial) -> None:
    block.__class__ = _converted_class(_original(block), _ConvertedBlock)
    vars(block)["_efficient_densenet"] = _ConvertedSettings(recompute, name, block, trial)


def _convert_around(model: nn.Module) -> None:
    """Converts what holds blocks: features before the model that has them."""
    for module in reversed(list(model.modules())):
        if type(module) is nn.Sequential and any(
            isinstance(child, _ConvertedBlock) for child in module.children()
        ):
            module.__class__ = _converted_class(nn.Sequential, _ConvertedSequential)
        elif _is_library_model(module) and isinstance(module.features, _ConvertedSequential):
            head = _TriedHead(module)
            if head.averages is not None:
                module.__class__ = _converted_class(_original(module), _ConvertedModel)
                vars(module)["_efficient_densenet"] = head


def _is_library_model(module: Any) -> bool:
    known = {library.module for library in libraries.LIBRARIES if library.module is not None}
    is_known = any(
        kind.__module__ in known and kind.__name__ == "DenseNet" for kind in type(module).__mro__
    )
    return is_known and isinstance(getattr(module, "features", None), nn.Module)


def _why_never_fused(block: nn.Module) -> str | None:
    """Why a block runs layer by layer for good, and not only while its norms synchronise."""
    return why_not_layers(_layers_of(block), may_synchronise=True)


def _layers_of(block: nn.Module) -> Mapping[str, LayerParts]:
    library = library_of(block)
    assert library is not None
    return {name: library.read(layer) for name, layer in block.named_children()}


def _try(block: Any) -> Trial:
    """What a block computes, tried out; and before, whether its modules are ones that we know."""
    if isinstance(block, torch.jit.ScriptModule):
        return Trial("is scripted", None)
    if isinstance(getattr(block, "_efficient_densenet", None), _ConvertedSettings):
        trial: Trial = block._efficient_densenet.trial
        return trial
    library = library_of(block)
    if library is None:
        return Trial("is not a dense block of a known library", None)
    try:
        why = why_not_layers_in_turn(_layers_of(block))
    except AttributeError as error:
        why = f"has other parts: {error}"
    if why is None and "forward" in vars(block):
        why = "has a forward of its own"
    if why is not None:
        return Trial(why, why)
    passed = Trial(None, None)
    trial = try_block(block, library, lambda b: _convert_block(b, "bottleneck", "", passed))
    drops = any(library.read(layer).drop_rate > 0 for layer in block.children())
    return trial._replace(why=trial.why or (trial.why_with_dropout if drops else None))


def why_not_converted(block: nn.Module) -> str | None:
    """Why :func:`convert` would leave a dense block alone; None where it would not."""
    return _try(block).why


def why_nothing_to_convert(model: nn.Module) -> str:
    """Of a model in which :func:`convert` finds nothing."""
    kind = type(model).__name__
    if any(isinstance(module, DenseBlock) for module in model.modules()):
        return f"model: {kind} has blocks of this package, which need no conversion"
    if isinstance(model, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        return f"model: {kind} was traced or scripted: convert the model before that"
    return f"model: {kind} has no dense block of {libraries.NAMES}"


def revert(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert`, in place; returns the model. Does nothing to other models."""
    check_module("model", model)
    for module in list(model.modules()):
        if isinstance(module, _Converted):
            _revert_one(module)
    return model


def _revert_one(module: Any) -> None:
    module.__class__ = module.original
    vars(module).pop("_efficient_densenet", None)

"""Loads the compiled module `_C`, which registers the operators, and checks that it fits.

In a checkout, the source folder shadows the installed package and has no `_C` of its own. So after
a plain `pip install .` the module is taken from the installed copy, wherever it is on the path.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map_only

from . import __version__

MINIMUM_TORCH = "2.11"

_NAME = f"{__package__}._C"
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _package_folders() -> Iterator[Path]:
    """Folders of this package, best first: this one, those on the path, editable installs."""
    yield Path(__file__).parent
    for entry in sys.path:
        yield Path(entry or ".", __package__)
    for finder in sys.meta_path:  # an editable install maps the name through a finder of its own
        if finder is not PathFinder and hasattr(finder, "find_spec"):
            spec = finder.find_spec(__package__, None)
            yield from map(Path, (spec and spec.submodule_search_locations) or [])


def _find() -> Path:
    for folder in _package_folders():
        for suffix in EXTENSION_SUFFIXES:
            file = folder / f"_C{suffix}"
            if file.is_file():
                return file.resolve()
    raise ImportError(
        f"{__package__} is not built for Python {sys.version_info[0]}.{sys.version_info[1]}: no "
        f"compiled module _C in {Path(__file__).parent} nor in an installed copy; run "
        "'pip install .' in the source folder."
    )


def _load() -> Any:
    versions = torch.__version__, MINIMUM_TORCH
    found, minimum = ([int(number) for number in v.split(".")[:2]] for v in versions)
    if found < minimum:
        raise ImportError(
            f"{__package__} {__version__} needs torch {MINIMUM_TORCH} or newer, but "
            f"torch {torch.__version__} is installed."
        )
    file = _find()
    spec = importlib.util.spec_from_file_location(_NAME, file)
    assert spec is not None and spec.loader is not None  # it is a file with a module's suffix
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built = module.build_info()["version"]
    if built != __version__:
        raise ImportError(
            f"The compiled module {file} is of version {built}, the Python sources in "
            f"{Path(__file__).parent} are of version {__version__}: rebuild with '{_REBUILD}'."
        )
    sys.modules[_NAME] = module
    vars(sys.modules[__package__])["_C"] = module
    return module


_C = _load()


def _tensors_in(arguments: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


def check_one_device(*arguments: Any) -> None:
    """Torch calls what stands for an operator on fake tensors if any of them is on the meta device,
    whatever the others are; then nothing would be computed, without a word.
    """
    devices = {tensor.device for tensor in _tensors_in(arguments)}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"{__package__}: expected all tensors on one device, got {names}")


def _without_negative_bit(name: str) -> Callable[..., None]:
    """For tensors whose sign is a bit of the tensor (``z.conj().imag``), not of its memory.

    Torch has a way of its own for them, but on torch 2.11 it crashes where an operator writes to
    its arguments.
    """
    operator = getattr(torch.ops.efficient_densenet, name).default
    writes = [argument.is_write for argument in operator._schema.arguments]

    def resolve(*arguments: Any) -> None:
        for argument, written in zip(arguments, writes, strict=False):
            if written and any(tensor.is_neg() for tensor in _tensors_in(argument)):
                raise RuntimeError(f"{operator}: expected memory to write to, got a negated view")
        operator(*tree_map_only(torch.Tensor, torch.Tensor.resolve_neg, arguments))

    return resolve


_negative: Any = torch.library.Library(__package__, "IMPL")  # type: ignore[no-untyped-call]
for _name in (
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_backward",
    "bn_relu_conv3x3",
    "bn_relu_conv3x3_backward",
    "bn_relu_max_pool",
    "concat_bn_relu",
    "dense_block_layers",
    "dense_block_layers_backward",
    "projection_backward",
    "update_running_statistics",
):
    # On fake tensors, operators that only write to their arguments do nothing.
    torch.library.register_fake(f"{__package__}::{_name}", check_one_device)
    _negative.impl(_name, _without_negative_bit(_name), "Negative")


def implement(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers functions of Python as an operator on the CPU and on CUDA, and for fake tensors.

    They run behind the checks that operators of C++ have: all tensors are on one device, and have
    memory for their elements.
    """
    qualified = f"{__package__}::{name}"
    operator = getattr(torch.ops.efficient_densenet, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def name_of(index: int, arguments: Any) -> str:
        """Of a tensor, as _tensors_in counts them."""
        found: list[str] = [
            name + keystr(path)
            for name, argument in zip(names, arguments, strict=False)
            for path, leaf in tree_flatten_with_path(argument)[0]
            if isinstance(leaf, torch.Tensor)
        ]
        return found[index]

    def checked(*arguments: Any) -> Any:
        check_one_device(*arguments)
        index = torch.ops.efficient_densenet.first_without_memory(_tensors_in(arguments))
        if index >= 0:
            raise RuntimeError(
                f"{qualified}: {name_of(index, arguments)}: expected memory for all elements of "
                "the tensor"
            )
        return function(*arguments)

    def checked_fake(*arguments: Any) -> Any:
        check_one_device(*arguments)
        return fake(*arguments)

    torch.library.impl(qualified, ("cpu", "cuda"))(checked)
    torch.library.register_fake(qualified, checked_fake)


def build_info() -> dict[str, str | None]:
    """How the compiled module was built.

    A dict of strings: ``version`` of this package, ``torch`` it was compiled against, ``cuda``
    version and ``architectures``; for a build without CUDA the last two are None and "CPU only".
    """
    info: dict[str, str | None] = _C.build_info()
    return info

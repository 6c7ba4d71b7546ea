"""The packages that a run needs beside torch, looked for before anything else is done."""

from __future__ import annotations

import importlib.util

from .data import DATASETS
from .errors import UsageError
from .options import Options

_OF_REPORTS = {
    "curves": ["matplotlib"],
    "confusion": ["matplotlib", "sklearn"],
    "tensorboard": ["tensorboard"],
}
_NAMES = {"sklearn": "scikit-learn"}
_IN_EXTRA = ("torchvision", "tqdm", "matplotlib", "sklearn", "scipy", "tensorboard")


def require_packages(options: Options) -> None:
    """Refuse if a package is missing, with the command that installs it.

    Raises:
        UsageError: one is.
    """
    needed = ["torchvision", "tqdm", *DATASETS[options.dataset].packages]
    if options.library in ("timm", "monai"):
        needed.append(options.library)
    for report in options.reports:
        needed += _OF_REPORTS.get(report, [])
    for package in needed:
        if importlib.util.find_spec(package) is None:
            name = _NAMES.get(package, package)
            what = "'efficient_densenet[train]'" if package in _IN_EXTRA else name
            what = "'.[demo]'" if options.program == "demo.py" else what
            raise UsageError(f"the package {name} is missing: pip install {what}")

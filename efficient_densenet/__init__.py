"""DenseNets in memory linear in depth: a fused concat-BN-ReLU operator and models on it."""

__version__ = "0.1.0"

from ._extension import build_info  # first: it loads the operators
from .concat_bn_relu import concat_bn_relu, recompute_in_backward
from .densenet import DenseNet
from .storage import SharedStorage

__all__ = ["DenseNet", "SharedStorage", "build_info", "concat_bn_relu", "recompute_in_backward"]

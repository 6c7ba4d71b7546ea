"""DenseNets in memory linear in depth: a fused concat-BN-ReLU operator and models on it."""

__version__ = "0.1.0"

from ._extension import build_info  # first: it loads the operators
from .batch_norm import BatchNorm
from .concat_bn_relu import concat_bn_relu, recompute_in_backward
from .dense_block import DenseLayer, dense_block
from .densenet import DenseBlock, DenseNet
from .storage import SharedStorage

__all__ = [
    "BatchNorm",
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "SharedStorage",
    "build_info",
    "concat_bn_relu",
    "dense_block",
    "recompute_in_backward",
]

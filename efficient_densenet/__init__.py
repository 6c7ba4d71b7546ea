"""DenseNets in memory linear in depth: a fused concat-BN-ReLU operator and models on it."""

__version__ = "0.1.0"

from ._extension import build_info  # first: it loads the operators
from .batch_norm import BatchNorm
from .bn_relu_max_pool import bn_relu_max_pool
from .concat_bn_relu import concat_bn_relu, recompute_in_backward
from .convert import convert, revert
from .dense_block import dense_block
from .dense_block_formulas import DenseLayer
from .densenet import DenseBlock, DenseNet
from .explain import BlockReport, explain
from .factories import (
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_bc_100_12,
    densenet_bc_190_40,
    densenet_bc_250_24,
)
from .graphs import graphed
from .storage import SharedStorage
from .weights import load_weights

__all__ = [
    "BatchNorm",
    "BlockReport",
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "SharedStorage",
    "bn_relu_max_pool",
    "build_info",
    "concat_bn_relu",
    "convert",
    "dense_block",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc_100_12",
    "densenet_bc_190_40",
    "densenet_bc_250_24",
    "explain",
    "graphed",
    "load_weights",
    "recompute_in_backward",
    "revert",
]

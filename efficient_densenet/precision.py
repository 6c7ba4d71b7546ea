"""What torch's settings allow float32 arithmetic to be."""

from __future__ import annotations

import torch

_EXACT = ("none", "ieee")


def settings(device: torch.device, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether TF32 is allowed, and whether matrix products may stand for convolutions.

    Args:
        device, dtype: of what is computed.

    Returns:
        ``allow_tf32``: torch's convolutions may round float32 to TF32.
        ``products_match_convolutions``: products of matrices have the same precision as
        convolutions. Both have settings of their own in torch.
    """
    if dtype != torch.float32:
        return False, True
    backend = "cuda" if device.type == "cuda" else "mkldnn"
    # Both of torch's ways to set TF32 end in what is asked here. The older attributes raise an
    # error once the newer ones were used.
    read = torch._C._get_fp32_precision_getter
    convolution, product = read(backend, "conv"), read(backend, "matmul")
    match = convolution == product or (convolution in _EXACT and product in _EXACT)
    return device.type == "cuda" and convolution == "tf32", match

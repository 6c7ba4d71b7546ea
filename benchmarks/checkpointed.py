"""The peer: a DenseNet whose dense layers are checkpointed, as in the well-known PyTorch code."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from efficient_densenet import DenseNet


class _CheckpointedConv(nn.Module):
    """`conv(relu(norm(cat(features))))`, all of it recomputed in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.relu, self.conv = layer.norm1, layer.relu1, layer.conv1

    def _run(self, *features: torch.Tensor) -> torch.Tensor:
        return self.conv(self.relu(self.norm(torch.cat(features, 1))))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        if any(feature.requires_grad for feature in features):
            return checkpoint(self._run, *features, use_reentrant=False)
        return self._run(*features)


class _CheckpointedBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first = nn.ModuleList(_CheckpointedConv(layer) for layer in block.children())
        self.second = nn.ModuleList(
            nn.Sequential(layer.norm2, layer.relu2, layer.conv2) for layer in block.children()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for first, second in zip(self.first, self.second, strict=True):
            features.append(second(first(features)))
        return torch.cat(features, 1)


def checkpointed_densenet(**settings) -> DenseNet:
    """A checkpointing `DenseNet(**settings)`; it updates running statistics twice a step."""
    model = DenseNet(**settings)
    for name, child in model.features.named_children():
        if name.startswith("denseblock"):
            setattr(model.features, name, _CheckpointedBlock(child))
    return model

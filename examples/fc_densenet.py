"""FC-DenseNet (Tiramisu, arXiv:1611.09326) for semantic segmentation, in memory linear in depth.

    python examples/fc_densenet.py                     # FC-DenseNet56 on coloured discs
    python examples/fc_densenet.py --plain             # the same on torch's own operators
    python examples/fc_densenet.py --model 103 --size 224 --device cuda

An example for hand-written networks whose layers read all feature maps before them. Everything that
makes memory linear is in :func:`bn_relu_conv`, which has the plain code beside it. Feature maps are
handed on in lists, so that nothing is concatenated where a batch norm reads: not in dense blocks,
not in transitions, not for skip connections.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_densenet import SharedStorage, concat_bn_relu, recompute_in_backward

# Growth rate, and layers of each block: five on the way down, one at the bottom, five up. With 11
# classes and the running statistics, they have 1.40, 3.50 and 9.43 million parameters.
MODELS = {
    56: (12, [4] * 11),
    67: (16, [5] * 11),
    103: (16, [4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4]),
}


def bn_relu_conv(
    norm: nn.BatchNorm2d,
    conv: nn.Conv2d,
    features: Sequence[Tensor],
    storage: SharedStorage | None,
) -> Tensor:
    """``conv(relu(norm(cat(features, 1))))``, which keeps nothing but the features for backward.

    Args:
        features: ``[N, C_i, H, W]`` each.
        storage: where the normalised features go, until it is next written. None for plain code,
            which keeps the concatenation and the normalised copy of it.
    """
    if storage is None:
        return conv(F.relu(norm(torch.cat(list(features), 1))))
    y = concat_bn_relu(
        features,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        storage=storage,
    )
    if norm.training:
        norm.num_batches_tracked.add_(1)
    with recompute_in_backward(y):
        return conv(y)


class DenseBlock(nn.Module):
    """Layers of BN-ReLU-conv3x3-dropout, each reading all features before it.

    ``forward`` takes feature maps ``[N, C_i, H, W]`` and returns those that it appends, one
    ``[N, growth_rate, H, W]`` per layer.

    Args:
        num_layers: number of layers.
        num_input_features: ``sum(C_i)``.
        growth_rate: channels that each layer adds.
        drop_rate: dropout probability after each layer.
        storage: shared by all layers, see :func:`bn_relu_conv`.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        growth_rate: int,
        drop_rate: float = 0.2,
        storage: SharedStorage | None = None,
    ) -> None:
        super().__init__()
        channels = [num_input_features + i * growth_rate for i in range(num_layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        self.convs = nn.ModuleList(nn.Conv2d(c, growth_rate, 3, padding=1) for c in channels)
        self.dropout = nn.Dropout(drop_rate)
        self.storage = storage

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        new: list[Tensor] = []
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = bn_relu_conv(norm, conv, [*features, *new], self.storage)
            new.append(self.dropout(y))
        return new


class TransitionDown(nn.Module):
    """BN-ReLU-conv1x1-dropout-max pool: features ``[N, C_i, H, W]`` to ``[N, C, H/2, W/2]``.

    Args:
        channels: ``C = sum(C_i)``.
        drop_rate, storage: as in :class:`DenseBlock`.
    """

    def __init__(
        self, channels: int, drop_rate: float = 0.2, storage: SharedStorage | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1)
        self.dropout = nn.Dropout(drop_rate)
        self.storage = storage

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        y = bn_relu_conv(self.norm, self.conv, features, self.storage)
        return F.max_pool2d(self.dropout(y), 2)


class FCDenseNet(nn.Module):
    """FC-DenseNet: images ``[N, 3, H, W]`` to logits ``[N, num_classes, H, W]``.

    Args:
        growth_rate: channels that each dense layer adds.
        block_config: layers of each dense block, an odd number of blocks: those on the way down,
            the one at the bottom, those on the way up.
        num_classes: number of logits per pixel.
        num_init_features: channels of the first convolution.
        drop_rate: dropout probability after each convolution of blocks and transitions.
        efficient: memory linear in depth; results and parameters are the same.
    """

    def __init__(
        self,
        growth_rate: int,
        block_config: Sequence[int],
        num_classes: int,
        num_init_features: int = 48,
        drop_rate: float = 0.2,
        efficient: bool = True,
    ) -> None:
        super().__init__()
        # One for all blocks, as they run one after the other.
        storage = SharedStorage() if efficient else None
        depth = len(block_config) // 2
        self.stem = nn.Conv2d(3, num_init_features, 3, padding=1)
        self.down, self.transitions_down = nn.ModuleList(), nn.ModuleList()
        self.transitions_up, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = num_init_features, []
        for num_layers in block_config[:depth]:
            self.down.append(DenseBlock(num_layers, channels, growth_rate, drop_rate, storage))
            channels += num_layers * growth_rate
            skips.append(channels)
            self.transitions_down.append(TransitionDown(channels, drop_rate, storage))
        self.bottom = DenseBlock(block_config[depth], channels, growth_rate, drop_rate, storage)
        new = block_config[depth] * growth_rate
        for num_layers in block_config[depth + 1 :]:
            self.transitions_up.append(nn.ConvTranspose2d(new, new, 3, stride=2))
            channels = new + skips.pop()
            self.up.append(DenseBlock(num_layers, channels, growth_rate, drop_rate, storage))
            new = num_layers * growth_rate
        self.classifier = nn.Conv2d(channels + new, num_classes, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        features, skips = [self.stem(x)], []
        for block, transition in zip(self.down, self.transitions_down, strict=True):
            features = [*features, *block(features)]
            skips.append(features)
            features = [transition(features)]
        new = self.bottom(features)
        for transition, block in zip(self.transitions_up, self.up, strict=True):
            skip = skips.pop()
            # Only what the last block has added goes up; sizes 2n + 1 are cut to those of the skip.
            height, width = skip[0].shape[2:]
            features = [transition(torch.cat(new, 1))[:, :, :height, :width], *skip]
            new = block(features)
        return self.classifier(torch.cat([*features, *new], 1))


def discs(
    batch: int, size: int, num_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Noisy images of discs whose colour says the class, on a background of class 0.

    Returns:
        Images ``[batch, 3, size, size]`` and classes ``[batch, size, size]``.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    labels = torch.zeros(batch, size, size, dtype=torch.int64)
    rows, columns = torch.arange(size).view(-1, 1) / size, torch.arange(size) / size
    for label in labels:
        for _ in range(6):
            y, x, radius = uniform(3) * torch.tensor([1, 1, 0.15]) + torch.tensor([0, 0, 0.1])
            disc = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            label[disc] = torch.randint(1, num_classes, (), generator=generator)
    # Colours are the same in every batch.
    palette = torch.rand(num_classes, 3, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(batch, 3, size, size, generator=generator)
    return palette[labels].movedim(-1, 1) + 0.2 * noise, labels


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """One step.

    Args:
        images: ``[N, 3, H, W]``.
        labels: ``[N, H, W]``, int64.

    Returns:
        Cross entropy and the fraction of pixels that are right, before the step.
    """
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    accuracy = (logits.argmax(1) == labels).double().mean()
    return loss.item(), accuracy.item()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=int, choices=MODELS, default=56, help="number of layers")
    parser.add_argument("--plain", action="store_true", help="without efficient_densenet")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="of the square images, 32 at least")
    parser.add_argument("--classes", type=int, default=11, help="with the background")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> float:
    """Trains, prints loss and pixel accuracy of every step, and returns the last loss."""
    args = parse(arguments)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    growth_rate, block_config = MODELS[args.model]
    model = FCDenseNet(growth_rate, block_config, args.classes, efficient=not args.plain).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"FC-DenseNet{args.model}: {parameters:,} parameters")
    optimizer = torch.optim.RMSprop(model.parameters(), lr=args.lr, weight_decay=1e-4)
    for step in range(1, args.steps + 1):
        images, labels = discs(args.batch, args.size, args.classes, generator)
        loss, accuracy = train_step(model, optimizer, images.to(device), labels.to(device))
        print(f"step {step:4d}   loss {loss:.4f}   pixel accuracy {accuracy:6.1%}")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB")
    return loss


if __name__ == "__main__":
    main()
